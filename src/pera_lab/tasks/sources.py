"""Reads rows from files and from the Hub. Errors name the file and the line."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

from pera.errors import UserError, one_line
from pera_lab.files import user_path
from pera_lab.sections import absolute_path
from pera_lab.tasks.examples import Example, StoredExamples, select
from pera_lab.tasks.formats import parse_csv, parse_json, parse_json_lines, parse_parquet
from pera_lab.tasks.storage import StoredRows, datasets_library, stored_parquet

T = TypeVar("T")

HUB = "hub"
"""Value of ``task.data`` for the task's own data set on the Hub."""

DataPath = Annotated[str, absolute_path(HUB)]
"""Type of ``task.data``: a file, a folder, a Hub id or :data:`HUB`."""

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")

LONG = 2**24
"""Bytes of a file or of a data set from which its rows stay on the disk. In memory they take 20 times as much."""


class BadRow(ValueError):
    """A row with a missing or wrong field. The message names the field, its value and what would be right."""


@dataclass
class Rows:
    """The rows of one split and their source."""

    source: str
    rows: Sequence[Any]
    """A list; :class:`StoredRows` or a data set of the library ``datasets`` if they are too many for memory."""
    unit: str = "row"
    """What rows are called in messages: "line" of a file, or "row"."""
    sha256: str | None = None
    """Digest of the file. A long file is read by :meth:`convert`, which sets it."""
    numbers: Sequence[int] | None = None
    """Number of each row in messages; by default they count from 1."""

    def convert(self, function: Callable[[dict[str, Any]], T]) -> Sequence[T]:
        """``function`` of each row. An :class:`Example` learns where it comes from.

        Rows that are not in memory are all checked here, and converted again when they are used.

        Raises:
            UserError: there are no rows, a row is not an object of valid text, or ``function`` raises :class:`BadRow`.
                The message names source and line.
        """
        if isinstance(self.rows, StoredRows):
            numbered: Iterable[tuple[int, Any]] = self.rows.scan()
        else:
            numbered = zip(self.numbers or range(1, len(self.rows) + 1), self.rows, strict=True)
        converted = (self._convert(number, row, function) for number, row in numbered)
        found = list(converted) if isinstance(self.rows, list) else deque(converted, maxlen=1)
        if not found:
            raise UserError(f"{self.source} has no rows.")
        if isinstance(found, list):
            return found
        if isinstance(self.rows, StoredRows):
            self.sha256, self.numbers = self.rows.sha256, self.rows.numbers
        identity = f"{Path(self.source).suffix} {self.sha256}" if self.sha256 else _files_of(self.rows)

        def make(index: int) -> Any:
            number = self.numbers[index] if self.numbers else index + 1
            return self._placed(function(self.rows[index]), number)

        return StoredExamples(make, range(len(self.rows)), identity)

    def _convert(self, number: int, row: Any, function: Callable[[dict[str, Any]], T]) -> Any:
        try:
            if not isinstance(row, dict):
                raise BadRow(f"{short(row)} should be an object with named fields.")
            _check_text(row)
            example = function(row)
        except BadRow as error:
            raise UserError(f"{self._place(number)}: {error}") from error
        return self._placed(example, number)

    def _placed(self, example: Any, number: int) -> Any:
        return replace(example, place=self._place(number)) if isinstance(example, Example) else example

    def _place(self, number: int) -> str:
        return f"{self.source}, {self.unit} {number}"

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
        raise BadRow(f"should be an object with fields, not {short(row)}.")
    if name not in row or row[name] is None:
        raise BadRow(f"field {name!r} is missing; the fields are {_listed(row)}.")
    value = row[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or value == "":
        raise BadRow(f"field {name!r}={short(value)} should be {what}.")
    return value


def read_file(file: Path) -> Rows:
    """The rows of a JSON array, JSON Lines, CSV (with a header) or Parquet file. The suffix decides the format.

    Raises:
        UserError: the file is missing, has another suffix or is broken. The message names the line.
    """
    with _opened(file) as stream:
        content = stream.read()
    digest = hashlib.sha256(content).hexdigest()
    if file.suffix == ".parquet":
        return Rows(str(file), parse_parquet(file, content), sha256=digest)
    if file.suffix == ".json":
        return Rows(str(file), parse_json(file, content), sha256=digest)
    numbered = list(_LINE_PARSERS[file.suffix](file, io.BytesIO(content)))
    return Rows(str(file), [row for _, row in numbered], "line", digest, [number for number, _ in numbered])


def read_long_file(file: Path) -> Rows:
    """As :func:`read_file`, but the rows of a file above :data:`LONG` bytes stay on the disk, except a JSON array's.

    Raises:
        UserError: as for :func:`read_file`, here or when the rows are converted; or the library ``datasets`` is not
            installed, which reads what is made of the rows.
    """
    with _opened(file) as stream:
        if os.fstat(stream.fileno()).st_size <= LONG or file.suffix == ".json":
            return read_file(file)
        if file.suffix != ".parquet":
            datasets_library()
            return Rows(str(file), StoredRows(file, _LINE_PARSERS[file.suffix]), "line")
        digest = hashlib.sha256()
        while part := stream.read(2**20):
            digest.update(part)
    sha256 = digest.hexdigest()
    return Rows(str(file), stored_parquet(file, sha256), sha256=sha256)


_LINE_PARSERS = {".csv": parse_csv, ".jsonl": parse_json_lines}


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    if file.suffix not in SUFFIXES:
        raise UserError(f"data: {str(file)!r} should end in one of {', '.join(SUFFIXES)}.")
    try:
        if file.exists() and not file.is_file():  # reading a pipe could wait for ever
            raise UserError(f"data: {str(file)!r} is not a file.")
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        raise UserError(f"data: {str(file)!r} cannot be read: {error.strerror}.") from error


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
    return _hub_rows(f"{name}, split {split}", found)


def read_hub_splits(repository: str) -> dict[str, Rows]:
    """The rows of every split of a data set on the Hub or in a local folder.

    Raises:
        UserError: as for :func:`read_hub`.
    """
    found = _load(repository, repository)
    return {split: _hub_rows(f"{repository}, split {split}", rows) for split, rows in found.items()}


def _hub_rows(source: str, rows: Any) -> Rows:
    stored = rows.data.nbytes > LONG and rows.cache_files
    return Rows(source, rows if stored else list(rows))


def _files_of(rows: Any) -> str:
    """The files of a data set of the library ``datasets``, with their sizes and times."""
    files = [Path(file["filename"]) for file in rows.cache_files]
    return repr([(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def _load(what: str, *arguments: Any, **options: Any) -> Any:
    datasets = datasets_library()
    try:
        return datasets.load_dataset(*arguments, **options)
    except Exception as error:  # the library raises anything, from no network to an unknown split
        reason = one_line(error).rstrip(".") or type(error).__name__
        raise UserError(
            f"task.data: {what} cannot be loaded: {reason}; offline, give a folder: data=FOLDER."
        ) from error


def folder_of(data: str) -> Path:
    """The folder or file that ``task.data`` names; UserError if it does not exist."""
    path = user_path(data)
    if not os.path.exists(path):
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


def take(rows: Sequence[T], size: int | None, seed: int) -> Sequence[T]:
    """``size`` rows drawn by ``seed``, in their original order. None, or a size above the number of rows, gives all."""
    if size is None or size >= len(rows):
        return rows
    drawn: Sequence[T] = select(rows, sorted(random.Random(seed).sample(range(len(rows)), size)))
    return drawn


def divide(rows: Sequence[T], size: int, seed: int) -> tuple[Sequence[T], Sequence[T]]:
    """``size`` rows drawn by ``seed``, and the other rows, both in their original order."""
    chosen = set(random.Random(seed).sample(range(len(rows)), size))
    return select(rows, sorted(chosen)), _others(rows, chosen)


def _others(rows: Sequence[T], chosen: set[int]) -> Sequence[T]:
    others: Sequence[T] = select(rows, (i for i in range(len(rows)) if i not in chosen))
    return others


def validation_split(
    rows: Sequence[T], size: int, seed: int, key: str = "validation_size"
) -> tuple[Sequence[T], Sequence[T]]:
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
    return _others(rows, set(drawn)), select(rows, drawn)


def short(value: Any) -> str:
    """The value as Python writes it, for a message: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(row: dict[str, Any]) -> str:
    """The names of the fields. Quotes show spaces at the ends and invisible characters."""
    names = [name if name.isprintable() and name == name.strip() else repr(name) for name in map(str, row)]
    listed = ", ".join(names) or "none"
    return listed if len(listed) <= 200 else f"{listed[:197]}..."


HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, as from text that was cut inside an emoji."""
"""Half of a surrogate pair, as from text that was cut inside an emoji."""
_DEEPEST = 100


def _check_text(row: dict[str, Any]) -> None:
    """Check that all texts of a row can be encoded, and that its values can be walked.

    Raises:
        BadRow: a text holds half of a surrogate pair, or a value is nested too deeply.
    """
    for name, value in row.items():
        pending: list[tuple[Any, int]] = [(name, 0), (value, 0)]
        while pending:
            part, depth = pending.pop()
            if isinstance(part, str):
                if half := HALF.search(part):
                    raise BadRow(
                        f"field {name!r} holds {half[0]!r}, half of a surrogate pair, which is not valid text; "
                        "remove it."
                    )
            elif not isinstance(part, (dict, list, tuple)):
                continue
            elif depth == _DEEPEST:
                raise BadRow(f"field {name!r} is nested more than {_DEEPEST} levels deep.")
            else:
                parts = [*part, *part.values()] if isinstance(part, dict) else part
                pending += [(inner, depth + 1) for inner in parts if isinstance(inner, (str, dict, list, tuple))]
