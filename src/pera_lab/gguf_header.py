"""The header of a GGUF file, checked before a library reads the file."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from pera.errors import UserError

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by the number of its type."""
_STRING, _ARRAY = 8, 9

MOST_VALUES = 1 << 21
"""Most values in all arrays of a header. A tokenizer of 262,144 tokens has about 1,300,000."""
MOST_TENSORS = 1 << 16


def check_header(file: Path) -> None:
    """Check that the header of a GGUF file is complete and its counts are plausible.

    The libraries trust the header: gguf loops over a count of 2⁶⁴ values and fills the memory, and llama.cpp may end
    the process.

    Raises:
        UserError: the file cannot be read, or its header is broken.
    """
    try:
        with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).check()
    except (OSError, ValueError) as error:
        raise UserError(f"{str(file)!r} is not a complete GGUF file: {error}") from error


class _Header:
    """A position in the bytes of a GGUF file. Every method raises ValueError if the file ends or makes no sense."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._order, self._values = data, 0, "<", 0

    def check(self) -> None:
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'.")
        (version,) = struct.unpack("<I", self._take(4))
        if version & 0xFFFF == 0:  # written on a machine with the other byte order
            self._order, version = ">", version >> 24
        if version not in (2, 3):
            raise ValueError(f"its version {version} is unknown; known: 2 and 3.")
        tensors, entries = self._number("Q"), self._number("Q")
        if tensors > MOST_TENSORS:
            raise ValueError(f"it claims {tensors} tensors; at most {MOST_TENSORS} are read.")
        for _ in range(entries):
            self._take(self._number("Q"))
            self._skip(self._number("I"))
        for _ in range(tensors):
            self._take(self._number("Q"))
            if (dimensions := self._number("I")) > 4:
                raise ValueError(f"a tensor has {dimensions} dimensions; at most 4 are read.")
            sides = [self._number("Q") for _ in range(dimensions)]
            self._number("I")
            if max([self._number("Q"), *sides]) >= 1 << 40:
                raise ValueError("a tensor is larger than any file.")

    def _skip(self, kind: int, *, nested: bool = False) -> None:
        """Pass over a value."""
        if kind in _SIZES:
            self._take(_SIZES[kind])
        elif kind == _STRING:
            self._take(self._number("Q"))
        elif kind == _ARRAY and not nested:
            inner, count = self._number("I"), self._number("Q")
            self._values += count
            if self._values > MOST_VALUES:
                raise ValueError(f"its arrays claim {self._values} values; at most {MOST_VALUES} are read.")
            for _ in range(count):
                self._skip(inner, nested=True)
        else:
            raise ValueError(f"it holds a value of the unknown type {kind}.")

    def _number(self, code: str) -> int:
        (number,) = struct.unpack(self._order + code, self._take(struct.calcsize(code)))
        return int(number)

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise ValueError("it ends within its header.")
        self._at += size
        return self._data[self._at - size : self._at]
