"""What stays on the disk of data that are too long for memory, and the cache of what is made of them."""

from __future__ import annotations

import hashlib
import io
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pera.errors import UserError, one_line
from pera_lab.extras import missing_extra
from pera_lab.files import atomic_folder, lock_of, locked, make_cache
from pera_lab.tasks.formats import opened_parquet, parse_csv, split_lines


def datasets_library() -> Any:
    """The library ``datasets``, without progress bars of its own."""
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "data") from error
    datasets.disable_progress_bars()
    return datasets


def cached(digest: str, write: Callable[[Path], None]) -> Path:
    """A folder of the cache, which is ``pera`` in the cache of the library ``datasets``.

    The first process that needs the folder writes it, and others wait. It is moved to its place when it is complete.

    Args:
        digest: tells what the folder holds.
        write: writes the content into a new folder.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(datasets_library().config.HF_DATASETS_CACHE) / "pera" / digest[:32]
    if folder.is_dir():
        return folder
    make_cache(folder.parent, "HF_DATASETS_CACHE")
    with locked(lock_of(folder), folder, wait=True):
        if not folder.is_dir():
            with atomic_folder(folder) as partial:
                write(partial)
    return folder


def open_arrow(file: Path) -> Any:
    """The rows of an Arrow file in the cache, as a data set of the library ``datasets``; UserError if it is damaged."""
    try:
        return datasets_library().Dataset.from_file(str(file))
    except (OSError, ValueError) as error:
        raise damaged(file.parent, one_line(error).rstrip(".")) from error


def damaged(folder: Path, reason: str) -> UserError:
    """The error for a folder of the cache that cannot be read."""
    return UserError(f"{str(folder)!r} is damaged: {reason}; remove this folder.")


def stored_parquet(file: Path, sha256: str) -> Any:
    """The rows of a Parquet file, as a data set of the library ``datasets``.

    Raises:
        UserError: the file is not Parquet, repeats a column, or has a type that the library cannot read.
    """

    def write(folder: Path) -> None:
        import pyarrow

        with (
            opened_parquet(file, file) as opened,
            pyarrow.OSFile(str(folder / "rows.arrow"), "wb") as target,
            pyarrow.ipc.new_stream(target, opened.schema_arrow) as writer,
        ):
            for batch in opened.iter_batches(1000):
                writer.write_batch(batch)

    digest = hashlib.sha256(f"parquet {sha256}".encode()).hexdigest()
    return open_arrow(cached(digest, write) / "rows.arrow")


class StoredRows(Sequence[Any]):
    """The rows of a JSON Lines or CSV file, which are parsed when they are used. :meth:`scan` has to come first.

    In memory are two numbers for each row. The file stays open, so it can be replaced by another one.

    Args:
        file: the file.
        parse: :func:`parse_json_lines` or :func:`parse_csv`.
    """

    def __init__(self, file: Path, parse: Callable[..., Iterator[tuple[int, Any]]]) -> None:
        self._file, self.parse = file, parse
        self._stream = file.open("rb")
        self._state = self._stat()
        self._ends = array("q", [0])
        self._more: dict[str, Any] = {"first": False}
        self.numbers = array("q")
        """Number of the line that each row begins in."""
        self.sha256 = ""

    def scan(self) -> Iterator[tuple[int, Any]]:
        """Yield all rows with the numbers of their lines, while the file is read once.

        Raises:
            UserError: as for the parser.
        """
        digest, end = hashlib.sha256(), 0

        def lines() -> Iterator[bytes]:
            nonlocal end
            for line in split_lines(self._stream) if self.parse is parse_csv else self._stream:
                digest.update(line)
                end += len(line)
                yield line

        for number, row in self.parse(self._file, lines()):
            if not self.numbers and self.parse is parse_csv:
                self._more["header"] = list(row)
            self.numbers.append(number)
            self._ends.append(end)
            yield number, row
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        """The row at an index.

        Raises:
            UserError: the file changed in place.
        """
        start, end = self._ends[index], self._ends[index + 1]
        if self._stat() != self._state:
            raise UserError(f"{self._file} changed while it was read; run the command again.")
        self._stream.seek(start)
        content = io.BytesIO(self._stream.read(end - start))
        ((_, row),) = self.parse(self._file, content, **(self._more if index else {}))
        return row

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self._stream.fileno())
        return found.st_size, found.st_mtime_ns
