"""What adapters cost by arithmetic alone: the lower bounds that measured ratios stand beside.

A layer with an m × n weight sees T tokens; its adapter multiplies by a factor of K rows and one of K columns (LoRA:
K = r). A product of a (p × q) and a (q × s) matrix counts 2pqs FLOPs. Frozen, the layer computes x Wᵀ, and the
gradient of x unless nothing before it is trained; the adapter adds two products forward and four backward:

    training     4Tmn                  + 6TK(m + n)
    forward      2Tmn                  + 2TK(m + n)
    merged       2Tmn

Expanding takes K(m + n) multiplications, thousands of times fewer than the rest, and is left out. Softmax, norms and
attention's own products are left out too: they are the same on both sides, so the bound is a little too high where
they weigh something.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Shape(NamedTuple):
    """A frozen weight ``(m, n)`` = (out, in), and the rank K of the adapter's factors on it, 0 without."""

    m: int
    n: int
    K: int = 0


def training_flops(shapes: Iterable[Shape], tokens: int) -> int:
    """Forward and backward."""
    return sum(4 * tokens * s.m * s.n + 6 * tokens * s.K * (s.m + s.n) for s in shapes)


def forward_flops(shapes: Iterable[Shape], tokens: int) -> int:
    """Forward, adapters not merged."""
    return sum(2 * tokens * s.m * s.n + 2 * tokens * s.K * (s.m + s.n) for s in shapes)


def forward_bytes(shapes: Iterable[Shape], tokens: int, size: int) -> int:
    """What a forward reads and writes at least, with ``size`` bytes a number: each operand once. With one token this
    decides, not the FLOPs: weights are read to be used once."""
    return sum(size * (s.m * s.n + s.K * (s.m + s.n) + tokens * (s.m + s.n + 2 * s.K)) for s in shapes)
