"""The expansions as the operator builds them: in place, block by block, in an order of their own.

A product B̂ Â is a sum over its K columns and rows, so their order is free as long as both have the same. Here the
products follow the distance of their rows, cyclically: (i, i + s mod r) for s = 0, the squares, then s = 1, 2, …
Each distance is one multiplication of the factor with itself, moved by s rows; all together are one with a view that
overlaps itself. So a whole expansion takes a few operations instead of a few for each row, and no gathers.

What is computed is what :mod:`pera.polynomial` states, which also serves where gradients of gradients or
``torch.compile`` need plain operations. Triton kernels, :mod:`pera.kernels`, take over on CUDA when switched on.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pera.errors import missing_extra
from pera.polynomial import (
    Normalization,
    Terms,
    check,
    coefficient_pairs,
    divisors,
    expanded_rank,
    squares_and_crosses,
    through_divisors,
    working,
)

_use_kernels = os.environ.get("PERA_KERNELS", "0") not in ("", "0")


def use_kernels(enabled: bool = True) -> None:
    """Switch the Triton kernels on or off, for tensors on CUDA; elsewhere they are never used.

    They are off at first, or on where the environment variable ``PERA_KERNELS`` is 1: nobody has yet measured that
    they are faster.

    Raises:
        UserError: Triton is not installed.
    """
    global _use_kernels
    if enabled:
        _require_triton()
    _use_kernels = enabled


def _require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise missing_extra("triton", "triton")


def _kernels(X: Tensor, normalization: Normalization) -> ModuleType | None:
    """The kernels, where they are switched on and know what is asked for."""
    if not _use_kernels or normalization == "centred" or not (X.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    _require_triton()
    from pera import kernels

    return kernels


class Distance(NamedTuple):
    """The products of rows i with rows i + ``apart``, for i < ``size``, the first of them being number ``start``."""

    apart: int
    start: int
    size: int


@lru_cache(maxsize=256)
def distances(r: int, terms: Terms) -> tuple[Distance, ...]:
    """The order of the products of ``r`` rows: each distance pairs every row with the one so far behind it, past
    the end from the front again; r / 2 pairs every row once and so has r / 2 products."""
    squares, crosses = squares_and_crosses(terms)
    apart = [0] * squares + [*range(1, r // 2 + 1)] * crosses
    counts = [r // 2 if 2 * s == r else r for s in apart]
    return tuple(Distance(s, sum(counts[:k]), counts[k]) for k, s in enumerate(apart))


@lru_cache(maxsize=256)
def pairs(r: int, terms: Terms) -> tuple[tuple[int, int], ...]:
    """The index pairs (i, j), counted from 0 and with i ≤ j, in the order of :func:`expansion`."""
    found = [(i, (i + s) % r) for s, _, count in distances(r, terms) for i in range(count)]
    return tuple((min(pair), max(pair)) for pair in found)


class _Positions(NamedTuple):
    of_h: Tensor
    """Where each product of this order stands in h."""
    in_order_of_h: Tensor
    """Where each entry of h stands in this order."""
    pairs: Tensor
    """The index pairs in this order, ``(count, 2)``."""


@lru_cache(maxsize=256)
def _positions(r: int, terms: Terms, device: torch.device) -> _Positions:
    in_h = {pair: position for position, pair in enumerate(coefficient_pairs(r, terms))}
    order = torch.tensor([in_h[pair] for pair in pairs(r, terms)], dtype=torch.long)
    indices = torch.tensor(pairs(r, terms), dtype=torch.long).reshape(-1, 2)
    return _Positions(order.to(device), order.argsort().to(device), indices.to(device))


def expansion(
    X: Tensor,
    h: Tensor | None,
    terms: Terms,
    normalization: Normalization,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """``scaling`` times :func:`pera.polynomial.expand`, its products in the order of :func:`pairs`.

    Computed in float32 or better and rounded once to ``dtype``. Not differentiable.

    Args:
        X: factor with one row for each rank, ``(r, d)``; B transposed need not be contiguous.
        h, terms, normalization: as for ``expand``.
        scaling: s = α / r for one of the two factors, 1 for the other.
        dtype: of the result.

    Returns:
        ``(K, d)``.

    Raises:
        UserError: as ``expand``.
    """
    X = working(X)
    check(X, h, terms, normalization)
    (r, d), weight = X.shape, _weight(h, X, terms, _divisors(X, terms, normalization), scaling)
    if (kernels := _kernels(X, normalization)) is not None:
        with torch.cuda.device_of(X):  # Triton launches on the current device
            return kernels.expansion(X, weight, pairs(r, terms), scaling, dtype)
    result = X.new_empty(expanded_rank(r, terms), d, dtype=dtype)
    torch.mul(X, scaling, out=result[:r])
    products, rounded = result[r:], dtype != X.dtype
    X = _twice(X, terms)
    for apart, start, count in distances(r, terms):
        left, right, into = X[:count], X[apart : apart + count], products[start : start + count]
        centred = normalization == "centred" and apart == 0
        if rounded:
            product = left * right
            torch.mul(_less_mean(product) if centred else product, _of(weight, start, count), out=into)
        else:
            torch.mul(left, right, out=into)
            if centred:
                _less_mean(into)
    if not rounded and (isinstance(weight, Tensor) or weight != 1):
        products *= weight
    return result


class Gradient(NamedTuple):
    """What :func:`fold_back` gives, float32 or better."""

    X: Tensor
    h: Tensor | None
    shares: Tensor | None
    """⟨gradient, value⟩ of each product, ``(count,)``. The same for Â and B̂, since both are the factors of ΔW."""


def fold_back(
    grad: Tensor,
    X: Tensor,
    h: Tensor | None,
    terms: Terms,
    normalization: Normalization,
    scaling: float,
    need_h: bool = False,
    shares: Tensor | None = None,
) -> Gradient:
    """The vector–Jacobian product of :func:`expansion`; the formula is that of :func:`pera.polynomial.expand_vjp`.

    Args:
        grad: gradient of the expansion, ``(K, d)``.
        X, h, terms, normalization, scaling: as given to :func:`expansion`.
        need_h: whether the gradient of h is wanted.
        shares: those of the other factor, which spares computing them.

    Returns:
        Gradient of X, ``(r, d)``; of h in the order of h, or None; and ``shares`` if they were needed.
    """
    X = working(X)
    r, divisor = len(X), _divisors(X, terms, normalization)
    weight = _weight(h, X, terms, divisor, scaling)
    need_inner = len(grad) > r and (need_h or (divisor is not None and shares is None))
    if (kernels := _kernels(X, normalization)) is not None:
        with torch.cuda.device_of(X):
            grad_X, inner = kernels.fold_back(grad, X, weight, pairs(r, terms), scaling, need_inner)
    else:
        grad_X, inner = _fold_back(grad, X, weight, terms, normalization, scaling, need_inner)
    if divisor is not None and len(grad) > r:
        if inner is not None:
            shares = weight.flatten() * inner  # type: ignore[union-attr]
        lost = through_divisors(X, shares, _positions(r, terms, X.device).pairs, normalization)  # type: ignore[arg-type]
        grad_X = grad_X.addcmul(X, lost, value=-1)
    if not need_h or h is None:
        return Gradient(grad_X, None, shares)
    if inner is None:  # no products
        return Gradient(grad_X, torch.zeros_like(h, dtype=X.dtype), None)
    c = inner if divisor is None else inner / divisor
    return Gradient(grad_X, scaling * c.index_select(0, _positions(r, terms, X.device).in_order_of_h), shares)


def _fold_back(
    grad: Tensor,
    X: Tensor,
    weight: Tensor | float,
    terms: Terms,
    normalization: Normalization,
    scaling: float,
    need_inner: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of X but for its share through ρ, and with ``need_inner`` ⟨G_ij, x_i ⊙ x_j⟩ for each product."""
    r = len(X)
    X = _twice(X, terms)
    toward = X.new_zeros(X.shape)  # what belongs to row i + s mod r is gathered in row i + s
    torch.mul(grad[:r].to(X.dtype), scaling, out=toward[:r])
    products, inner = grad[r:], []
    for apart, start, count in distances(r, terms):
        left, right, G = X[:count], X[apart : apart + count], products[start : start + count].to(X.dtype)
        if normalization == "centred" and apart == 0:
            G = G - G.mean(-1, keepdim=True)
        if need_inner:
            inner.append((left * right).mul_(G).sum(-1))
        value = 1.0
        if isinstance(weight, Tensor):
            G = G * _of(weight, start, count)
        else:
            value = weight
        toward[:count].addcmul_(G, right, value=value)
        toward[apart : apart + count].addcmul_(G, left, value=value)
    if len(X) > r:
        toward[: len(X) - r] += toward[r:]
    return toward[:r], torch.cat(inner) if need_inner else None


