r"""The algebra of PERA: polynomial expansion of low-rank factors (arXiv 2604.11841).

A low-rank update of a frozen weight W₀ ∈ ℝ^{m×n} has the factors B ∈ ℝ^{m×r} (columns b_i) and
A ∈ ℝ^{r×n} (rows a_i). PERA multiplies the columns of B with one another, and the rows of A, and
uses the products as further columns and rows:

.. math::

    \hat B = [\, b_i \mid (b_i ⊙ b_i)/ρ_B \mid (b_i ⊙ b_j)/ρ_B \,] ∈ ℝ^{m×K}, \qquad
    \hat A = [\, a_i ; h_{ii}(a_i ⊙ a_i)/ρ_A ; h_{ij}(a_i ⊙ a_j)/ρ_A \,] ∈ ℝ^{K×n}, \qquad
    ΔW = s \, \hat B \hat A

with i < j in lexicographic order, one coefficient h for every product, and a scale s. It is a LoRA
of rank K whose factors are polynomials of B and A.

``terms`` says which products take part ("square", "cross", "all", "none"; the last is LoRA).
``normalization`` is "none" (ρ = 1, as published) or "rms" (ρ = root mean square of the factor),
which gives a product the scale of one factor, so that ΔW scales with A and with B as LoRA's does. Columns of A, and
rows of B, that are all zero, such as those of tokens that were never seen, do not count in ρ.
"centred" is "rms" with squares less their mean over the row (column), (a_i ⊙ a_i − mean(a_i ⊙ a_i))/ρ_A: the squares
of different rows then have no large constant part in common. "column" divides by the geometric mean of the root mean
squares of the two columns (rows) alone, so that a small one is not drowned by the others.

All functions are pure. They compute in float32 or better, whatever the dtype of the factors. But for
:func:`expand_vjp`, factors may have leading dimensions, such as one for experts: each matrix by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from pera.errors import UserError, nearest

Terms = Literal["all", "square", "cross", "none"]
Coefficients = Literal["learned", "fixed"]
Normalization = Literal["none", "rms", "centred", "column"]

EPSILON = 1e-12
"""Lower bound of ρ, so that an all-zero factor has a finite expansion and gradient."""


_SQUARES_AND_CROSSES = {"all": (True, True), "square": (True, False), "cross": (False, True), "none": (False, False)}


def squares_and_crosses(terms: Terms) -> tuple[bool, bool]:
    """Whether the squares, and whether the crosses take part. Raises UserError for unknown ``terms``."""
    if terms not in _SQUARES_AND_CROSSES:
        raise UserError(f"terms={terms!r} is not known; {nearest(terms, _SQUARES_AND_CROSSES)}")
    return _SQUARES_AND_CROSSES[terms]


def coefficient_pairs(r: int, terms: Terms) -> list[tuple[int, int]]:
    """The index pairs (i, j), counted from 0, in the order of h: squares, then crosses lexicographically."""
    squares, crosses = squares_and_crosses(terms)
    return [(i, i) for i in range(r) if squares] + [(i, j) for i in range(r) for j in range(i + 1, r) if crosses]


def num_coefficients(r: int, terms: Terms) -> int:
    """Length of h: r(r+1)/2 for "all", r for "square", r(r−1)/2 for "cross", 0 for "none"."""
    squares, crosses = squares_and_crosses(terms)
    return squares * r + crosses * (r * (r - 1) // 2)


def expanded_rank(r: int, terms: Terms = "all") -> int:
    """K, the number of columns of B̂: r plus one for every product."""
    return r + num_coefficients(r, terms)


def fixed_coefficients(
    r: int, terms: Terms, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """The constant h of the published code: 1 for squares, 2 for crosses, so that the high-order part of
    "all" is exactly (BA) ⊙ (BA). Shape ``(num_coefficients,)``."""
    h = torch.full((num_coefficients(r, terms),), 2.0, dtype=dtype, device=device)
    if squares_and_crosses(terms)[0]:
        h[:r] = 1.0
    return h


def rms(X: Tensor) -> Tensor:
    """ρ(X) = sqrt(mean(X²) + ε²) over the entries of a factor ``(..., r, d)`` in columns that are not all zero,
    ε = 1e-12; of each row, ``(..., r)``, by :func:`rms_of_rows`. A scalar ``(...,)``, float32 or better."""
    return (_energies(X).mean(-1) / used_columns(X)).sqrt()


def rms_of_rows(X: Tensor) -> Tensor:
    """ρ(x_i) = sqrt(mean(x_i²) + ε²) over the columns of ``X`` that are not all zero, ``(..., r)``."""
    return (_energies(X) / used_columns(X).unsqueeze(-1)).sqrt()


def _energies(X: Tensor) -> Tensor:
    """d ρ(x_i)², with d the :func:`used_columns`, ``(..., r)``."""
    return working(X).square().sum(-1) + used_columns(X).unsqueeze(-1) * EPSILON**2


def used_columns(X: Tensor) -> Tensor:
    """How many columns of ``(..., r, d)`` are not all zero, at least 1."""
    return X.ne(0).any(-2).sum(-1).clamp(min=1)


def divisors(X: Tensor, terms: Terms, normalization: Normalization) -> Tensor | None:
    """What each product is divided by: ρ ``(1,)``, for "column" sqrt(ρ(x_i) ρ(x_j)) in the order of h,
    ``(num_coefficients,)``, or None for "none". Leading dimensions are kept."""
    if normalization == "none":
        return None
    if normalization != "column":
        return rms(X).unsqueeze(-1)
    rho = rms_of_rows(X)
    products = [rho[..., left] * rho[..., right] for left, right in _blocks(X.shape[-2], terms)]
    return torch.cat([rho[..., :0], *products], -1).sqrt()


def through_divisors(
    X: Tensor, shares: Tensor, pairs: Sequence[tuple[int, int]] | Tensor, normalization: Normalization
) -> Tensor:
    r"""How much of x_i its gradient loses by way of the :func:`divisors`.

    With s_kl = ⟨G_kl, row kl of the expansion⟩ and d the :func:`used_columns` this is \frac{\sum_{kl} s_{kl}}{r d ρ^2},
    for "column" \frac{\sum_j s_{ij}}{2 d ρ(x_i)^2} with a square counted twice.

    Args:
        X: factor, ``(r, d)``.
        shares: s, one for each product, ``(count,)``.
        pairs: the indices of each product, ``(count, 2)``.
        normalization: not "none".

    Returns:
        One number for all rows, or a column ``(r, 1)``.
    """
    shares, energies = shares.to(X.dtype), _energies(X)
    if normalization != "column":
        return shares.sum() / energies.sum()
    left, right = torch.as_tensor(pairs, device=X.device).unbind(1)
    of_rows = X.new_zeros(len(X)).index_add(0, left, shares).index_add(0, right, shares)
    return (of_rows / (2 * energies)).unsqueeze(1)


def expand(
    X: Tensor, h: Tensor | None, terms: Terms, normalization: Normalization, whole: Tensor | None = None
) -> Tensor:
    """Append the products of the rows of ``X`` to its rows.

    Args:
        X: factor with one row for each rank, ``(r, d)``: A itself, or B transposed.
        h: coefficients, ``(num_coefficients(r, terms),)``; None leaves the products as they are.
        terms: which products to append.
        normalization: each product is divided by its :func:`divisors`; "centred" also takes its mean over the row from
            each square.
        whole: the whole factor, when ``X`` is some of its columns: ρ and means are over all of them.

    Returns:
        ``(K, d)``, float32 or better: the rows x_i, then h_ij (x_i ⊙ x_j) / ρ in the order of h.

    Raises:
        UserError: unknown ``terms`` or ``normalization``, or h of another length than the terms need.
    """
    X = working(X)
    check(X, h, terms, normalization)
    blocks = _blocks(X.shape[-2], terms)
    if not blocks:
        return X
    whole = X if whole is None else working(whole)
    products = [X[..., left, :] * X[..., right, :] for left, right in blocks]
    if normalization == "centred" and squares_and_crosses(terms)[0]:
        products[0] = products[0] - whole.square().mean(-1, keepdim=True)
    factor = _factor(X, h, terms, normalization, whole)
    appended = torch.cat(products, -2)
    return torch.cat([X, appended if factor is None else appended * factor], -2)


def expand_vjp(
    grad: Tensor, X: Tensor, h: Tensor | None, terms: Terms, normalization: Normalization
) -> tuple[Tensor, Tensor | None]:
    r"""The vector–Jacobian product of :func:`expand`: fold a gradient of the expansion back.

    With G_ij the gradient of row h_ij (x_i ⊙ x_j)/ρ and c_ij = ⟨G_ij, x_i ⊙ x_j⟩/ρ,

    .. math::

        ∂h_{ij} = c_{ij}, \qquad
        ∂x_i = G_i + \sum_j \frac{h_{ij}}{ρ} G_{ij} ⊙ x_j \;(\text{twice for } j = i)
               - \frac{\sum_{kl} h_{kl} c_{kl}}{N ρ^2} x_i

    where N is the number of entries that count in ρ; the last term is that of :func:`through_divisors`. For
    "centred", G_ii is less its own mean over the row. Written in differentiable operations, so that it can be
    differentiated again.

    Args:
        grad: gradient of the expansion, ``(K, d)``.
        X, h, terms, normalization: as given to :func:`expand`.

    Returns:
        Gradient of X, ``(r, d)``, and of h (``None`` when h is), both float32 or better.
    """
    X, grad = working(X), working(grad)
    r = X.shape[0]
    grad_X = grad[:r].clone()
    if grad.shape[0] == r:
        return grad_X, None if h is None else h.new_zeros(h.shape)
    factor = _factor(X, h, terms, normalization)
    inner = []  # ⟨G_ij, x_i ⊙ x_j⟩, block by block, in the order of h
    start = r
    for rows, others in _blocks(r, terms):
        count = others.stop - others.start
        G = grad[start : start + count]
        if normalization == "centred" and rows == others:
            G = G - G.mean(1, keepdim=True)
        f = None if factor is None else factor[start - r : start - r + count]
        start += count
        left, right = X[rows], X[others]
        toward_left = G * right
        inner.append((toward_left * left).sum(1))
        toward_right = G * left
        if f is not None:
            toward_left, toward_right = toward_left * f, toward_right * f
        grad_X[rows] += toward_left.sum(0, keepdim=True) if rows.stop - rows.start == 1 else toward_left
        grad_X[others] += toward_right
    c = torch.cat(inner)
    if (divisor := divisors(X, terms, normalization)) is not None:
        c = c / divisor
        shares = c if h is None else h * c
        grad_X = grad_X - through_divisors(X, shares, coefficient_pairs(r, terms), normalization) * X
    return grad_X, None if h is None else c


def expand_A(A: Tensor, h: Tensor | None, terms: Terms = "all", normalization: Normalization = "none") -> Tensor:
    """Â = Poly2_H(A), eq. 7: ``(r, in_features)`` → ``(K, in_features)``."""
    return expand(A, h, terms, normalization)


def expand_B(B: Tensor, terms: Terms = "all", normalization: Normalization = "none") -> Tensor:
    """B̂ = Poly2(B), eq. 6: ``(out_features, r)`` → ``(out_features, K)``."""
    return expand(B.mT, None, terms, normalization).mT


def lora_factors(
    A: Tensor,
    B: Tensor,
    h: Tensor | None,
    terms: Terms = "all",
    normalization: Normalization = "none",
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The LoRA of rank K that equals this adapter exactly, with h, ρ and the scale folded in.

    Args:
        A: ``(r, in_features)``.
        B: ``(out_features, r)``.
        h: ``(num_coefficients(r, terms),)``; None for terms "none".
        terms, normalization: see the module.
        scaling: s = α / r.

    Returns:
        ``lora_A`` ``(K, in_features)`` and ``lora_B`` ``(out_features, K)`` with ΔW = lora_B @ lora_A.
    """
    return expand_A(A, h, terms, normalization), scaling * expand_B(B, terms, normalization)


