r"""The algebra of PERA: polynomial expansion of low-rank factors (arXiv 2604.11841).

A low-rank update of a frozen weight W₀ ∈ ℝ^{m×n} has the factors B ∈ ℝ^{m×r} with columns b_i and A ∈ ℝ^{r×n} with
rows a_i. PERA appends to B the element-wise products of its columns, and to A the products of its rows:

.. math::

    \hat B = [\, b_i \mid (b_i ⊙ b_i)/ρ_B \mid (b_i ⊙ b_j)/ρ_B \,] ∈ ℝ^{m×K}, \qquad
    \hat A = [\, a_i ; h_{ii}(a_i ⊙ a_i)/ρ_A ; h_{ij}(a_i ⊙ a_j)/ρ_A \,] ∈ ℝ^{K×n}, \qquad
    ΔW = s \, \hat B \hat A

for i < j in lexicographic order. Each product has one coefficient h. ΔW is a LoRA update of rank K whose factors are
polynomials of B and A.

``terms`` selects the products: "square", "cross", "all", or "none", which is LoRA.

``normalization`` is one of:

- "none": ρ = 1, as published.
- "rms": ρ is the root mean square of the factor. A product then has the scale of one factor, and ΔW scales with A and
  with B as in LoRA. Columns of A (rows of B) that are all zero do not count in ρ, such as the columns of tokens that
  never occurred.
- "centred": as "rms", and each square has its mean subtracted: (a_i ⊙ a_i − mean(a_i ⊙ a_i))/ρ_A. The squares of
  different rows then have no large constant part in common.

All functions are pure and compute in float32 or better, whatever the dtype of the factors. Factors may have leading
dimensions, such as one for experts; :func:`expand_backward` takes one factor at a time.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pera.errors import UserError, nearest

Terms = Literal["all", "square", "cross", "none"]
Coefficients = Literal["learned", "fixed"]
Normalization = Literal["none", "rms", "centred"]

EPSILON = 1e-12
"""Lower bound of ρ. It keeps the expansion and the gradient of an all-zero factor finite."""


_SQUARES_AND_CROSSES = {"all": (True, True), "square": (True, False), "cross": (False, True), "none": (False, False)}


def squares_and_crosses(terms: Terms) -> tuple[bool, bool]:
    """Return whether ``terms`` include squares, and whether they include crosses. Raises UserError if unknown."""
    if terms not in _SQUARES_AND_CROSSES:
        raise UserError(f"terms={terms!r} is not known; {nearest(terms, _SQUARES_AND_CROSSES)}")
    return _SQUARES_AND_CROSSES[terms]


def coefficient_pairs(r: int, terms: Terms) -> list[tuple[int, int]]:
    """Return the index pairs (i, j) of the products in the order of h: squares, then crosses lexicographically."""
    squares, crosses = squares_and_crosses(terms)
    return [(i, i) for i in range(r) if squares] + [(i, j) for i in range(r) for j in range(i + 1, r) if crosses]


def num_coefficients(r: int, terms: Terms) -> int:
    """Return the length of h: r(r+1)/2 for "all", r for "square", r(r−1)/2 for "cross", 0 for "none"."""
    squares, crosses = squares_and_crosses(terms)
    return squares * r + crosses * (r * (r - 1) // 2)


def expanded_rank(r: int, terms: Terms = "all") -> int:
    """Return K, the number of columns of B̂: r plus one for each product."""
    return r + num_coefficients(r, terms)


def fixed_coefficients(
    r: int, terms: Terms, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Return the constant h of the published code, ``(num_coefficients,)``: 1 for squares, 2 for crosses.

    The high-order part of "all" is then exactly (BA) ⊙ (BA).
    """
    h = torch.full((num_coefficients(r, terms),), 2.0, dtype=dtype, device=device)
    if squares_and_crosses(terms)[0]:
        h[:r] = 1.0
    return h


class Normalizer(NamedTuple):
    """The divisor ρ of the products of one factor. ``energy`` is N ρ², where N counts the entries ρ is taken over."""

    rho: Tensor
    energy: Tensor


