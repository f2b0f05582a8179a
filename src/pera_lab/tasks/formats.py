"""Rows from the content of JSON, JSON Lines, CSV and Parquet files. Errors name the file and the line."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from pera.errors import UserError, missing_extra, one_line


def parse_json_lines(file: Path, content: bytes) -> tuple[list[Any], list[int]]:
    """The values of a JSON Lines file and the numbers of their lines. Blank lines are skipped.

    Raises:
        UserError: the content is not UTF-8 text, or a line is not valid JSON.
    """
    rows, numbers = [], []
    for number, line in enumerate(_text(file, content).split("\n"), 1):
        if line and not line.isspace():
            try:
                rows.append(_DECODER.decode(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}, line {number}: is not valid JSON ({_reason(error)}).") from error
            numbers.append(number)
    return rows, numbers


def parse_json(file: Path, content: bytes) -> list[Any]:
    """The values of a JSON array.

    Raises:
        UserError: the content is not UTF-8 text, not valid JSON or not an array.
    """
    text = _text(file, content).strip("\ufeff \t\r\n")
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


def parse_csv(file: Path, content: bytes) -> tuple[list[dict[str, str]], list[int]]:
    """The rows of a CSV file by the names in its header, and the number of the line that each begins in.

    Raises:
        UserError: the content is not UTF-8 text or not CSV, a column is repeated, or a row has another number of fields
            than the header.
    """
    text = _text(file, content)
    rows: list[dict[str, str]] = []
    numbers: list[int] = []
    header: list[str] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(min(len(text) + 1, 2**31 - 1))  # a setting of the module; the default is 131,072
    try:
        end = 0
        for fields in reader:
            start, end = end + 1, reader.line_num
            if not fields:
                continue
            if not header:
                header = fields
                _check_names(f"{file}, line {start}", header)
            elif len(fields) != len(header):
                raise UserError(
                    f"{file}, line {start}: has another number of fields ({len(fields)}) than the header "
                    f"({len(header)})."
                )
            else:
                rows.append(dict(zip(header, fields, strict=True)))
                numbers.append(start)
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: is not valid CSV ({error}).") from error
    finally:
        csv.field_size_limit(limit)
    return rows, numbers


def parse_parquet(file: Path, content: bytes) -> list[dict[str, Any]]:
    """The rows of a Parquet file.

    Raises:
        UserError: pyarrow is not installed, the content is not Parquet, or a column is repeated.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "data") from error
    try:
        opened = parquet.ParquetFile(pyarrow.BufferReader(content))
        _check_names(str(file), opened.schema_arrow.names)
        rows: list[dict[str, Any]] = opened.read().to_pylist()
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError) as error:
        raise UserError(f"data: {str(file)!r} is not a Parquet file: {one_line(error).rstrip('.')}.") from error
    return rows


def _text(file: Path, content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{file}, line 1: is UTF-16 text; save the file as UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line}: is not UTF-8 text; save the file as UTF-8.") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{file}, line {line}: holds a NUL character; save the file as UTF-8 text.")
    return text


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
