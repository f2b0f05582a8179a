"""Frozen rows of random signs ("anchors"), drawn from a seed and the name of a layer.

A row is the same on every machine, device and version of torch, because its bits are a SHAKE-256 digest of a text and
no random number generator takes part. An adapter therefore stores the seed and no rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Anchors(NamedTuple):
    """The frozen rows of a layer, ±1 in int8. Anchor c multiplies the rows of A by v_c and the columns of B by u_c."""

    V: Tensor
    """``(k, in_features)``."""
    U_T: Tensor
    """``(k, out_features)``."""

    @property
    def k(self) -> int:
        """Number of anchors."""
        return len(self.V)

    @property
    def transposed(self) -> Anchors:
        """The anchors of the transposed update."""
        return Anchors(self.U_T, self.V)

    def to(self, device: torch.device) -> Anchors:
        """The anchors on a device."""
        return Anchors(self.V.to(device), self.U_T.to(device))


def draw_anchors(count: int, seed: int, name: str, rows: int, columns: int) -> Anchors | None:
    """Return the frozen rows of a layer, on the CPU; None for ``count`` 0.

    Row c depends on the other arguments and on c alone, so a larger ``count`` begins with the rows of a smaller one.

    Args:
        count: k, the number of anchors.
        seed: a whole number.
        name: the layer's name in the base model, without what torch.compile and other wrappers insert.
        rows: number of rows of ΔW.
        columns: number of columns of ΔW.
    """
    if not count:
        return None
    with torch.inference_mode(False):
        V, U_T = (
            torch.stack([_signs([seed, name, side, width, c], width) for c in range(count)])
            for side, width in (("in", columns), ("out", rows))
        )
    return Anchors(V, U_T)


def names_digest(names: Iterable[str]) -> str:
    """Return a digest of a set of names of layers, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(sorted(set(names))).encode()).hexdigest()[:32]


def _signs(key: list[int | str], width: int) -> Tensor:
    """Return one row, ``(width,)``: +1 where a bit of SHAKE-256(JSON of ``key``) is 0, lowest bit of a byte first."""
    digest = hashlib.shake_256(json.dumps(["pera.anchors", *key]).encode("ascii")).digest(-(-width // 8))
    octets = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    bits = octets.unsqueeze(1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device="cpu")).bitwise_and(1)
    return 1 - 2 * bits.flatten()[:width].to(torch.int8)
