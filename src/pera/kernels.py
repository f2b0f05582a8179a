"""Triton kernels for :mod:`pera.expansion`: an expansion, and its gradient folded back, in one pass each.

A program has some columns of the factor in its registers, r rows of them, and goes through the r² pairs of rows, one
row i at a time. :func:`expansion` writes each product once, weighted and rounded. :func:`fold_back` reads the
gradient of each product for both of its rows; the second time it comes from a cache near by. Sums over columns are
left as one part for each program and added up afterwards, so that results do not depend on the order of programs.

Products stand in the order of :func:`pera.expansion.pairs`. Without a GPU the kernels run in Triton's interpreter,
``TRITON_INTERPRET=1``, which is how they are tested.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 128
"""Columns of a program."""


def expansion(
    X: Tensor, weight: Tensor | float, pairs: tuple[tuple[int, int], ...], scaling: float, dtype: torch.dtype
) -> Tensor:
    """s times the rows of X ``(r, d)``, then weight · x_i ⊙ x_j for each pair.

    Args:
        X: float32 or float64, of any strides.
        weight: a column ``(len(pairs), 1)``, or one number.
        pairs: the index pairs.
        scaling: s.
        dtype: of the result.

    Returns:
        ``(r + len(pairs), d)``.
    """
    r, d = X.shape
    result = X.new_empty(r + len(pairs), d, dtype=dtype)
    if d:
        _expansion[(triton.cdiv(d, COLUMNS),)](
            X,
            _column(weight, X, len(pairs)),
            _numbers(r, pairs, X.device),
            result,
            scaling,
            *X.stride(),
            *result.stride(),
            d=d,
            r=r,
            rows=triton.next_power_of_2(r),
            columns=COLUMNS,
        )
    return result


def fold_back(
    grad: Tensor,
    X: Tensor,
    weight: Tensor | float,
    pairs: tuple[tuple[int, int], ...],
    scaling: float,
    need_inner: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of X, weights taken as constants, from that of :func:`expansion`.

    Args:
        grad: ``(r + len(pairs), d)``, of any floating dtype.
        X, weight, pairs, scaling: as given to :func:`expansion`.
        need_inner: whether the second result is wanted.

    Returns:
        The gradient ``(r, d)``, and ⟨G_ij, x_i ⊙ x_j⟩ for each pair, ``(len(pairs),)``, or None; in the dtype of X.
    """
    r, d = X.shape
    programs = triton.cdiv(d, COLUMNS)
    grad_X = X.new_empty(r, d)
    parts = X.new_zeros(programs, len(pairs)) if need_inner else X.new_empty(0, 0)
    if d:
        _fold_back[(programs,)](
            grad,
            X,
            _column(weight, X, len(pairs)),
            _numbers(r, pairs, X.device),
            grad_X,
            parts,
            scaling,
            *grad.stride(),
            *X.stride(),
            *grad_X.stride(),
            parts.stride(0),
            d=d,
            r=r,
            rows=triton.next_power_of_2(r),
            columns=COLUMNS,
            need_inner=need_inner,
        )
    return grad_X, parts.sum(0) if need_inner else None


def _column(weight: Tensor | float, X: Tensor, count: int) -> Tensor:
    return torch.as_tensor(weight, dtype=X.dtype, device=X.device).flatten().expand(count).contiguous()


@lru_cache(maxsize=256)
def _numbers(r: int, pairs: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Which product belongs to rows i and j, ``(r, r)``; −1 where there is none."""
    numbers = torch.full((r, r), -1, dtype=torch.int32)
    for number, (i, j) in enumerate(pairs):
        numbers[i, j] = numbers[j, i] = number
    return numbers.to(device)


@triton.jit
def _expansion(
    X,
    weight,
    numbers,
    result,
    scaling,
    X_row,
    X_column,
    result_row,
    result_column,
    d: tl.constexpr,
    r: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    j = tl.arange(0, rows)
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    inside = (j[:, None] < r) & (column[None, :] < d)
    x = tl.load(X + j[:, None] * X_row + column[None, :] * X_column, mask=inside, other=0.0)
    tl.store(result + j[:, None] * result_row + column[None, :] * result_column, x * scaling, mask=inside)
    for i in range(r):
        x_i = tl.load(X + i * X_row + column * X_column, mask=column < d, other=0.0)
        number = tl.load(numbers + i * r + j, mask=(j >= i) & (j < r), other=-1)
        w = tl.load(weight + number, mask=number >= 0, other=0.0)
        into = result + (r + number)[:, None] * result_row + column[None, :] * result_column
        tl.store(into, x * x_i[None, :] * w[:, None], mask=(number >= 0)[:, None] & inside)


@triton.jit
def _fold_back(
    grad,
    X,
    weight,
    numbers,
    grad_X,
    parts,
    scaling,
    grad_row,
    grad_column,
    X_row,
    X_column,
    grad_X_row,
    grad_X_column,
    parts_row,
    d: tl.constexpr,
    r: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    need_inner: tl.constexpr,
):
    j = tl.arange(0, rows)
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    inside = (j[:, None] < r) & (column[None, :] < d)
    x = tl.load(X + j[:, None] * X_row + column[None, :] * X_column, mask=inside, other=0.0)
    for i in range(r):
        number = tl.load(numbers + i * r + j, mask=j < r, other=-1)
        w = tl.load(weight + number, mask=number >= 0, other=0.0)
        w = tl.where(j == i, 2 * w, w)  # both rows of a square are row i
        g = tl.load(
            grad + (r + number)[:, None] * grad_row + column[None, :] * grad_column,
            mask=(number >= 0)[:, None] & inside,
            other=0.0,
        ).to(x.dtype)
        toward = g * x
        linear = tl.load(grad + i * grad_row + column * grad_column, mask=column < d, other=0.0).to(x.dtype)
        total = scaling * linear + tl.sum(toward * w[:, None], 0)
        tl.store(grad_X + i * grad_X_row + column * grad_X_column, total, mask=column < d)
        if need_inner:
            x_i = tl.load(X + i * X_row + column * X_column, mask=column < d, other=0.0)
            part = parts + tl.program_id(0) * parts_row + number
            tl.store(part, tl.sum(toward * x_i[None, :], 1), mask=(number >= 0) & (j >= i))
