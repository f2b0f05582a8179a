"""Where rows come from: JSON, JSON lines, CSV and Parquet files, and the hub; each row checked, each mistake placed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pera.errors import UserError, missing_extra

T = TypeVar("T")

HUB = "hub"
"""The value of ``task.data`` that means a task's own data set on the hub."""

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


class BadRow(ValueError):
    """A row that is not as it should be; the message names field, value and what would be right."""


class Rows(NamedTuple):
    """The rows of one split and where they came from."""

    source: str
    rows: list[dict[str, Any]]
    unit: str = "row"
    """What the rows are counted in: lines of the file, or rows."""
    sha256: str | None = None

    def convert(self, function: Callable[[dict[str, Any]], T]) -> list[T]:
        """Each row as an example.

        Raises:
            UserError: there are no rows, or ``function`` raises :class:`BadRow`; it names source and line.
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
        """An entry of a manifest."""
        return {"source": self.source, "sha256": self.sha256, "rows": len(self.rows), "used": used}


def field(row: dict[str, Any], name: str, kind: type[T] | tuple[type, ...] = str, what: str = "a text") -> Any:  # type: ignore[assignment]
    """The value of a field.

    Raises:
        BadRow: it is missing, of another kind, or an empty text.
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
    """The rows of a file, whose kind its ending says: a JSON array, JSON lines, CSV with a head, or Parquet.

    Raises:
        UserError: it is missing, of another kind, or broken; the line is named.
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
                raise UserError(f"{file}, row {number}: has not as many fields as the head has names.")
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
        raise UserError(f"data: {str(file)!r} is not a Parquet file: {' '.join(str(error).split())}.") from error
    return rows


def read_hub(repository: str, configuration: str | None, split: str, revision: str | None = None) -> Rows:
    """The rows of one split of a data set on the hub, or in a local folder, by the library ``datasets``.

    Raises:
        UserError: the library is not installed, or the data set, configuration or split cannot be had.
    """
    name = f"{repository} ({configuration})" if configuration else repository
    found = _load(f"split {split!r} of {name}", repository, configuration, split=split, revision=revision)
    return Rows(f"{name}, split {split}", list(found))


def read_hub_splits(repository: str) -> dict[str, Rows]:
    """The rows of every split of a data set on the hub, or in a local folder, by the library ``datasets``.

    Raises:
        UserError: as :func:`read_hub`.
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
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        sentence = f"{what} cannot be had: {reason}; without a network give a folder"
        raise UserError(f"task.data: {sentence}, data=FOLDER.") from error


def folder_of(data: str) -> Path:
    """The folder or file that ``task.data`` names.

    Raises:
        UserError: it does not exist.
    """
    path = Path(data).expanduser()
    if not path.exists():
        raise UserError(f"task.data={data!r} does not exist; give a folder, or {HUB!r} for the data set on the hub.")
    return path


def split_file(folder: Path, names: Sequence[str], suffixes: Sequence[str] = SUFFIXES) -> Path:
    """The file of a split, the first of ``names`` that is there.

    Raises:
        UserError: none of them is.
    """
    for name in names:
        for suffix in suffixes:
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    *others, last = suffixes
    endings = f"{', '.join(others)} or {last}" if others else last
    wanted = f"{' or '.join(dict.fromkeys(names))} with the ending {endings}"
    there = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
    raise UserError(f"task.data: the split {str(folder / names[0])!r} is missing; there should be {wanted} ({there}).")


def take(rows: list[T], size: int | None, seed: int) -> list[T]:
    """``size`` of the rows, drawn by ``seed``, in their order; all of them if there are no more."""
    if size is None or size >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), size))]


def divide(rows: list[T], size: int, seed: int) -> tuple[list[T], list[T]]:
    """``size`` rows drawn by ``seed``, and the rest, both in their order."""
    chosen = set(random.Random(seed).sample(range(len(rows)), size))
    return [r for i, r in enumerate(rows) if i in chosen], [r for i, r in enumerate(rows) if i not in chosen]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def validation_split(rows: list[T], size: int, seed: int) -> tuple[list[T], list[T]]:
    """The rows without ``size`` of them, and these: the same as ``train_test_split`` of the library ``datasets`` draws,
    which the published protocols use, but the rest stays in its order."""
    import numpy as np

    drawn = np.random.default_rng(seed).permutation(len(rows))[:size].tolist()
    held = set(drawn)
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in drawn]
