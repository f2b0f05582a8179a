"""Rows from the content of JSON, JSON Lines, CSV and Parquet files. Errors name the file and the line."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pera.errors import UserError, one_line
from pera_lab.extras import missing_extra


def parse_json_lines(file: Path, lines: Iterable[bytes], *, first: bool = True) -> Iterator[tuple[int, Any]]:
    """Yield the value of each line of a JSON Lines file with the number of the line. Blank lines are skipped.

    Args:
        file: the file, for messages.
        lines: its lines with their line ends, read as needed.
        first: whether the first of them is the first line of the file.

    Raises:
        UserError: a line is not UTF-8 text or not valid JSON.
    """
    for number, line in enumerate(_decoded(file, lines, first), 1):
        if line and not line.isspace():
            try:
                yield number, _DECODER.decode(line.removesuffix("\n"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}, line {number}: is not valid JSON ({_reason(error)}).") from error


def parse_json(file: Path, content: bytes) -> list[Any]:
    """The values of a JSON array.

    Raises:
        UserError: the content is not UTF-8 text, not valid JSON or not an array.
    """
    text = "".join(_decoded(file, io.BytesIO(content))).strip("\ufeff \t\r\n")
    if not text:
        return []
    if not text.startswith("["):
        raise UserError(f"{file}, line 1: should be an array of objects, [{{…}}, …].")
    try:
        rows: list[Any] = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: is not valid JSON ({_reason(error)}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}, row {_broken_row(text)}: is not valid JSON ({_reason(error)}).") from error
    return rows


def parse_csv(
    file: Path, lines: Iterable[bytes], *, first: bool = True, header: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV file by the names in its header, each with the number of the line that it begins in.

    Args:
        file: the file, for messages.
        lines: its lines with their line ends, read as needed.
        first: whether the first of them is the first line of the file.
        header: the names, if the lines do not begin with them.

    Raises:
        UserError: a line is not UTF-8 text or not CSV, a column is repeated, or a row has another number of fields than
            the header.
    """
    names = list(header)
    reader = csv.reader(_decoded(file, split_lines(lines), first), strict=True)
    end = 0
    for fields in _long_fields(file, reader):
        start, end = end + 1, reader.line_num
        if not fields:
            continue
        if not names:
            names = fields
            _check_names(f"{file}, line {start}", names)
        elif len(fields) != len(names):
            raise UserError(
                f"{file}, line {start}: has another number of fields ({len(fields)}) than the header ({len(names)})."
            )
        else:
            yield start, dict(zip(names, fields, strict=True))


def _long_fields(file: Path, reader: Any) -> Iterator[list[str]]:
    """The records of a reader, whose fields can be longer than the module's limit. The limit is kept."""
    while True:
        limit = csv.field_size_limit(2**31 - 1)  # a setting of the module; the default is 131,072
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num}: is not valid CSV ({error}).") from error
        finally:
            csv.field_size_limit(limit)
        if fields is None:
            return
        yield fields


def split_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a CSV file, which may also end with a carriage return alone."""
    for line in lines:
        if b"\r" in line:
            yield from filter(None, _LINE.findall(line))
        else:
            yield line


_LINE = re.compile(rb"[^\r]*(?:\r\n?|\Z)")


def parse_parquet(file: Path, content: bytes) -> list[dict[str, Any]]:
    """The rows of a Parquet file.

    Raises:
        UserError: pyarrow is not installed, the content is not Parquet, or a column is repeated.
    """
    with opened_parquet(file, io.BytesIO(content)) as opened:
        rows: list[dict[str, Any]] = opened.read().to_pylist()
    return rows


@contextmanager
def opened_parquet(file: Path, content: Any) -> Iterator[Any]:
    """Open the ``content`` of a Parquet file, or the file; UserError as for :func:`parse_parquet`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "data") from error
    try:
        with parquet.ParquetFile(content) as opened:
            _check_names(str(file), opened.schema_arrow.names)
            yield opened
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError) as error:
        if getattr(error, "errno", None):  # the disk, not the content
            raise
        raise UserError(f"data: {str(file)!r} is not a Parquet file: {one_line(error).rstrip('.')}.") from error


def _decoded(file: Path, lines: Iterable[bytes], first: bool = True) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        start = first and number == 1
        if start and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"{file}, line 1: is UTF-16 text; save the file as UTF-8.")
        try:
            text = line.decode("utf-8-sig" if start else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}, line {number}: is not UTF-8 text; save the file as UTF-8.") from error
        if "\0" in text:
            raise UserError(f"{file}, line {number}: holds a NUL character; save the file as UTF-8 text.")
        yield text


def _check_names(place: str, names: list[str]) -> None:
    """Check that no two columns have the same name, apart from spaces around it."""
    seen: set[str] = set()
    for name in names:
        if name.strip() in seen:
            raise UserError(f"{place}: has two columns named {name.strip()!r}; rename or remove one.")
        seen.add(name.strip())


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _broken_row(text: str) -> int:
    """Number of the first element of a JSON array that cannot be decoded."""
    row, position = 1, 1
    while True:
        start = re.compile(r"[\s,]*").match(text, position)
        try:
            _, position = _DECODER.raw_decode(text, start.end() if start else position)
        except (ValueError, RecursionError):
            return row
        row += 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the key {max(counts, key=lambda name: counts[name])!r} is given twice")
    return found


def _float(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"the number {digits:.20} is too large")
    return number


def _int(digits: str) -> int:
    try:
        return int(digits)
    except ValueError as error:
        raise ValueError(f"a number has {len(digits)} digits, which are too many") from error


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number; use null")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_int=_int, parse_constant=_constant)
