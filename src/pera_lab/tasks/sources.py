"""Reads rows from JSON, JSON Lines, CSV and Parquet files and from the Hub. Errors name the file and the line."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pera.errors import UserError, missing_extra, one_line
from pera_lab.files import expanded
from pera_lab.sections import absolute_path
from pera_lab.tasks.examples import Example

T = TypeVar("T")

HUB = "hub"
"""Value of ``task.data`` for the task's own data set on the Hub."""

DataPath = Annotated[str, absolute_path(HUB)]
"""Type of ``task.data``: a file, a folder, a Hub id or :data:`HUB`."""

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


class BadRow(ValueError):
    """A row with a missing or wrong field. The message names the field, its value and what would be right."""


class Rows(NamedTuple):
    """The rows of one split and their source."""

    source: str
    rows: list[dict[str, Any]]
    unit: str = "row"
    """What rows are called in messages: "line" of a file, or "row"."""
    sha256: str | None = None

    def convert(self, function: Callable[[dict[str, Any]], T]) -> list[T]:
        """``function`` of each row.

        Raises:
            UserError: there are no rows, or ``function`` raises :class:`BadRow`. The message names source and line.
        """
        if not self.rows:
            raise UserError(f"{self.source} has no rows.")
        found = []
        for number, row in enumerate(self.rows, 1):
            try:
                if not isinstance(row, dict):
                    raise BadRow(f"{row!r} should be an object with named fields.")
                found.append(function(row))
            except BadRow as error:
                raise UserError(f"{self.source}, {self.unit} {number}: {error}") from error
        return found

    def record(self, used: int) -> dict[str, Any]:
        """An entry of a manifest: the source, its SHA-256, the number of rows and the number of rows used."""
        return {"source": self.source, "sha256": self.sha256, "rows": len(self.rows), "used": used}


def field(row: dict[str, Any], name: str, kind: type[T] | tuple[type, ...] = str, what: str = "a text") -> Any:  # type: ignore[assignment]
    """The value of a field of a row.

    Args:
        row: the row.
        name: name of the field.
        kind: type, or types, of the value.
        what: description of a right value, for the message.

    Raises:
        BadRow: the field is missing, has another type, or is an empty text.
    """
    if not isinstance(row, dict):
        raise BadRow(f"should be an object with fields, not {_short(row)}.")
    if name not in row or row[name] is None:
        raise BadRow(f"field {name!r} is missing; the fields are {', '.join(map(str, row)) or 'none'}.")
    value = row[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or value == "":
        raise BadRow(f"field {name!r}={_short(value)} should be {what}.")
    return value


def read_file(file: Path) -> Rows:
    """The rows of a JSON array, JSON Lines, CSV (with a header) or Parquet file. The suffix decides the format.

    Raises:
        UserError: the file is missing, has another suffix or is broken. The message names the line.
    """
    if file.suffix not in SUFFIXES:
        raise UserError(f"data: {str(file)!r} should end in one of {', '.join(SUFFIXES)}.")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"data: {str(file)!r} cannot be read: {error.strerror}.") from error
    digest = hashlib.sha256(content).hexdigest()
    if file.suffix == ".parquet":
        return Rows(str(file), _parquet(file), "row", digest)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line}: is not UTF-8 text.") from error
    if file.suffix == ".json":
        try:
            rows = json.loads(text) if text.strip() else []
        except ValueError as error:
            raise UserError(f"{file}, line {getattr(error, 'lineno', 1)}: is not valid JSON ({error}).") from error
        if not isinstance(rows, list):
            raise UserError(f"{file}, line 1: should be an array of objects, [{{…}}, …].")
        return Rows(str(file), rows, "row", digest)
    if file.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            table = list(reader)
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num}: is not valid CSV ({error}).") from error
        for number, row in enumerate(table, 1):
            if None in row or None in row.values():
                raise UserError(f"{file}, row {number}: has another number of fields than the header.")
        return Rows(str(file), table, "row", digest)
    lines = text.rstrip().split("\n") if text.strip() else []
    found = []
    for number, content_of_line in enumerate(lines, 1):
        try:
            found.append(json.loads(content_of_line))
        except ValueError as error:
            raise UserError(f"{file}, line {number}: is not valid JSON ({error}).") from error
    return Rows(str(file), found, "line", digest)


def _parquet(file: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "data") from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"data: {str(file)!r} is not a Parquet file: {one_line(error)}.") from error
    return rows


def read_hub(repository: str, configuration: str | None, split: str, revision: str | None = None) -> Rows:
    """The rows of one split of a data set, read with the library ``datasets``.

    Args:
        repository: id of a data set on the Hub, or a local folder.
        configuration: name of its configuration, if it has several.
        split: name of the split.
        revision: branch, tag or commit.

    Raises:
        UserError: the library is not installed, or the data set, configuration or split cannot be loaded.
    """
    name = f"{repository} ({configuration})" if configuration else repository
    found = _load(f"split {split!r} of {name}", repository, configuration, split=split, revision=revision)
    return Rows(f"{name}, split {split}", list(found))


def read_hub_splits(repository: str) -> dict[str, Rows]:
    """The rows of every split of a data set on the Hub or in a local folder.

    Raises:
        UserError: as for :func:`read_hub`.
    """
    found = _load(repository, repository)
    return {split: Rows(f"{repository}, split {split}", list(rows)) for split, rows in found.items()}


