"""The equation of PERA as an independent reference for the tests.

It loops over index pairs and calls no function of the package. Everything is float64.
"""

import hashlib

import torch

from pera.anchors import Anchors

TERMS = ("all", "square", "cross", "none")
COEFFICIENTS = ("learned", "fixed")
NORMALIZATIONS = ("none", "rms", "centred")


def pairs(r, terms):
    """The index pairs (i, j) of the products, in the order of h: squares first, then crosses lexicographically."""
    squares = [(i, i) for i in range(r)]
    crosses = [(i, j) for i in range(r) for j in range(r) if i < j]
    return {"all": squares + crosses, "square": squares, "cross": crosses, "none": []}[terms]


def by_pair(h, r, terms, anchors=None):
    """The flat vector h as {(i, j): h_ij}, and {"anchors": h_c} for the entries that follow with ``anchors``."""
    h, count = h.double(), len(pairs(r, terms))
    if anchors is None:
        return dict(zip(pairs(r, terms), h, strict=True))
    return {**dict(zip(pairs(r, terms), h[:count], strict=True)), "anchors": h[count:]}


def fixed_by_pair(r, terms):
    """The constants of the published code: 1 for a square, 2 for a cross."""
    return {(i, j): 1.0 if i == j else 2.0 for i, j in pairs(r, terms)}


def rho(X, normalization):
    """ρ of rows X: 1, or the root mean square of the entries in columns that are not all zero."""
    if normalization == "none":
        return 1.0
    columns = [column for column in X.double().T.unbind() if column.any()]
    return (sum(x * x for column in columns for x in column.unbind()) / max(1, len(columns) * len(X)) + 1e-24) ** 0.5


def linear_part(A, B):
    """Σ_i b_i a_iᵀ."""
    A, B = A.double(), B.double()
    delta = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
    for i in range(A.shape[0]):
        delta = delta + torch.outer(B[:, i], A[i])
    return delta


def product(x, y, same, normalization, sign=-1):
    """x ⊙ y. For "centred", subtract the mean from a square (with ``sign`` 1, add it)."""
    xy = x * y
    return xy + sign * sum(xy.unbind()) / len(xy) if same and normalization == "centred" else xy


def high_order_part(A, B, h, normalization, sign=-1):
    """Σ_ij h_ij (b_i ⊙ b_j / ρ_B) (a_i ⊙ a_j / ρ_A)ᵀ, for h as {(i, j): h_ij}."""
    A, B = A.double(), B.double()
    delta = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
    for (i, j), h_ij in h.items():
        b, a = (product(x, y, i == j, normalization, sign) for x, y in ((B[:, i], B[:, j]), (A[i], A[j])))
        delta = delta + h_ij * torch.outer(b / rho(B.T, normalization), a / rho(A, normalization))
    return delta


def sign_row(seed, name, side, width, c):
    """Frozen row c of a layer: +1 where bit j of a SHAKE-256 digest, lowest bits first, is 0, and −1 where it is 1."""
    text = f'["pera.anchors", {seed}, "{name}", "{side}", {width}, {c}]'
    bits = int.from_bytes(hashlib.shake_256(text.encode()).digest((width + 7) // 8), "little")
    return [1 - 2 * (bits >> j & 1) for j in range(width)]


def anchor_part(A, B, h, anchors):
    """1/√k Σ_i Σ_c h_c (b_i ⊙ u_c) (a_i ⊙ v_c)ᵀ, for frozen rows ``anchors`` = (V, Uᵀ)."""
    A, B, (V, U_T) = A.double(), B.double(), anchors
    delta = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
    for i in range(A.shape[0]):
        for h_c, v, u in zip(h.double(), V, U_T, strict=True):
            delta = delta + h_c / len(V) ** 0.5 * torch.outer(B[:, i] * u, A[i] * v)
    return delta


def delta_weight(A, B, h, normalization, scaling=1.0, anchors=None):
    """ΔW, for h as {(i, j): h_ij}; with ``anchors`` h also has the key "anchors", for the coefficients h_c."""
    products = {pair: h_ij for pair, h_ij in h.items() if pair != "anchors"}
    delta = linear_part(A, B) + high_order_part(A, B, products, normalization)
    return scaling * (delta if anchors is None else delta + anchor_part(A, B, h["anchors"], anchors))


def draw(r, terms, coefficients="learned", m=7, n=9, dtype=torch.float64):
    """Random factors A (r, n) and B (m, r), and h: random if learned, the published constants if fixed."""
    A, B = torch.randn(r, n, dtype=dtype), torch.randn(m, r, dtype=dtype)
    if coefficients == "learned":
        return A, B, torch.randn(len(pairs(r, terms)), dtype=dtype)
    return A, B, torch.tensor(list(fixed_by_pair(r, terms).values()), dtype=dtype)


def draw_anchors(k, h, m=7, n=9):
    """Random frozen rows V (k, n) and Uᵀ (k, m), or None for k = 0, and h with an entry appended for each."""
    if not k:
        return None, h
    V, U_T = (2 * torch.randint(2, (k, width), dtype=torch.int8) - 1 for width in (n, m))
    return Anchors(V, U_T), torch.cat([h, torch.randn(k, dtype=h.dtype)])


def magnitude(A, B, h, normalization, scaling=1.0, anchors=None):
    """ΔW with every summand positive. Rounding errors of a product are a multiple of this, entry by entry."""
    A, B, h = A.abs(), B.abs(), {pair: abs(h_ij) for pair, h_ij in h.items()}
    products = {pair: h_ij for pair, h_ij in h.items() if pair != "anchors"}
    delta = linear_part(A, B) + high_order_part(A, B, products, normalization, sign=1)
    if anchors is not None:
        delta = delta + anchor_part(A, B, h["anchors"], [rows.abs() for rows in anchors])
    return abs(scaling) * delta


def relative_error(actual, expected):
    """Largest difference over the largest expected entry; 0 if there is nothing to compare."""
    difference = torch.zeros(1).double() if not expected.numel() else (actual.double() - expected.double()).abs().max()
    return 0.0 if difference == 0 else (difference / expected.double().abs().max()).item()
