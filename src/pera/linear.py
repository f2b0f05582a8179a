"""The operator x ↦ s (x Âᵀ) diag(h) B̂ᵀ, which never builds ΔW.

The coefficients h and the scale s multiply the thin product x Âᵀ, so Â and B̂ are products of the factors alone.

Backward needs x, the factors and the thin product. The thin product is computed again in backward if it is larger than
x (K > in_features). The expansions are always built again, because they are cheap.

Products with x are computed in the dtype of x, or in autocast's. Expansions are computed in float32 or better and
rounded once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pera.anchors import Anchors
from pera.polynomial import (
    Normalization,
    Normalizer,
    Terms,
    appended_weights,
    coefficient_gradient,
    expand,
    expand_backward,
    normalizer,
    num_coefficients,
    num_products,
    working,
)


def pera_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    h: Tensor | None,
    *,
    terms: Terms = "all",
    normalization: Normalization = "none",
    anchors: Anchors | None = None,
    scaling: float = 1.0,
    base: Tensor | None = None,
) -> Tensor:
    """Return y = base + s · x ΔWᵀ with ΔW = B̂ Â (see :mod:`pera.polynomial`).

    Differentiable, also twice, with respect to x, A, B, h and base.

    Args:
        x: ``(..., in_features)``, floating point.
        A: ``(r, in_features)``.
        B: ``(out_features, r)``.
        h: ``(num_coefficients(r, terms, k),)``; None means 1 for every product and anchor.
        terms: which products take part; see :mod:`pera.polynomial`.
        normalization: scale of the products.
        anchors: the frozen rows of both sides, or None.
        scaling: s = α / r.
        base: what to add to, such as the output of the frozen layer, ``(..., out_features)``; None means 0. Adding it
            here is cheaper than adding it afterwards, if it has the dtype of the result.

    Returns:
        ``(..., out_features)`` in the dtype of ``base``, else of x, else (under autocast) of autocast.
    """
    dtype = computation_dtype(x)
    form = _Form(terms, normalization, anchors, scaling)
    x = x.to(dtype)
    if base is not None and base.dtype != dtype:
        return base + _pera_linear(x, A, B, h, None, form).to(base.dtype)
    return _pera_linear(x, A, B, h, base, form)


def computation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that :func:`pera_linear` computes in: autocast's (not for float64), else the dtype of x."""
    device = x.device.type
    if x.dtype != torch.float64 and _autocasts(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class Expansions(NamedTuple):
    """Both expansions of an adapter, rounded to the dtype of the computation: ΔW = B̂ diag(weights) Â."""

    A_hat: Tensor
    """Â without coefficients, ``(K, in_features)``."""
    weights: Tensor | float
    """s for the rows of the factor, s h for the products and s h/√k for the crosses with anchors, ``(K,)``; one number
    if all are equal."""
    B_hat_T: Tensor
    """B̂ᵀ, ``(K, out_features)``."""


def expansions(
    A: Tensor,
    B: Tensor,
    h: Tensor | None,
    *,
    terms: Terms,
    normalization: Normalization,
    anchors: Anchors | None = None,
    scaling: float,
    dtype: torch.dtype,
) -> Expansions:
    """Return what :func:`expanded_linear` needs (arguments as for :func:`pera_linear`), differentiable."""
    return _Form(terms, normalization, anchors, scaling).expansions(A, B.T, h, dtype)


def expanded_linear(x: Tensor, expansions: Expansions, base: Tensor | None = None) -> Tensor:
    """Return the result of :func:`pera_linear` from expansions in the dtype of x and of ``base``."""
    with without_autocast(x):
        return _product(x, expansions, base)[0]


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off for the device of x."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext()


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """Give ``y`` the leading shape of ``x`` without making it a view: autograd then sums gradients in place, and users
    may write into an output."""
    if x.ndim == 2:
        return y
    shaped: Tensor = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])
    return shaped


def _weighted(z: Tensor, weights: Tensor | float) -> Tensor:
    return z if isinstance(weights, float) and weights == 1 else z * weights