def _divisors(X: Tensor, terms: Terms, normalization: Normalization) -> Tensor | None:
    """Those of the products, in this order."""
    divisor = divisors(X, terms, normalization)
    if divisor is None or len(divisor) < 2:
        return divisor
    return divisor.index_select(0, _positions(len(X), terms, X.device).of_h)


def _less_mean(products: Tensor) -> Tensor:
    """In place, each row less its mean."""
    return products.sub_(products.mean(-1, keepdim=True))


def _weight(h: Tensor | None, X: Tensor, terms: Terms, divisor: Tensor | None, scaling: float) -> Tensor | float:
    """What each product is multiplied by, s h / ρ: a column ``(count, 1)`` or ``(1, 1)``, or one number for all."""
    s = scaling if divisor is None else (scaling / divisor).unsqueeze(-1)
    if h is None:
        return s
    weight = working(h).index_select(0, _positions(len(X), terms, X.device).of_h).unsqueeze(-1)
    return weight if isinstance(s, float) and s == 1 else weight * s


def _of(weight: Tensor | float, start: int, count: int) -> Tensor | float:
    """The part of a :func:`_weight` for some of the products."""
    return weight[start : start + count] if isinstance(weight, Tensor) and len(weight) > 1 else weight


def _twice(X: Tensor, terms: Terms) -> Tensor:
    """X, contiguous, with the rows behind it that products reach past its end: its first r / 2 again."""
    _, crosses = squares_and_crosses(terms)
    return torch.cat([X, X[: len(X) // 2]]) if crosses and len(X) > 1 else X.contiguous()
