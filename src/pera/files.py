"""Writing to disk so that what was there stays whole until what comes is complete."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pera.errors import UserError


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
    """A temporary folder beside ``target`` that takes its place when the block ends without an error.

    Raises:
        UserError: ``target`` exists and is not an empty folder, or the disk refuses what is written.
    """
    require_free(target)
    target = target.absolute()
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


def require_free(target: Path) -> None:
    """Raise :class:`UserError` unless ``target`` is absent or an empty folder."""
    if target.is_dir():
        if any(target.iterdir()):
            raise UserError(f"output: {str(target)!r} exists and is not empty; give another folder or remove it.")
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


def cannot_write(path: Path, error: Exception) -> UserError:
    """The one sentence for a disk that refuses."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return UserError(f"output: {str(path)!r} cannot be written: {reason}; what was complete there is kept.")
