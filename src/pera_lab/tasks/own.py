"""A user's own data: prompts and completions, or conversations, from files or from the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from pera.errors import UserError
from pera_lab.files import user_path
from pera_lab.tasks.base import GenerationTask
from pera_lab.tasks.conversations import example_of
from pera_lab.tasks.encoding import CHAT, PLAIN, Frame
from pera_lab.tasks.examples import Example, Splits
from pera_lab.tasks.sources import (
    SUFFIXES,
    DataPath,
    Rows,
    read_hub_splits,
    read_long_file,
    split_file,
    take,
    validation_split,
)


class OwnTask(GenerationTask):
    """Rows with the columns ``prompt`` and ``completion`` (texts, or lists of messages), or with ``messages``.

    The last message must be the assistant's; it is the answer. A tool call is learned and compared as the text that the
    model's chat template makes of it. A column ``tools`` goes to the chat template. An output is right if it equals the
    answer, ignoring white space at both ends.
    """

    task_names = ("own",)
    max_new_tokens: ClassVar[int] = 256

    name: str = "own"
    data: DataPath
    """A ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, a folder with ``train`` and optionally ``validation`` and
    ``test`` files, or the id of a data set on the Hub."""
    columns: dict[Literal["prompt", "completion", "messages", "tools"], str] = Field(default_factory=dict)
    """Names of the columns in the data, by the names used here."""
    template: Literal["chat", "plain"] = "chat"
    """"chat": the prompt is a user's message in the model's chat template. "plain": the completion follows the prompt
    directly."""
    train_size: int | None = Field(None, ge=1)
    """Training rows to draw; all by default."""
    test_size: int | None = Field(200, ge=1)
    """Test rows to draw. Without a test file they are taken from the training rows."""
    validation_size: int = Field(0, ge=0)
    """Rows that choose the checkpoint, from the validation file or else from the training rows."""
    seed: int = Field(42, ge=0)
    """Seed of the draws."""

    @property
    def frame(self) -> Frame:
        return CHAT if self.template == "chat" else PLAIN

    def build(self) -> Splits:
        sources, unused = _splits(self.data), dict[str, None]()

        def example(row: dict[str, Any]) -> Example:
            unused.update(dict.fromkeys(self._unused(row)))
            return self._example(row)

        converted = {split: rows.convert(example) for split, rows in sources.items()}
        rows = converted["train"]
        if "test" in converted:
            test = take(converted["test"], self.test_size, self.seed)
        else:
            rows, test = validation_split(rows, self.test_size or 200, self.seed, "test_size")
        if "validation" in converted:
            validation = take(converted["validation"], self.validation_size or None, self.seed)
        else:
            rows, validation = validation_split(rows, self.validation_size, self.seed + 1)
        train = take(rows, self.train_size, self.seed)
        used = {"train": len(train), "validation": len(validation), "test": len(test)}
        manifest = {split: source.record(used[split]) for split, source in sources.items()}
        return Splits(train, test, validation, manifest=manifest, unused=tuple(unused))

    def _unused(self, row: dict[str, Any]) -> Iterator[str]:
        """The columns of a row, other than empty ones, that its example does not come from."""
        prompt, completion, messages, tools = (
            str(self.columns.get(name, name)) for name in ("prompt", "completion", "messages", "tools")
        )
        used = {tools, messages} if row.get(messages) is not None else {tools, prompt, completion}
        return (key for key, value in row.items() if key not in used and value not in (None, ""))

    def question(self, row: dict[str, Any]) -> Example:
        return self._example(row, answered=False)

    def _example(self, row: dict[str, Any], answered: bool = True) -> Example:
        columns = {str(name): column for name, column in self.columns.items()}
        return example_of(row, columns, template=self.template, answered=answered)


def _splits(data: str) -> dict[str, Rows]:
    path = user_path(data)
    if os.path.isfile(path):
        return {"train": read_long_file(path)}
    if os.path.isdir(path):
        found = {"train": read_long_file(split_file(path, ["train"], (".jsonl", *SUFFIXES)))}
        for split in ("validation", "test"):
            if files := [path / f"{split}{suffix}" for suffix in SUFFIXES if (path / f"{split}{suffix}").is_file()]:
                found[split] = read_long_file(files[0])
        return found
    if path.suffix in SUFFIXES or data.count("/") != 1 or data.startswith((".", "/", "~")):
        raise UserError(f"task.data={data!r} does not exist; give a file, a folder or the id of a data set on the Hub.")
    found = read_hub_splits(data)
    if "train" not in found:
        raise UserError(f"task.data={data!r} has no split 'train'; it has {', '.join(found)}.")
    return {split: found[split] for split in ("train", "validation", "test") if split in found}
