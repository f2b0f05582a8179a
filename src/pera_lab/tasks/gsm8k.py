"""GSM8K (Cobbe et al., arXiv 2110.14168): grade-school mathematics, with the number after ``####`` as the answer."""

from __future__ import annotations

import re
from typing import Any

from pera.errors import UserError
from pera_lab.tasks.base import Example, GenerationTask, Verdict
from pera_lab.tasks.sources import (
    HUB,
    BadRow,
    Rows,
    field,
    folder_of,
    read_file,
    read_hub,
    split_file,
    take,
    validation_split,
)

NAME = "gsm8k"
REPOSITORY = "openai/gsm8k"


class Gsm8kTask(GenerationTask):
    """Problems in words; the model writes the solution and ends with ``#### number``.

    Args:
        name: "gsm8k".
        data: "hub" or a folder with ``train.jsonl`` and ``test.jsonl``; fields question and answer.
        train_size, test_size: rows to use at most, drawn by ``seed``.
        validation_size: training rows that are kept to choose the checkpoint by.
        annotations: keep the calculator annotations, ``<<16-3-4=9>>``, in what is learned.
        seed: draws rows.

    Raises:
        UserError: missing split, broken row, an answer without its number.
    """

    def __init__(
        self,
        name: str = NAME,
        *,
        data: str = HUB,
        train_size: int | None = None,
        test_size: int | None = None,
        validation_size: int = 0,
        annotations: bool = False,
        seed: int = 42,
    ) -> None:
        self.name = name
        self._annotations = annotations
        train, test = (_rows(data, split) for split in ("train", "test"))
        rows = take(train.convert(self._example), train_size, seed)
        if validation_size >= len(rows):
            raise UserError(f"task.validation_size={validation_size} leaves nothing of the {len(rows)} training rows.")
        self.train, self.validation = validation_split(rows, validation_size, seed)
        self.test = take(test.convert(self._example), test_size, seed)
        self.manifest = {"train": train.record(len(self.train)), "test": test.record(len(self.test))}

    def judge(self, example: Example, output: str) -> Verdict:
        """The number after the last ``####``, equal to that of the solution; without one the output is wrong."""
        found = final_number(output)
        return Verdict(found, found is not None and found == final_number(example.answer))

    def _example(self, row: dict[str, Any]) -> Example:
        question, answer = field(row, "question"), field(row, "answer")
        if final_number(answer) is None:
            raise BadRow("field 'answer' should end with '#### ' and a number.")
        return Example(question, answer if self._annotations else re.sub(r"<<[^>]*>>", "", answer))


def final_number(text: str) -> str | None:
    """The number after the last ``####``, without thousands marks, currency and trailing zeros; None if there is no
    such number."""
    found = re.findall(r"####\s*\$?\s*(-?\s*\$?[\d,]*\.?\d+)", text)
    if not found:
        return None
    number = re.sub(r"[,$\s]", "", found[-1])
    whole, _, rest = number.partition(".")
    rest = rest.rstrip("0")
    return f"{whole}.{rest}" if rest else whole or "0"


def _rows(data: str, split: str) -> Rows:
    return read_hub(REPOSITORY, "main", split) if data == HUB else read_file(split_file(folder_of(data), [split]))
