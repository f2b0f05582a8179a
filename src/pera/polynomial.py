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

``anchors`` are k frozen rows of random signs for each factor (:mod:`pera.anchors`), V ∈ {±1}^{k×n} with rows v_c and
U ∈ {±1}^{m×k} with columns u_c. They append, behind the products, the crosses of every learned row with every frozen
row: b_i ⊙ u_c to B̂, and (h_c/√k) (a_i ⊙ v_c) to Â, first all i for c = 1, then for c = 2, and so on. Without products,

.. math::

    ΔW = s \, (B A) ⊙ \left( 1 1^T + \tfrac{1}{\sqrt k} \, U \, \mathrm{diag}(h) \, V \right)

so a fixed full-rank mask, with k learned weights, spreads each entry of B and A over all of ΔW. These crosses are
linear in B and in A, and no normalization applies to them.

All functions are pure and compute in float32 or better, whatever the dtype of the factors. Factors may have leading
dimensions, such as one for experts; :func:`expand_backward` takes one factor at a time.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pera.anchors import Anchors
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


def num_products(r: int, terms: Terms) -> int:
    """Return the number of products: r(r+1)/2 for "all", r for "square", r(r−1)/2 for "cross", 0 for "none"."""
    squares, crosses = squares_and_crosses(terms)
    return squares * r + crosses * (r * (r - 1) // 2)


def num_coefficients(r: int, terms: Terms, anchors: int = 0) -> int:
    """Return the length of h: one entry for each product, then one for each anchor."""
    return num_products(r, terms) + anchors


def expanded_rank(r: int, terms: Terms = "all", anchors: int = 0) -> int:
    """Return K, the number of columns of B̂: r, one for each product, and r for each anchor."""
    return r + num_products(r, terms) + r * anchors


def fixed_coefficients(
    r: int,
    terms: Terms,
    anchors: int = 0,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the constant h, ``(num_coefficients,)``: as published, 1 for squares and 2 for crosses; 1 for anchors.

    The high-order part of "all" is then exactly (BA) ⊙ (BA).
    """
    h = torch.ones(num_coefficients(r, terms, anchors), dtype=dtype, device=device)
    squares, crosses = squares_and_crosses(terms)
    if crosses:
        h[squares * r : num_products(r, terms)] = 2.0
    return h


def appended_weights(h: Tensor, r: int, terms: Terms, anchors: int = 0) -> Tensor:
    """Return the weights of the K − r rows that Â appends: h_ij of a product, h_c/√k of the r crosses with anchor c.

    Args:
        h: ``(..., num_coefficients(r, terms, anchors))``.
        r: number of columns of the factor.
        terms: which products are appended; see :func:`expand`.
        anchors: k, the number of anchors.

    Returns:
        ``(..., K − r)``, float32 or better.
    """
    h = working(h)
    if not anchors:
        return h
    of_products, of_anchors = h.split([num_products(r, terms), anchors], -1)
    each = (of_anchors / math.sqrt(anchors)).unsqueeze(-1)
    return torch.cat([of_products, each.expand(*of_anchors.shape, r).flatten(-2)], -1)


def coefficient_gradient(grad: Tensor, r: int, terms: Terms, anchors: int = 0) -> Tensor:
    """Return the gradient of h from the gradient of :func:`appended_weights`: ``(K − r,)`` to the length of h."""
    if not anchors:
        return grad
    of_products, of_crosses = grad.split([num_products(r, terms), anchors * r], -1)
    return torch.cat([of_products, of_crosses.unflatten(-1, (anchors, r)).sum(-1) / math.sqrt(anchors)], -1)


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
    signs: Tensor | None = None,
    *,
    whole: Tensor | None = None,
    rho: Tensor | None = None,
) -> Tensor:
    """Append the products of the rows of ``X``, and their crosses with frozen rows, to its rows.

    The result has the rows x_i, then h_ij (x_i ⊙ x_j) / ρ in the order of h, then (h_c/√k) (x_i ⊙ v_c) in the order
    (c, i). "centred" subtracts the mean over the row from x_i ⊙ x_i.

    Args:
        X: factor with one row for each rank, ``(..., r, d)``: A, or B transposed.
        h: coefficients, ``(..., num_coefficients(r, terms, k))``; None leaves the appended rows without a weight.
        terms: which products to append.
        normalization: what the products are divided by.
        signs: the frozen rows v_c, ``(k, d)``: V for A, U transposed for B.
        whole: the whole factor, if ``X`` holds only some of its columns; ρ and the means are taken over it.
        rho: ρ of the whole factor, if it is already known.

    Returns:
        ``(..., K, d)``, float32 or better.

    Raises:
        UserError: ``terms`` or ``normalization`` is unknown, or h or ``signs`` has the wrong length.
    """
    X = working(X)
    check(X, h, terms, normalization, signs)
    r, k = X.shape[-2], 0 if signs is None else len(signs)
    appended = []
    if num_products(r, terms):
        X = X.contiguous()  # rows that lie apart are slow to gather
        appended.append(_products(X, terms, normalization, X if whole is None else working(whole), rho))
    if signs is not None:
        appended.append((X.unsqueeze(-3) * _constant_like(signs, X).unsqueeze(-2)).flatten(-3, -2))
    if not appended:
        return X
    if h is not None:
        rows = appended[0] if len(appended) == 1 else torch.cat(appended, -2)
        appended = [rows * appended_weights(h, r, terms, k).unsqueeze(-1)]
    return torch.cat([X, *appended], -2)


def _products(X: Tensor, terms: Terms, normalization: Normalization, whole: Tensor, rho: Tensor | None) -> Tensor:
    """Return the rows (x_i ⊙ x_j) / ρ of :func:`expand`, ``(..., num_products, d)``."""
    r, (left, right, *_), divided = X.shape[-2], _indices(X, terms), X
    if normalization != "none":
        divisor = (rms(whole) if rho is None else rho)[..., None, None]
        divided = X / divisor
    products = X.index_select(-2, left).mul_(divided.index_select(-2, right))
    if normalization == "centred" and squares_and_crosses(terms)[0]:
        means = whole.square().mean(-1, keepdim=True) / divisor
        products = torch.cat([products[..., :r, :] - means, products[..., r:, :]], -2)
    return products


def expand_backward(
    grad: Tensor,
    X: Tensor,
    terms: Terms,
    normalization: Normalization,
    signs: Tensor | None = None,
    *,
    known: Normalizer | None = None,
    inner: Tensor | None = None,
) -> Tensor:
    r"""Return the gradient of ``X`` from the gradient of ``expand(X, None, terms, normalization, signs)``.

    With G_i, G_ij and G_ci the gradients of the rows x_i, (x_i ⊙ x_j)/ρ and x_i ⊙ v_c,

    .. math::

        ∂x_i = G_i + \sum_j \frac{G_{ij} ⊙ x_j}{ρ} \;(\text{twice for } j = i) - \frac{q}{N ρ^2} x_i
               + \sum_c G_{ci} ⊙ v_c, \qquad q = \sum_{ij} \left\langle G_{ij}, \frac{x_i ⊙ x_j}{ρ} \right\rangle

    where the third term is the gradient through ρ. "centred" subtracts the mean over the row from G_ii. All operations
    are differentiable.

    Args:
        grad: gradient of the expansion, ``(K, d)``.
        X: factor, ``(r, d)``.
        terms: as for :func:`expand`.
        normalization: as for :func:`expand`.
        signs: as for :func:`expand`.
        known: the :func:`normalizer` of X, if it is already computed.
        inner: q, if it is already computed.

    Returns:
        ``(r, d)``, float32 or better.
    """
    X, grad = working(X), working(grad)
    r = X.shape[0]
    count = num_products(r, terms)
    linear, products, crosses = grad[:r], grad[r : r + count], grad[r + count :]
    if signs is not None:
        linear = linear + (crosses.unflatten(0, (-1, r)) * _constant_like(signs, X).unsqueeze(1)).sum(0)
    if not count:
        return linear
    if normalization == "centred" and squares_and_crosses(terms)[0]:
        squares = products[:r] - products[:r].mean(-1, keepdim=True)
        products = torch.cat([squares, products[r:]])
    left, right, partners, selection = _indices(X, terms)
    divided = X
    if normalization != "none":
        rho, energy = normalizer(X) if known is None else known
        divided = X / rho
        if inner is None:
            inner = (products * X.index_select(0, left) * divided.index_select(0, right)).sum()
        linear = linear - (inner / energy) * X
    toward = divided.index_select(0, partners)
    toward.view(2, *products.shape).mul_(products)
    return torch.addmm(linear, selection.to(X.dtype), toward)


def expand_A(
    A: Tensor,
    h: Tensor | None,
    terms: Terms = "all",
    normalization: Normalization = "none",
    anchors: Anchors | None = None,
) -> Tensor:
    """Return Â = Poly2_H(A), eq. 7: ``(r, in_features)`` → ``(K, in_features)``."""
    if anchors is None:
        return expand(A, h, terms, normalization)
    h = A.new_ones(num_coefficients(A.shape[-2], terms, anchors.k)) if h is None else h
    return expand(A, h, terms, normalization, anchors.V)


def expand_B(
    B: Tensor, terms: Terms = "all", normalization: Normalization = "none", anchors: Anchors | None = None
) -> Tensor:
    """Return B̂ = Poly2(B), eq. 6: ``(out_features, r)`` → ``(out_features, K)``."""
    return expand(B.mT, None, terms, normalization, None if anchors is None else anchors.U_T).mT


def lora_factors(
    A: Tensor,
    B: Tensor,
    h: Tensor | None,
    terms: Terms = "all",
    normalization: Normalization = "none",
    anchors: Anchors | None = None,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the factors of the LoRA of rank K that equals this adapter exactly.

    Args:
        A: ``(r, in_features)``.
        B: ``(out_features, r)``.
        h: ``(num_coefficients(r, terms, k),)``; None means 1 for every product and anchor.
        terms: which products take part; see the module.
        normalization: scale of the products; see the module.
        anchors: the frozen rows of both sides; see the module.
        scaling: s = α / r.

    Returns:
        ``lora_A`` ``(K, in_features)`` and ``lora_B`` ``(out_features, K)``, with ΔW = lora_B @ lora_A. They contain
        h, ρ, 1/√k and s.
    """
    lora_B = scaling * expand_B(B, terms, normalization, anchors)
    return expand_A(A, h, terms, normalization, anchors), lora_B


def delta_weight(
    A: Tensor,
    B: Tensor,
    h: Tensor | None,
    terms: Terms = "all",
    normalization: Normalization = "none",
    anchors: Anchors | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """Return ΔW = s B̂ Â, eq. 9, ``(out_features, in_features)``. It takes the arguments of :func:`lora_factors`."""
    lora_A, lora_B = lora_factors(A, B, h, terms, normalization, anchors, scaling)
    return lora_B @ lora_A


def working(X: Tensor) -> Tensor:
    """Return ``X`` in the dtype of the computation: float64 stays, anything smaller becomes float32."""
    return X if X.dtype in (torch.float32, torch.float64) else X.float()


def check(X: Tensor, h: Tensor | None, terms: Terms, normalization: Normalization, signs: Tensor | None = None) -> None:
    """Raise UserError if ``terms`` or ``normalization`` is unknown, or h or the frozen rows do not fit ``X``."""
    known = get_args(Normalization)
    if normalization not in known:
        raise UserError(f"normalization={normalization!r} is not known; {nearest(normalization, known)}")
    *leading, r, d = X.shape
    k = 0 if signs is None else len(signs)
    if signs is not None and signs.shape[-1] != d:
        raise UserError(f"anchors: the frozen rows have {signs.shape[-1]} entries, and the rows of the factor {d}.")
    needed = num_coefficients(r, terms, k)
    if h is not None and tuple(h.shape) not in ((needed,), (*leading, needed)):
        frozen = f" with {k} anchors" if k else ""
        raise UserError(f"h has shape {tuple(h.shape)}; r={r} and terms={terms!r}{frozen} need ({needed},).")


def _constant_like(t: Tensor, X: Tensor) -> Tensor:
    """Return the constant ``t`` on the device and in the dtype of ``X``; for a DTensor, on its mesh."""
    t = t.to(X.device, X.dtype)
    return _replicated(t, X) if hasattr(X, "device_mesh") else t


def _replicated(t: Tensor, X: Any) -> Tensor:
    """Return ``t`` as a DTensor on the mesh of the DTensor ``X``."""
    whole: Tensor = type(X).from_local(t, X.device_mesh)
    return whole


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
        found = _Indices(*(_replicated(t, X) for t in found))
    return found


def _make_indices(r: int, terms: Terms, device: torch.device) -> _Indices:
    left, right = torch.tensor(coefficient_pairs(r, terms), device=device).unbind(1)
    selection = torch.nn.functional.one_hot(torch.cat([left, right]), r).T.to(torch.float32)
    return _Indices(left, right, torch.cat([right, left]), selection)
