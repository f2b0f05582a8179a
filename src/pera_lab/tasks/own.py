"""A user's own data: prompts and completions, or conversations, from files or from the hub."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pera.errors import UserError
from pera_lab.tasks.base import Example, GenerationTask
from pera_lab.tasks.prompts import CHAT, Frame
from pera_lab.tasks.sources import (
    SUFFIXES,
    BadRow,
    Rows,
    field,
    read_file,
    read_hub_splits,
    split_file,
    take,
    validation_split,
)

NAME = "own"


def frame_of(template: str) -> Frame:
    """The chat template of the model, or the prompt as it is."""
    return CHAT if template == "chat" else Frame("{prompt}")


class OwnTask(GenerationTask):
    """Rows with the columns ``prompt`` and ``completion`` (texts, or lists of messages), or ``messages``, whose last
    one is the assistant's and is learned. An answer is right if it is the completion, white space at the ends apart.

    Args:
        name: "own".
        data: a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file; a folder with ``train`` and, if there are any,
            ``validation`` and ``test`` files; or the id of a data set on the hub.
        columns: the names of the columns in these data, by the names here.
        template: "chat", the prompt is a user's message, or "plain", the completion follows the prompt as it is.
        train_size: training rows to use at most, drawn by ``seed``.
        test_size: test rows to use; without a test file they are taken off the training rows.
        validation_size: rows to choose the checkpoint by, taken off the training rows, or of the validation
            file.
        seed: draws rows.

    Raises:
        UserError: data that cannot be read, a missing column, a broken row, too few rows.
    """

    def __init__(
        self,
        name: str = NAME,
        *,
        data: str,
        columns: Mapping[str, str] | None = None,
        template: Literal["chat", "plain"] = "chat",
        train_size: int | None = None,
        test_size: int | None = 200,
        validation_size: int = 0,
        seed: int = 42,
    ) -> None:
        self.name = name
        self.frame = frame_of(template)
        known = dict(columns or {})
        splits = _splits(data)
        read = partial(own_example, columns=known, template=template)
        converted = {split: rows.convert(read) for split, rows in splits.items()}
        rows = converted["train"]
        if "test" in converted:
            self.test = take(converted["test"], test_size, seed)
        else:
            rows, self.test = _take_off(rows, test_size or 200, "test_size", seed)
        if "validation" in converted:
            self.validation = take(converted["validation"], validation_size or None, seed)
        else:
            rows, self.validation = _take_off(rows, validation_size, "validation_size", seed + 1)
        self.train = take(rows, train_size, seed)
        used = {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}
        self.manifest = {split: source.record(used[split]) for split, source in splits.items()}

    def score(self, example: Example, output: str) -> float:
        return float(output.strip() == example.answer.strip())


def own_example(
    row: dict[str, Any], columns: Mapping[str, str] | None = None, *, template: str = "chat", answered: bool = True
) -> Example:
    """A row as an example; without ``answered`` it needs no completion.

    Raises:
        BadRow: it has neither a prompt with a completion nor messages, they are not as they should be, or there are
            messages for the template "plain".
    """
    names = {name: name for name in ("prompt", "completion", "messages")} | dict(columns or {})
    conversation = row.get(names["messages"]) is not None
    asked = names["messages" if conversation else "prompt"]
    if template == "plain" and isinstance(row.get(asked), list):
        raise BadRow(
            f"field {asked!r} holds messages, and a plain prompt has no roles; give texts, or template 'chat'."
        )
    if conversation:
        messages = _messages(row, names["messages"])
        answer = ""
        if answered or messages[-1]["role"] == "assistant":
            *messages, last = messages
            if last["role"] != "assistant" or not messages:
                raise BadRow(f"field {names['messages']!r} should end with an assistant's message behind a user's.")
            answer = last["content"]
        return Example(messages[-1]["content"], answer, row, messages=tuple(messages))
    if isinstance(row.get(names["prompt"]), list):
        messages = _messages(row, names["prompt"])
        answer = _answer(row, names["completion"]) if answered else ""
        return Example(messages[-1]["content"], answer, row, messages=tuple(messages))
    prompt = field(row, names["prompt"])
    return Example(prompt, field(row, names["completion"]) if answered else "", row)


def _answer(row: dict[str, Any], name: str) -> str:
    messages = _messages(row, name)
    if [message["role"] for message in messages] != ["assistant"]:
        raise BadRow(f"field {name!r} should hold one message, the assistant's.")
    return messages[0]["content"]


def _messages(row: dict[str, Any], name: str) -> list[dict[str, str]]:
    messages = field(row, name, list, "a list of messages")
    if not messages:
        raise BadRow(f"field {name!r} has no messages.")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise BadRow(f"field {name!r} should hold messages such as {{'role': 'user', 'content': '…'}}.")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _splits(data: str) -> dict[str, Rows]:
    path = Path(data).expanduser()
    if path.is_file():
        return {"train": read_file(path)}
    if path.is_dir():
        found = {"train": read_file(split_file(path, ["train"], (".jsonl", *SUFFIXES)))}
        for split in ("validation", "test"):
            if files := [path / f"{split}{suffix}" for suffix in SUFFIXES if (path / f"{split}{suffix}").is_file()]:
                found[split] = read_file(files[0])
        return found
    if path.suffix in SUFFIXES or data.count("/") != 1 or data.startswith((".", "/", "~")):
        raise UserError(f"task.data={data!r} does not exist; give a file, a folder or the id of a data set on the hub.")
    found = read_hub_splits(data)
    if "train" not in found:
        raise UserError(f"task.data={data!r} has no split 'train'; it has {', '.join(found)}.")
    return {split: found[split] for split in ("train", "validation", "test") if split in found}


def _take_off(rows: list[Example], size: int, key: str, seed: int) -> tuple[list[Example], list[Example]]:
    if size >= len(rows):
        raise UserError(f"task.{key}={size} leaves nothing of the {len(rows)} training rows.")
    return validation_split(rows, size, seed)