def _product(x: Tensor, expansions: Expansions, base: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return y and the thin product x Âᵀ, ``(T, K)``."""
    A_hat, weights, B_hat_T = expansions
    z = x.reshape(-1, x.shape[-1]) @ A_hat.T
    weighted = _weighted(z, weights)
    y = weighted @ B_hat_T if base is None else torch.addmm(base.reshape(-1, B_hat_T.shape[1]), weighted, B_hat_T)
    return _shaped(y, x), z


_Known = tuple[Normalizer | None, Normalizer | None]
"""The normalizers of A and B; None without normalization."""


class _Form(NamedTuple):
    """How the factors are expanded, and the scale s."""

    terms: Terms
    normalization: Normalization
    anchors: Anchors | None
    scaling: float

    def normalizers(self, A: Tensor, B_T: Tensor) -> _Known:
        return (None, None) if self.normalization == "none" else (normalizer(A), normalizer(B_T))

    def expansions(
        self, A: Tensor, B_T: Tensor, h: Tensor | None, dtype: torch.dtype, known: _Known = (None, None)
    ) -> Expansions:
        weights: Tensor | float = float(self.scaling)
        r, frozen = A.shape[0], self.anchors
        if h is None and frozen is not None:
            h = A.new_ones(num_coefficients(r, self.terms, frozen.k))
        if h is not None and h.numel():
            k = 0 if frozen is None else frozen.k
            weights = pad(appended_weights(h, r, self.terms, k), (r, 0), value=1.0)
            weights = (weights if self.scaling == 1 else weights * self.scaling).to(dtype)
        V, U_T = self.signs
        return Expansions(self._expand(A, V, known[0]).to(dtype), weights, self._expand(B_T, U_T, known[1]).to(dtype))

    @property
    def signs(self) -> tuple[Tensor | None, Tensor | None]:
        """The frozen rows for A and for B."""
        return (None, None) if self.anchors is None else self.anchors

    def _expand(self, X: Tensor, signs: Tensor | None, known: Normalizer | None) -> Tensor:
        return expand(X, None, self.terms, self.normalization, signs, rho=None if known is None else known.rho)

    def backward(
        self, grad: Tensor, X: Tensor, signs: Tensor | None, known: Normalizer | None, inner: Tensor | None
    ) -> Tensor:
        grad_X = expand_backward(grad, X, self.terms, self.normalization, signs, known=known, inner=inner)
        return grad_X.to(X.dtype)

    def coefficient_gradient(self, grad_weights: Tensor, r: int) -> Tensor:
        """Return the gradient of h from the gradient of the weights of all rows."""
        k = 0 if self.anchors is None else self.anchors.k
        return self.scaling * coefficient_gradient(grad_weights[r:], r, self.terms, k)


def _pera_linear(x: Tensor, A: Tensor, B: Tensor, h: Tensor | None, base: Tensor | None, form: _Form) -> Tensor:
    # torch.compile and torch.func differentiate the operations themselves. Compiled, the Function below gives wrong
    # gradients: inductor (torch 2.13) reuses a buffer of it too early.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        with without_autocast(x):
            return _product(x, form.expansions(A, B.T, h, x.dtype), base)[0]
    y: Tensor = _PeraLinear.apply(x, A, B, h, base, form)
    return y


class _PeraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, h: Tensor | None, base: Tensor | None, form: _Form
    ) -> Tensor:
        with without_autocast(x):
            B_T = B.T.contiguous()
            known = form.normalizers(A, B_T)
            y, z = _product(x, form.expansions(A, B_T, h, x.dtype, known), base)
        ctx.save_for_backward(x, A, B, h, None if z.shape[-1] > x.shape[-1] else z)
        ctx.form, ctx.known = form, known
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h, z = ctx.saved_tensors
        form, known = ctx.form, ctx.known
        need_x, need_A, need_B, need_h, need_base = ctx.needs_input_grad[:5]
        grad_x = grad_A = grad_B = grad_h = inner = None
        with without_autocast(x):
            B_T = B.T.contiguous()
            if torch.is_grad_enabled():  # differentiated again: what was kept has to be a function of x, A and B
                z, known = None, form.normalizers(A, B_T)
            flat, grad = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, B.shape[0])
            A_hat, weights, B_hat_T = form.expansions(A, B_T, h, x.dtype, known)
            z = flat @ A_hat.T if z is None else z
            grad_weighted = grad @ B_hat_T.T
            if need_h or known[0] is not None:
                grad_weights, r = (grad_weighted * z).sum(0, dtype=working(A).dtype), A.shape[0]
                if need_h:
                    grad_h = form.coefficient_gradient(grad_weights, r).to(h.dtype)
                if known[0] is not None:  # q of expand_backward, the same for both factors
                    inner = (grad_weights * weights)[r : r + num_products(r, form.terms)].sum()
            V, U_T = form.signs
            if need_B:
                grad_B = form.backward(_weighted(z, weights).T @ grad, B_T, U_T, known[1], inner).T
            grad_z = _weighted(grad_weighted, weights)
            if need_x:
                grad_x = _shaped(grad_z @ A_hat, x)
            if need_A:
                grad_A = form.backward(grad_z.T @ flat, A, V, known[0], inner)
        return grad_x, grad_A, grad_B, grad_h, grad_y if need_base else None, None
