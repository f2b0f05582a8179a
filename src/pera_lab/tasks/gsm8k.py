"""GSM8K (Cobbe et al., arXiv 2110.14168): grade-school mathematics, with the number after ``####`` as the answer."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pydantic import Field

from pera_lab.tasks.base import GenerationTask
from pera_lab.tasks.conversations import example_of
from pera_lab.tasks.examples import Example, Splits, Verdict
from pera_lab.tasks.sources import (
    HUB,
    BadRow,
    DataPath,
    Rows,
    field,
    folder_of,
    read_file,
    read_hub,
    split_file,
    take,
    validation_split,
)

REPOSITORY = "openai/gsm8k"


class Gsm8kTask(GenerationTask):
    """Word problems. The model writes the solution and ends it with ``#### number``."""

    task_names = ("gsm8k",)
    max_new_tokens: ClassVar[int] = 512

    name: str = "gsm8k"
    data: DataPath = HUB
    """"hub", or a folder with ``train.jsonl`` and ``test.jsonl`` (fields question and answer)."""
    train_size: int | None = Field(None, ge=1)
    """Training rows to draw; all by default."""
    test_size: int | None = Field(None, ge=1)
    """Test rows to draw; all by default."""
    validation_size: int = Field(0, ge=0)
    """Training rows that choose the checkpoint instead."""
    annotations: bool = False
    """Whether to learn the calculator annotations, such as ``<<16-3-4=9>>``."""
    seed: int = Field(42, ge=0)
    """Seed of the draws."""

    def build(self) -> Splits:
        train, test = (self._rows(split) for split in ("train", "test"))
        rows = take(train.convert(self._example), self.train_size, self.seed)
        chosen, validation = validation_split(rows, self.validation_size, self.seed)
        held_out = take(test.convert(self._example), self.test_size, self.seed)
        manifest = {"train": train.record(len(chosen)), "test": test.record(len(held_out))}
        return Splits(chosen, held_out, validation, manifest=manifest)

    def judge(self, example: Example, output: str) -> Verdict:
        """Compare the number after the last ``####`` with the number of the solution."""
        found = final_number(output)
        return Verdict(found, found is not None and found == final_number(example.answer))

    def question(self, row: dict[str, Any]) -> Example:
        return example_of(row, {"prompt": "question"} if "question" in row else None, answered=False)

    def _rows(self, split: str) -> Rows:
        if self.data == HUB:
            return read_hub(REPOSITORY, "main", split)
        return read_file(split_file(folder_of(self.data), [split]))

    def _example(self, row: dict[str, Any]) -> Example:
        question, answer = field(row, "question"), field(row, "answer")
        if final_number(answer) is None:
            raise BadRow("field 'answer' should end with '#### ' and a number.")
        return Example(question, answer if self.annotations else re.sub(r"<<[^<>]*>>", "", answer))


def final_number(text: str) -> str | None:
    """The number after the last ``####``, without thousands separators, currency and trailing zeros; None if there is
    none."""
    found = re.findall(r"####\s*(?:\$\s*)?((?:-\s*)?\$?[\d,]*\.?\d+)", text)
    if not found:
        return None
    number = re.sub(r"[,$\s]", "", found[-1])
    whole, _, rest = number.partition(".")
    rest = rest.rstrip("0")
    return f"{whole}.{rest}" if rest else whole or "0"
