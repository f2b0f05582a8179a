"""Writing to disk so that what was there stays whole until what comes is complete."""

from __future__ import annotations

import hashlib
import json
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

from pera.errors import UserError

T = TypeVar("T")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the libraries raise when the disk refuses a write below ``path`` into one :class:`UserError`."""
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
    """A temporary folder beside ``target``, or what it links to, that takes its place when the block ends without an
    error.

    Raises:
        UserError: ``target`` exists and is not an empty folder, or the disk refuses what is written.
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
            for file in partial.rglob("*"):  # safetensors makes its files private
                file.chmod(file.stat().st_mode | partial.stat().st_mode & 0o444)
            if target.is_dir():
                target.rmdir()
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_free(target: Path, *, replaced: bool = True) -> None:
    """Raise :class:`UserError` unless ``target`` is absent or an empty folder, and, to be ``replaced`` by another as
    :func:`atomic_folder` does, no mount point."""
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
    """Write a file in one step, text as UTF-8: readers see the old content or the new, never a part."""
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
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not valid JSON ({error}); it may have been cut off.") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: as :func:`read_json`, or the file holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} should hold a JSON object, and holds {content!r:.40}; restore or remove it.")
    return content


def read_as(file: Path, kind: type[T]) -> T:
    """The content of a JSON file of a run as what it was written from, such as a dataclass.

    Raises:
        UserError: the file is missing, is not JSON, or holds something else.
    """
    return checked(read_json(file), kind, repr(str(file)))


def checked(content: Any, kind: type[T], name: str) -> T:
    """What was read from the file ``name`` as what it was written from; UserError if it holds something else."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise UserError(f"{name} is not as pera writes it ({where}: {first['msg']}).") from error


def json_line(value: dict[str, Any]) -> str:
    """One line of JSON, also for readers that take other characters than a newline for the end of a line. What JSON has
    no form for, such as a time, is written as text."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return re.sub("[\x85\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines up to a line that was cut off by a kill; none if there is no file."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            content = json.loads(line)
        except ValueError:
            break
        if isinstance(content, dict):
            lines.append(content)
    return lines


class Journal:
    """Results that are kept one by one, as they come, so that a restart makes only what is missing.

    The first line of the file says what the results depend on. A file that starts otherwise is begun anew.

    Args:
        path: the file of JSON lines; it is removed by :meth:`close`.
        key: what the results depend on.
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
        """Keep some results, by their index."""
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as f:
            f.writelines(json_line({"index": i, "row": row}) for i, row in rows.items())
        self.found.update(rows)

    def rows(self) -> list[dict[str, Any]]:
        """The results in their order."""
        return [self.found[i] for i in sorted(self.found)]

    def close(self) -> None:
        """Remove the file, once the results are kept elsewhere."""
        self.path.unlink(missing_ok=True)


def cannot_write(path: Path, error: Exception) -> UserError:
    """The one sentence for a disk that refuses."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return UserError(f"output: {str(path)!r} cannot be written: {reason}; what was complete there is kept.")