def delta_weight(
    A: Tensor,
    B: Tensor,
    h: Tensor | None,
    terms: Terms = "all",
    normalization: Normalization = "none",
    scaling: float = 1.0,
) -> Tensor:
    """ΔW = s B̂ Â, eq. 9 (arguments as for :func:`lora_factors`). Shape ``(out_features, in_features)``."""
    lora_A, lora_B = lora_factors(A, B, h, terms, normalization, scaling)
    return lora_B @ lora_A


def working(X: Tensor) -> Tensor:
    """``X`` in the dtype the algebra is computed in: float64 stays, anything smaller becomes float32."""
    return X.to(torch.promote_types(X.dtype, torch.float32))


def check(X: Tensor, h: Tensor | None, terms: Terms, normalization: Normalization) -> None:
    """Raise UserError as :func:`expand` does."""
    known = get_args(Normalization)
    if normalization not in known:
        raise UserError(f"normalization={normalization!r} is not known; {nearest(normalization, known)}")
    *leading, r, _ = X.shape
    needed = num_coefficients(r, terms)
    if h is not None and tuple(h.shape) not in ((needed,), (*leading, needed)):
        raise UserError(f"h has shape {tuple(h.shape)}; r={r} and terms={terms!r} need ({needed},).")


def _blocks(r: int, terms: Terms) -> list[tuple[slice, slice]]:
    """Row slices (left, right) whose products, broadcast and in this order, are the terms in the order of h:
    all squares at once, then for each i the crosses of row i with the rows behind it."""
    squares, crosses = squares_and_crosses(terms)
    return [(slice(0, r), slice(0, r))] * squares + [(slice(i, i + 1), slice(i + 1, r)) for i in range(r - 1)] * crosses


def _factor(
    X: Tensor, h: Tensor | None, terms: Terms, normalization: Normalization, whole: Tensor | None = None
) -> Tensor | None:
    """What each product is multiplied by, h / ρ, as a column ``(num_coefficients, 1)``; None where that is 1."""
    if h is None and normalization == "none":
        return None
    factor = X.new_ones(num_coefficients(X.shape[-2], terms)) if h is None else working(h)
    if (divisor := divisors(X if whole is None else whole, terms, normalization)) is not None:
        factor = factor / divisor
    return factor.unsqueeze(-1)