def _load(what: str, *arguments: Any, **options: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "data") from error
    try:
        return datasets.load_dataset(*arguments, **options)
    except Exception as error:  # the library raises anything, from no network to an unknown split
        reason = one_line(error).rstrip(".") or type(error).__name__
        raise UserError(
            f"task.data: {what} cannot be loaded: {reason}; offline, give a folder: data=FOLDER."
        ) from error


def folder_of(data: str) -> Path:
    """The folder or file that ``task.data`` names; UserError if it does not exist."""
    path = expanded(data)
    if not path.exists():
        raise UserError(f"task.data={data!r} does not exist; give a folder, or {HUB!r} for the data set on the Hub.")
    return path


def split_file(folder: Path, names: Sequence[str], suffixes: Sequence[str] = SUFFIXES) -> Path:
    """The file of a split.

    Args:
        folder: the folder with the files.
        names: names that the file can have, the preferred one first.
        suffixes: suffixes that it can have.

    Raises:
        UserError: there is no such file.
    """
    for name in names:
        for suffix in suffixes:
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    *others, last = suffixes
    endings = f"{', '.join(others)} or {last}" if others else last
    wanted = f"{' or '.join(dict.fromkeys(names))} with suffix {endings}"
    there = f"found {', '.join(sorted(p.name for p in folder.iterdir()))}" if folder.is_dir() else "no such folder"
    raise UserError(f"task.data: the split {str(folder / names[0])!r} is missing; expected {wanted} ({there}).")


def take(rows: list[T], size: int | None, seed: int) -> list[T]:
    """``size`` rows drawn by ``seed``, in their original order. None, or a size above the number of rows, gives all."""
    if size is None or size >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), size))]


def divide(rows: list[T], size: int, seed: int) -> tuple[list[T], list[T]]:
    """``size`` rows drawn by ``seed``, and the other rows, both in their original order."""
    chosen = set(random.Random(seed).sample(range(len(rows)), size))
    return [r for i, r in enumerate(rows) if i in chosen], [r for i, r in enumerate(rows) if i not in chosen]


def validation_split(rows: list[T], size: int, seed: int, key: str = "validation_size") -> tuple[list[T], list[T]]:
    """Training rows and ``size`` validation rows.

    The validation rows are the same as with ``train_test_split`` of the library ``datasets``, which the published
    protocols use. The training rows stay in their original order.

    Args:
        rows: the rows to split.
        size: number of validation rows.
        seed: seed of the draw.
        key: the option that ``size`` comes from, for the message.

    Raises:
        UserError: no training rows would be left.
    """
    if size >= len(rows):
        raise UserError(f"task.{key}={size} leaves none of the {len(rows)} training rows; give fewer.")
    import numpy as np

    drawn = np.random.default_rng(seed).permutation(len(rows))[:size].tolist()
    held = set(drawn)
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in drawn]


def example_of(
    row: dict[str, Any], columns: Mapping[str, str] | None = None, *, template: str = "chat", answered: bool = True
) -> Example:
    """A row with ``prompt`` and ``completion`` (texts or lists of messages), or with ``messages``, as an example.

    Args:
        row: the row.
        columns: names of the columns in the row, by the names above.
        template: "chat", or "plain" for a prompt without roles, which cannot be a list of messages.
        answered: whether the row must have an answer.

    Raises:
        BadRow: a column is missing or has a wrong value.
    """
    names = {name: name for name in ("prompt", "completion", "messages")} | dict(columns or {})
    conversation = row.get(names["messages"]) is not None
    asked = names["messages" if conversation else "prompt"]
    if template == "plain" and isinstance(row.get(asked), list):
        raise BadRow(f"field {asked!r} holds messages, and template 'plain' has no roles; give texts, or use 'chat'.")
    if conversation:
        messages = _messages(row, names["messages"])
        answer = ""
        if answered or messages[-1]["role"] == "assistant":
            *messages, last = messages
            if last["role"] != "assistant" or not messages:
                raise BadRow(f"field {names['messages']!r} should end with an assistant's message after a user's.")
            answer = last["content"]
        return Example(messages[-1]["content"], answer, row, messages=tuple(messages))
    if isinstance(row.get(names["prompt"]), list):
        messages = _messages(row, names["prompt"])
        answer = _assistant_answer(row, names["completion"]) if answered else ""
        return Example(messages[-1]["content"], answer, row, messages=tuple(messages))
    prompt = field(row, names["prompt"])
    return Example(prompt, field(row, names["completion"]) if answered else "", row)


def _assistant_answer(row: dict[str, Any], name: str) -> str:
    messages = _messages(row, name)
    if [message["role"] for message in messages] != ["assistant"]:
        raise BadRow(f"field {name!r} should hold one message, from the assistant.")
    return messages[0]["content"]


def _messages(row: dict[str, Any], name: str) -> list[dict[str, str]]:
    messages = field(row, name, list, "a list of messages")
    if not messages:
        raise BadRow(f"field {name!r} has no messages.")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise BadRow(f"field {name!r} should hold messages such as {{'role': 'user', 'content': '…'}}.")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