def normalizer(X: Tensor) -> Normalizer:
    """Return ρ(X) = sqrt(mean(X²) + ε²) with ε = 1e-12, over the entries in columns that are not all zero.

    Args:
        X: factor, ``(..., r, d)``.

    Returns:
        ρ and N ρ², each of shape ``(...,)``, float32 or better.
    """
    X = working(X)
    used = X.abs().sum(-2).ne(0).sum(-1)  # sums, not any(): also right for a factor sharded over devices
    count = used.clamp(min=1) * X.shape[-2]
    energy = torch.add(X.square().sum((-2, -1)), count, alpha=EPSILON**2)
    return Normalizer((energy / count).sqrt(), energy)


def rms(X: Tensor) -> Tensor:
    """Return ρ of :func:`normalizer`, ``(..., r, d)`` → ``(...,)``."""
    return normalizer(X).rho


def expand(
    X: Tensor,
    h: Tensor | None,
    terms: Terms,
    normalization: Normalization,
    *,
    whole: Tensor | None = None,
    rho: Tensor | None = None,
) -> Tensor:
    """Append the products of the rows of ``X`` to its rows.

    The result has the rows x_i, then h_ij (x_i ⊙ x_j) / ρ in the order of h. "centred" subtracts the mean over the
    row from x_i ⊙ x_i.

    Args:
        X: factor with one row for each rank, ``(..., r, d)``: A, or B transposed.
        h: coefficients, ``(..., num_coefficients(r, terms))``; None means 1 for every product.
        terms: which products to append.
        normalization: what the products are divided by.
        whole: the whole factor, if ``X`` holds only some of its columns; ρ and the means are taken over it.
        rho: ρ of the whole factor, if it is already known.

    Returns:
        ``(..., K, d)``, float32 or better.

    Raises:
        UserError: ``terms`` or ``normalization`` is unknown, or h has the wrong length.
    """
    X = working(X)
    check(X, h, terms, normalization)
    r = X.shape[-2]
    if not num_coefficients(r, terms):
        return X
    X = X.contiguous()  # rows that lie apart are slow to gather
    left, right, *_ = _indices(X, terms)
    whole, divided = X if whole is None else working(whole), X
    if normalization != "none":
        divisor = (rms(whole) if rho is None else rho)[..., None, None]
        divided = X / divisor
    products = X.index_select(-2, left).mul_(divided.index_select(-2, right))
    if normalization == "centred" and squares_and_crosses(terms)[0]:
        means = whole.square().mean(-1, keepdim=True) / divisor
        products = torch.cat([products[..., :r, :] - means, products[..., r:, :]], -2)
    if h is not None:
        products = products * working(h).unsqueeze(-1)
    return torch.cat([X, products], -2)


def expand_backward(
    grad: Tensor,
    X: Tensor,
    terms: Terms,
    normalization: Normalization,
    *,
    known: Normalizer | None = None,
    inner: Tensor | None = None,
) -> Tensor:
    r"""Return the gradient of ``X`` from the gradient of ``expand(X, None, terms, normalization)``.

    With G_i and G_ij the gradients of the rows x_i and (x_i ⊙ x_j)/ρ,

    .. math::

        ∂x_i = G_i + \sum_j \frac{G_{ij} ⊙ x_j}{ρ} \;(\text{twice for } j = i) - \frac{c}{N ρ^2} x_i, \qquad
        c = \sum_{ij} \left\langle G_{ij}, \frac{x_i ⊙ x_j}{ρ} \right\rangle

    where the last term is the gradient through ρ. "centred" subtracts the mean over the row from G_ii. All operations
    are differentiable.

    Args:
        grad: gradient of the expansion, ``(K, d)``.
        X: factor, ``(r, d)``.
        terms, normalization: as for :func:`expand`.
        known: the :func:`normalizer` of X, if it is already computed.
        inner: c, if it is already computed.

    Returns:
        ``(r, d)``, float32 or better.
    """
    X, grad = working(X), working(grad)
    r = X.shape[0]
    if grad.shape[0] == r:
        return grad
    products = grad[r:]
    if normalization == "centred" and squares_and_crosses(terms)[0]:
        squares = products[:r] - products[:r].mean(-1, keepdim=True)
        products = torch.cat([squares, products[r:]])
    left, right, partners, selection = _indices(X, terms)
    linear, divided = grad[:r], X
    if normalization != "none":
        rho, energy = normalizer(X) if known is None else known
        divided = X / rho
        if inner is None:
            inner = (products * X.index_select(0, left) * divided.index_select(0, right)).sum()
        linear = linear - (inner / energy) * X
    toward = divided.index_select(0, partners)
    toward.view(2, *products.shape).mul_(products)
    return torch.addmm(linear, selection.to(X.dtype), toward)


