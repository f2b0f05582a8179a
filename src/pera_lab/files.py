"""Files and folders that are replaced only by complete ones, and files that are read with clear errors."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from pera.errors import PeraError, UserError, one_line
from pera_lab import processes

T = TypeVar("T")


class InUse(UserError):
    """Another process writes to the same place."""


@contextmanager
def locked(file: Path, what: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock of the operating system while the block runs.

    The system releases the lock when the process ends, also by a kill. The empty lock file is removed at the end. The
    next holder takes over and removes one that a killed process left.

    Args:
        file: the lock file. Its folder must exist.
        what: what the lock protects, for the message.
        wait: wait for a process that holds the lock.

    Raises:
        InUse: another process holds the lock, and ``wait`` is False.
        UserError: the lock file cannot be written.
    """
    lock = FileLock(file, timeout=-1 if wait else 0)
    try:
        file.parent.stat()  # FileLock would create a missing folder
        lock.acquire()
    except Timeout as error:
        raise InUse(f"{str(what)!r} is in use by another process; wait until it ends, or stop it.") from error
    except (OSError, ValueError) as error:
        raise cannot_write(what, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        lock.release()


@contextmanager
def reserved(target: Path) -> Iterator[None]:
    """Keep other processes from writing the file or folder ``target`` while the block runs.

    Missing parents are created. Those that are still empty at the end are removed.

    Raises:
        InUse: another process holds ``target``.
        UserError: nothing can be written at ``target``.
    """
    check_output(target)
    place = target.resolve()
    made = [folder for folder in place.parents if not folder.exists()]
    with disk_errors(target):
        place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locked(_beside(place, ".", ".reserved-"), target):  # write_atomic has a lock of its own
            yield
    finally:
        remove_empty(made)


def remove_empty(folders: Collection[Path]) -> None:
    """Remove the folders that are empty, in the given order."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _beside(path: Path, before: str, after: str) -> Path:
    """A path next to ``path`` for something that pera makes while it writes ``path``.

    It follows from the name of ``path``, so that the next call finds what a killed process left. It ends in a digest,
    which tells it from a file of the user.
    """
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    name = f"{before}{path.name}{after}{digest}"
    return path.with_name(name if len(os.fsencode(name)) <= 255 else f"{before}{after}{digest}")


def lock_of(path: Path) -> Path:
    """The lock file next to ``path``."""
    return _beside(path, ".", ".lock-")


def unfinished(path: Path) -> Path:
    """The file in which :func:`write_atomic` prepares the next content of ``path``."""
    return _beside(path, ".", ".")


def check_output(path: Path) -> None:
    """Check that a file or folder could be written at ``path``, before anything is done for it.

    Raises:
        UserError: the name is too long or holds a NUL, a parent is a file, links form a loop, or a parent must not be
            written to.
    """
    if not path.absolute().name:
        raise UserError(f"output: {str(path)!r} cannot be written: it has no name; give another path.")
    try:
        with suppress(FileNotFoundError):
            path.stat()
        parent = next(folder for folder in (path.absolute().parent, *path.absolute().parents) if folder.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:
        raise UserError(f"output: {str(path)!r} cannot be written: {_reason(error)}; give another path.") from error


def user_path(name: str) -> Path:
    """``name`` as a path, with ``~`` replaced by the home folder where there is one.

    A user's text can be too long for a file name or hold characters that no file name has. ``os.path.isdir`` and the
    like then return False, while the methods of :class:`~pathlib.Path` raise.
    """
    try:
        return Path(os.path.expanduser(name))
    except ValueError:  # a null byte or a lone surrogate after "~"
        return Path(name)


def is_text(name: str) -> bool:
    """Whether the bytes of a file name are UTF-8. In Python, other bytes become lone surrogates."""
    try:
        return bool(os.fsencode(name).decode())
    except UnicodeError:
        return False


def check_folder_name(name: str) -> None:
    """Raise UserError if the ``name`` of a recipe or study cannot begin the name of its output folder."""
    too_long = len(name.encode(errors="replace")) > 200  # numbers, such as the time, are appended
    if not name.strip(".") or too_long or not is_text(name) or set(name) & set("/\\\0"):
        raise UserError(f"name={name[:60]!r} cannot be the name of a folder; change it or give --output.")


def check_output_file(path: Path) -> None:
    """:func:`check_output` of a file that may exist and is replaced; a folder is refused too."""
    check_output(path)
    if path.is_dir():
        raise UserError(f"output: {str(path)!r} is a folder; give a file.")
    if path.exists() and not path.is_file():
        raise UserError(f"output: {str(path)!r} is not an ordinary file; give another file.")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors that the libraries raise when a write below ``path`` fails into one :class:`UserError`."""
    try:
        yield
    except PeraError:
        raise
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and not _FAILED_WRITE.search(str(error)):
            raise
        raise cannot_write(path, error) from error


_FULL = re.compile(r"No space left on device|\d+ requested and \d+ written")  # the second is NumPy's
_FAILED_WRITE = re.compile(f"{_FULL.pattern}|Disk quota exceeded|PytorchStreamWriter|inline_container")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``target`` when the block ends without an error.

    The temporary folder is created next to ``target``, or next to the folder that ``target`` links to. The name of
    ``target`` decides its name, so that the next call removes what a killed process left. The caller keeps other
    processes away, with :func:`reserved` or :func:`locked`.

    Raises:
        UserError: ``target`` exists and is not an empty folder, or a file cannot be written.
    """
    require_free(target)
    target = target.resolve()
    partial = _beside(target, "", ".partial-")
    try:
        shutil.rmtree(partial, ignore_errors=True)
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


def require_free(target: Path, *, replaced: bool = True, ignored: Collection[Path] = ()) -> None:
    """Check that ``target`` does not exist or is an empty folder.

    Args:
        target: the output folder.
        replaced: whether another folder will replace it, as in :func:`atomic_folder`. A mount point and the current
            folder are then errors.
        ignored: files in the folder that do not count.

    Raises:
        UserError: ``target`` is not free, cannot be written, or its name is not text.
    """
    check_output(target)
    if not is_text(str(target)):  # safetensors reads no such path
        raise UserError(f"output: {str(target)!r} is not UTF-8, so no model could be loaded from it; rename it.")
    if target.is_dir():
        if set(target.iterdir()) - set(ignored):
            raise UserError(f"output: {str(target)!r} exists and is not empty; give another folder or remove it.")
        if replaced and os.path.ismount(target.resolve()):
            raise UserError(
                f"output: {str(target)!r} is a mount point, which cannot be replaced; give a folder inside it."
            )
        if replaced and target.resolve() == Path.cwd():
            raise UserError(f"output: {str(target)!r} is the current folder; give a folder inside it.")
    elif target.exists():
        raise UserError(f"output: {str(target)!r} is a file; give a folder.")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: readers see the old or the new content, never a part.

    Text is written as UTF-8. A byte of a file name that is not UTF-8 is written as its code, such as \\udcff.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    with locked(lock_of(path), path, wait=True):
        _replace(path, data)


def _replace(path: Path, data: bytes) -> None:
    partial = unfinished(path)
    with disk_errors(path):
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """:func:`write_atomic` of ``value`` as indented JSON."""
    write_atomic(path, _indented(value))


def _indented(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@contextmanager
def updated_object(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the object in a JSON file, empty if there is no file, and write it when the block ends without an error.

    Other processes that update the file wait, so that no update is lost.
    """
    with locked(lock_of(path), path, wait=True):
        content = read_object(path) if path.is_file() else {}
        yield content
        _replace(path, _indented(content).encode())


def refuse_pipe(path: Path) -> None:
    """Raise UserError if ``path`` is a pipe, because reading one could wait for ever."""
    if path.is_fifo():
        raise UserError(f"{str(path)!r} is a pipe, not a file; restore or remove it.")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    refuse_pipe(path)
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

    The first line of the file is a hash of what the results depend on. If it differs, the file is discarded. As a
    context manager, it leaves no file behind if the block fails before the first result.

    With several processes, each adds the results of all, and the main process writes the file.

    Args:
        path: the JSON-lines file. :meth:`close` removes it.
        key: everything that the results depend on.
    """

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[int, dict[str, Any]]
        self.found, self._made = processes.on_main(lambda: self._open(key))

    def _open(self, key: dict[str, Any]) -> tuple[dict[int, dict[str, Any]], list[Path]]:
        """The results in the file, and the folders that are made for it."""
        path = self.path
        head = {"key": hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}
        check_journal(path)
        lines = read_lines(path)
        kept = lines[1:] if lines[:1] == [head] else []
        found = {x["index"]: x["row"] for x in kept if {"index", "row"} <= x.keys()}
        made = [] if path.parent.exists() else [path.parent]
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        content: list[dict[str, Any]] = [head, *({"index": i, "row": row} for i, row in found.items())]
        write_atomic(path, "".join(map(json_line, content)))
        return found, made

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and not self.found and processes.is_main():
            self.close()
            remove_empty(self._made)

    def add(self, rows: dict[int, dict[str, Any]]) -> None:
        """Save results by their index."""
        if processes.is_main():
            with disk_errors(self.path), self.path.open("a", encoding="utf-8") as f:
                f.writelines(json_line({"index": i, "row": row}) for i, row in rows.items())
        self.found.update(rows)

    def rows(self) -> list[dict[str, Any]]:
        """The results in the order of their indices."""
        return [self.found[i] for i in sorted(self.found)]

    def close(self) -> None:
        """Remove the file. The main process calls it when the results are saved elsewhere."""
        self.path.unlink(missing_ok=True)


def check_journal(path: Path) -> None:
    """Raise UserError if ``path`` exists but is no file of a :class:`Journal`, which would replace it."""
    lines = read_lines(path)
    if os.path.lexists(path) and not (lines and set(lines[0]) == {"key"}):
        raise UserError(f"output: {str(path)!r} exists and was not written by pera; rename it or write elsewhere.")


def make_cache(folder: Path, variable: str) -> None:
    """Create a folder for caches unless it is there.

    Args:
        folder: the folder.
        variable: the environment variable that puts it elsewhere.

    Raises:
        UserError: the folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"the cache {str(folder)!r} cannot be written: {error.strerror}; set {variable} to another folder."
        ) from error


def cannot_write(path: Path, error: Exception) -> UserError:
    """The error for a path that cannot be written."""
    reason = _reason(error)
    return UserError(f"output: {str(path)!r} cannot be written: {reason}; the files that were complete are kept.")


def _reason(error: Exception) -> str:
    if _FULL.search(str(error)):
        return "No space left on device"
    return getattr(error, "strerror", None) or one_line(error)
