"""Files and folders that are replaced only by complete ones, and files that are read with clear errors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from pera.errors import UserError, one_line

T = TypeVar("T")


def user_path(name: str) -> Path:
    """``name`` as a path, with ``~`` replaced by the home folder where there is one.

    A user's text can be too long for a file name or hold characters that no file name has. ``os.path.isdir`` and the
    like then return False, while the methods of :class:`~pathlib.Path` raise.
    """
    try:
        return Path(os.path.expanduser(name))
    except ValueError:  # a null byte or a lone surrogate after "~"
        return Path(name)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors that the libraries raise when a write below ``path`` fails into one :class:`UserError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise cannot_write(path, error) from error


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``target`` when the block ends without an error.

    The temporary folder is created next to ``target``, or next to the folder that ``target`` links to.

    Raises:
        UserError: ``target`` exists and is not an empty folder, or a file cannot be written.
    """
    require_free(target)
    target = target.resolve()
    try:
        partial = target.with_name(f"{target.name}.partial-{uuid.uuid4().hex[:8]}")
        partial.mkdir(parents=True)
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        with disk_errors(target):
            yield partial
            for file in partial.rglob("*"):  # safetensors creates files that only their owner can read
                file.chmod(file.stat().st_mode | partial.stat().st_mode & 0o444)
            if target.is_dir():
                target.rmdir()
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_free(target: Path, *, replaced: bool = True) -> None:
    """Check that ``target`` does not exist or is an empty folder.

    Args:
        target: the output folder.
        replaced: whether another folder will replace it, as in :func:`atomic_folder`. A mount point is then an error.

    Raises:
        UserError: ``target`` is not free.
    """
    if target.is_dir():
        if any(target.iterdir()):
            raise UserError(f"output: {str(target)!r} exists and is not empty; give another folder or remove it.")
        if replaced and os.path.ismount(target.resolve()):
            raise UserError(
                f"output: {str(target)!r} is a mount point, which cannot be replaced; give a folder inside it."
            )
    elif target.exists():
        raise UserError(f"output: {str(target)!r} is a file; give a folder.")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: readers see the old or the new content, never a part. Text is written as UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    with disk_errors(path):
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """:func:`write_atomic` of ``value`` as indented JSON."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not valid JSON ({error}); it may be truncated.") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text. Integers beyond 64 bits become floats, so that no arithmetic overflows on them.

    Raises:
        ValueError: the text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 19 else float(digits))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def number_or_nan(value: Any) -> float:
    """The value if it is a number, else NaN."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: as :func:`read_json`, or the file does not hold an object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} should hold a JSON object but holds {content!r:.40}; restore or remove it.")
    return content


def read_as(file: Path, kind: type[T]) -> T:
    """The content of a JSON file as the type that it was written from, such as a dataclass.

    Raises:
        UserError: the file is missing, is not JSON, or does not match the type.
    """
    return checked(read_json(file), kind, repr(str(file)))


def checked(content: Any, kind: type[T], name: str) -> T:
    """Convert the content of a file to the type that it was written from.

    Args:
        content: what was read.
        kind: the type, such as a dataclass.
        name: the file's name in messages.

    Raises:
        UserError: the content does not match the type.
    """
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise UserError(f"{name} is not a valid record ({where}: {first['msg']}); restore or remove it.") from error


def json_line(value: dict[str, Any]) -> str:
    """``value`` as one line of JSON.

    Unicode line separators are escaped, since some readers split lines at them. Values that JSON cannot represent, such
    as times, become strings.
    """
    text = json.dumps(value, ensure_ascii=False, default=str)
    return re.sub("[\x85\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSON-lines file, up to the first line that is not valid JSON; empty if there is no file.

    A kill truncates the line that was being written. Lines after a broken one are not trusted.
    """
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            content = parse_json(line)
        except ValueError:
            break
        if isinstance(content, dict):
            lines.append(content)
    return lines


class Journal:
    """Results that are saved as they arrive, so that a restart computes only the missing ones.

    The first line of the file is a hash of what the results depend on. If it differs, the file is discarded.

    Args:
        path: the JSON-lines file. :meth:`close` removes it.
        key: everything that the results depend on.
    """

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path = path
        head = {"key": hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}
        lines = read_lines(path)
        kept = lines[1:] if lines[:1] == [head] else []
        self.found: dict[int, dict[str, Any]] = {x["index"]: x["row"] for x in kept if {"index", "row"} <= x.keys()}
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        content: list[dict[str, Any]] = [head, *({"index": i, "row": row} for i, row in self.found.items())]
        write_atomic(path, "".join(map(json_line, content)))

    def add(self, rows: dict[int, dict[str, Any]]) -> None:
        """Save results by their index."""
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as f:
            f.writelines(json_line({"index": i, "row": row}) for i, row in rows.items())
        self.found.update(rows)

    def rows(self) -> list[dict[str, Any]]:
        """The results in the order of their indices."""
        return [self.found[i] for i in sorted(self.found)]

    def close(self) -> None:
        """Remove the file. Call it when the results are saved elsewhere."""
        self.path.unlink(missing_ok=True)


def cannot_write(path: Path, error: Exception) -> UserError:
    """The error for a path that cannot be written."""
    reason = getattr(error, "strerror", None) or one_line(error)
    return UserError(f"output: {str(path)!r} cannot be written: {reason}; the files that were complete are kept.")