def expand_A(A: Tensor, h: Tensor | None, terms: Terms = "all", normalization: Normalization = "none") -> Tensor:
    """Return Â = Poly2_H(A), eq. 7: ``(r, in_features)`` → ``(K, in_features)``."""
    return expand(A, h, terms, normalization)


def expand_B(B: Tensor, terms: Terms = "all", normalization: Normalization = "none") -> Tensor:
    """Return B̂ = Poly2(B), eq. 6: ``(out_features, r)`` → ``(out_features, K)``."""
    return expand(B.mT, None, terms, normalization).mT


def lora_factors(
    A: Tensor,
    B: Tensor,
    h: Tensor | None,
    terms: Terms = "all",
    normalization: Normalization = "none",
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the factors of the LoRA of rank K that equals this adapter exactly.

    Args:
        A: ``(r, in_features)``.
        B: ``(out_features, r)``.
        h: ``(num_coefficients(r, terms),)``; None for terms "none".
        terms, normalization: see the module.
        scaling: s = α / r.

    Returns:
        ``lora_A`` ``(K, in_features)`` and ``lora_B`` ``(out_features, K)``, with ΔW = lora_B @ lora_A. They contain
        h, ρ and s.
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
    """Return ΔW = s B̂ Â, eq. 9, ``(out_features, in_features)``. It takes the arguments of :func:`lora_factors`."""
    lora_A, lora_B = lora_factors(A, B, h, terms, normalization, scaling)
    return lora_B @ lora_A


def working(X: Tensor) -> Tensor:
    """Return ``X`` in the dtype of the computation: float64 stays, anything smaller becomes float32."""
    return X if X.dtype in (torch.float32, torch.float64) else X.float()


def check(X: Tensor, h: Tensor | None, terms: Terms, normalization: Normalization) -> None:
    """Raise UserError if ``terms`` or ``normalization`` is unknown, or h does not fit ``X``."""
    known = get_args(Normalization)
    if normalization not in known:
        raise UserError(f"normalization={normalization!r} is not known; {nearest(normalization, known)}")
    *leading, r, _ = X.shape
    needed = num_coefficients(r, terms)
    if h is not None and tuple(h.shape) not in ((needed,), (*leading, needed)):
        raise UserError(f"h has shape {tuple(h.shape)}; r={r} and terms={terms!r} need ({needed},).")


class _Indices(NamedTuple):
    """Which rows are multiplied, in the order of h."""

    left: Tensor
    right: Tensor
    partners: Tensor
    """``right``, then ``left``: the partners of the rows ``left``, then ``right``."""
    selection: Tensor
    """0/1 matrix ``(r, 2 · count)``. It sums the gradients of the rows ``left``, then ``right``, by row."""


_known_indices: dict[tuple[int, Terms, torch.device], _Indices] = {}


def _indices(X: Tensor, terms: Terms) -> _Indices:
    """Return the indices for a factor ``(..., r, d)``, from an earlier call unless this one is traced."""
    key = (X.shape[-2], terms, X.device)
    found = None if torch.compiler.is_compiling() else _known_indices.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = _make_indices(*key)
        if not torch.compiler.is_compiling():
            found = _Indices(*(torch.func.debug_unwrap(t) for t in found))
            if all(type(t) is Tensor for t in found):  # no fake tensors
                _known_indices[key] = found
    if hasattr(X, "device_mesh"):  # a DTensor, which only DTensors can index
        sharded: Any = type(X)
        found = _Indices(*(sharded.from_local(t, X.device_mesh) for t in found))
    return found


def _make_indices(r: int, terms: Terms, device: torch.device) -> _Indices:
    left, right = torch.tensor(coefficient_pairs(r, terms), device=device).unbind(1)
    selection = torch.nn.functional.one_hot(torch.cat([left, right]), r).T.to(torch.float32)
    return _Indices(left, right, torch.cat([right, left]), selection)
