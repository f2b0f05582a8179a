"""The operator: x ↦ s (x Âᵀ) B̂ᵀ, differentiable, without ever building ΔW.

What is kept for backward is x (as LoRA keeps it), the factors, and the thin product x Âᵀ, unless that is computed
again. The expansions are cheap to build, so they are always built again instead of kept.

Everything of size T (tokens) is computed in the dtype of x, or in autocast's; the expansions are
computed in float32 or better and rounded once to it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pera.expansion import Gradient, expansion, fold_back
from pera.polynomial import Normalization, Terms, expand, expand_vjp


def pera_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    h: Tensor | None,
    *,
    terms: Terms = "all",
    normalization: Normalization = "none",
    scaling: float = 1.0,
    base: Tensor | None = None,
    recompute: bool | None = None,
) -> Tensor:
    """y = base + s · x ΔWᵀ with ΔW = B̂ Â (see :mod:`pera.polynomial`), for x of any leading shape.

    Differentiable, twice if asked, with respect to x, A, B, h and base.

    Args:
        x: ``(..., in_features)``, floating point.
        A: ``(r, in_features)``.
        B: ``(out_features, r)``.
        h: ``(num_coefficients(r, terms),)``; None leaves every product with weight 1 (none there for terms "none").
        terms, normalization: see :mod:`pera.polynomial`.
        scaling: s = α / r.
        base: what to add to, such as the output of the frozen layer, ``(..., out_features)``; None adds to nothing.
            In the dtype of the result it costs less here than an addition afterwards.
        recompute: whether backward computes the thin product x Âᵀ ``(T, K)`` again, for another sixth or so of the
            operator's multiplications, instead of keeping it. None does so where it is larger than x.

    Returns:
        ``(..., out_features)`` in the dtype of x, under autocast in autocast's dtype.
    """
    dtype = computation_dtype(x)
    if base is not None and base.dtype != dtype:
        return base + pera_linear(
            x, A, B, h, terms=terms, normalization=normalization, scaling=scaling, recompute=recompute
        ).to(base.dtype)
    form = _Form(terms, normalization, scaling)
    y: Tensor = _PeraLinear.apply(x.to(dtype), A, B, h, base, form, recompute)
    return y


def computation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which :func:`pera_linear` computes for ``x``: its own, or autocast's, which spares float64."""
    device = x.device.type
    if x.dtype != torch.float64 and _autocasts(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def expansions(
    A: Tensor,
    B: Tensor,
    h: Tensor | None,
    *,
    terms: Terms,
    normalization: Normalization,
    scaling: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """s Â ``(K, in_features)`` and B̂ᵀ ``(K, out_features)`` in ``dtype``, for :func:`expanded_linear`.

    Products stand in the same order in both; which one is not said. Differentiable where gradients are on.
    """
    return _Form(terms, normalization, scaling).expansions(A, B, h, dtype, plain=_plain_operations())


def expanded_linear(x: Tensor, A_hat: Tensor, B_hat_T: Tensor, base: Tensor | None = None) -> Tensor:
    """The same product from the kept :func:`expansions`: ``(..., in_features)`` → ``(..., out_features)``, added to
    ``base``, which has the dtype of the result. Not differentiable."""
    with without_autocast(x):
        z = x.reshape(-1, x.shape[-1]) @ A_hat.T
        y = z @ B_hat_T if base is None else torch.addmm(base.reshape(-1, base.shape[-1]), z, B_hat_T)
    return y.resize_(*x.shape[:-1], y.shape[-1])  # no view of y either, as in :func:`_shaped`


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """``y``, of two dimensions, in the leading shape of ``x``, for a ``y`` that nothing else holds: as no view of it,
    so that autograd can add to a gradient in place, and a user to an output."""
    shaped: Tensor = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])
    return shaped


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Computation in the dtypes of the operands."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext()


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _plain_operations() -> bool:
    """Whether the expansions have to be made of plain operations, for autograd or the compiler to follow."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


class _Form(NamedTuple):
    """What the expansions are, apart from the factors."""

    terms: Terms
    normalization: Normalization
    scaling: float

    def expansions(
        self, A: Tensor, B: Tensor, h: Tensor | None, dtype: torch.dtype, plain: bool
    ) -> tuple[Tensor, Tensor]:
        """s Â and B̂ᵀ; ``plain`` gives the products in the order of h, else they are in that of the fast ones."""
        terms, normalization, scaling = self
        if not plain:
            return (
                expansion(A, h, terms, normalization, scaling, dtype),
                expansion(B.T, None, terms, normalization, 1.0, dtype),
            )
        return (
            (scaling * expand(A, h, terms, normalization)).to(dtype),
            expand(B.T.contiguous(), None, terms, normalization).to(dtype),
        )

    def gradient(
        self, grad: Tensor, X: Tensor, h: Tensor | None, scaling: float, plain: bool, **options: Any
    ) -> Gradient:
        """From that of an expansion in the same order; ``options`` are those of :func:`fold_back`."""
        if not plain:
            return fold_back(grad, X, h, self.terms, self.normalization, scaling, **options)
        grad_X, grad_h = expand_vjp(grad, X, h, self.terms, self.normalization)
        return Gradient(scaling * grad_X, None if grad_h is None else scaling * grad_h, None)


class _PeraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        h: Tensor | None,
        base: Tensor | None,
        form: _Form,
        recompute: bool | None,
    ) -> Tensor:
        plain = _plain_operations()
        with without_autocast(x):
            A_hat, B_hat_T = form.expansions(A, B, h, x.dtype, plain)
            z = x.reshape(-1, x.shape[-1]) @ A_hat.T
            y = z @ B_hat_T if base is None else torch.addmm(base.reshape(-1, B.shape[0]), z, B_hat_T)
        if recompute is None:
            recompute = z.shape[-1] > x.shape[-1]
        ctx.save_for_backward(x, A, B, h, None if recompute else z)
        ctx.form, ctx.plain = form, plain
        return _shaped(y, x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h, z = ctx.saved_tensors
        form = ctx.form
        need_x, need_A, need_B, need_h, need_base = ctx.needs_input_grad[:5]
        grad_x = grad_A = grad_B = grad_h = None
        again = torch.is_grad_enabled()  # differentiated again: z has to be a function of x, A and h
        plain = ctx.plain or again
        with without_autocast(x):
            flat = x.reshape(-1, x.shape[-1])
            grad = grad_y.reshape(-1, B.shape[0])
            A_hat, B_hat_T = form.expansions(A, B, h, x.dtype, plain)
            shares = None
            if need_x or need_A or need_h:
                grad_z = grad @ B_hat_T.T
                if need_x:
                    grad_x = _shaped(grad_z @ A_hat, x)
                if need_A or need_h:
                    grad_A, grad_h, shares = form.gradient(grad_z.T @ flat, A, h, form.scaling, plain, need_h=need_h)
                    grad_A = grad_A.to(A.dtype)
                    grad_h = None if grad_h is None or h is None else grad_h.to(h.dtype)
            if need_B:
                if z is None or again:
                    z = flat @ A_hat.T
                grad_B = form.gradient(z.T @ grad, B.T, None, 1.0, plain, shares=shares).X.T.to(B.dtype)
        return grad_x, grad_A, grad_B, grad_h, grad_y if need_base else None, None, None
