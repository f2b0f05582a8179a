"""The arithmetic of adapters: lower bounds for the measured ratios.

A layer with an m × n weight processes T tokens. Its adapter multiplies by a factor with K rows and one with K columns
(LoRA: K = r). A product of a (p × q) and a (q × s) matrix counts 2pqs FLOPs. The frozen layer computes x Wᵀ and the
gradient of x. The adapter adds two products in the forward and four in the backward:

    training             4Tmn                  + 6TK(m + n)
    forward              2Tmn                  + 2TK(m + n)
    forward, merged      2Tmn
    merge and unmerge                            4Kmn + 2mn

The expansions take a few K(m + n) multiplications and are left out; in a short step they are not negligible. Softmax,
norms and attention scores are left out too. They cost the same with every adapter, so the bound is slightly too high.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Shape(NamedTuple):
    """A frozen weight ``(m, n)`` = (out, in), and the rank K of its adapter, 0 without one."""

    m: int
    n: int
    K: int = 0


def training_flops(shapes: Iterable[Shape], tokens: int) -> int:
    """Return the FLOPs of forward and backward."""
    return sum(4 * tokens * s.m * s.n + 6 * tokens * s.K * (s.m + s.n) for s in shapes)


def forward_flops(shapes: Iterable[Shape], tokens: int) -> int:
    """Return the FLOPs of a forward with adapters that are not merged."""
    return sum(2 * tokens * s.m * s.n + 2 * tokens * s.K * (s.m + s.n) for s in shapes)


def merging_flops(shapes: Iterable[Shape]) -> int:
    """Return the FLOPs of merging and unmerging: ΔW and its addition, twice."""
    return sum(4 * s.K * s.m * s.n + 2 * s.m * s.n for s in shapes if s.K)


def forward_bytes(shapes: Iterable[Shape], tokens: int, size: int) -> int:
    """Return the bytes a forward reads and writes at least, at ``size`` bytes per number: each operand once.

    This, not the FLOPs, limits a forward of one token, which reads every weight to use it once.
    """
    return sum(size * (s.m * s.n + s.K * (s.m + s.n) + tokens * (s.m + s.n + 2 * s.K)) for s in shapes)
