"""The operator: x ↦ s (x Âᵀ) B̂ᵀ, differentiable, without ever building ΔW.

What is kept for backward is x (as LoRA keeps it), the factors, and the thin product x Âᵀ. The
expansions are cheap to build, so they are rebuilt in backward instead of kept.

Everything of size T (tokens) is computed in the dtype of x, or in autocast's; the expansions are
computed in float32 or better and rounded once to it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

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
) -> Tensor:
    """y = s · x ΔWᵀ with ΔW = B̂ Â (see :mod:`pera.polynomial`), for x of any leading shape.

    Differentiable, twice if asked, with respect to x, A, B and h.

    Args:
        x: ``(..., in_features)``, floating point.
        A: ``(r, in_features)``.
        B: ``(out_features, r)``.
        h: ``(num_coefficients(r, terms),)``; None leaves every product with weight 1 (none there for terms "none").
        terms, normalization: see :mod:`pera.polynomial`.
        scaling: s = α / r.

    Returns:
        ``(..., out_features)`` in the dtype of x, under autocast in autocast's dtype.
    """
    y: Tensor = _PeraLinear.apply(x.to(computation_dtype(x)), A, B, h, terms, normalization, scaling)
    return y


def computation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which :func:`pera_linear` computes for ``x``: its own, or autocast's, which spares float64."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
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
    """s Â ``(K, in_features)`` and B̂ᵀ ``(K, out_features)`` in ``dtype``, for :func:`expanded_linear`."""
    return (
        (scaling * expand(A, h, terms, normalization)).to(dtype),
        expand(B.T.contiguous(), None, terms, normalization).to(dtype),
    )


def expanded_linear(x: Tensor, A_hat: Tensor, B_hat_T: Tensor) -> Tensor:
    """The same product from the kept :func:`expansions`: ``(..., in_features)`` → ``(..., out_features)``."""
    with without_autocast(x):
        return (x @ A_hat.T) @ B_hat_T


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Computation in the dtypes of the operands, where the device of ``x`` knows autocast."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class _PeraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        h: Tensor | None,
        terms: Terms,
        normalization: Normalization,
        scaling: float,
    ) -> Tensor:
        with without_autocast(x):
            A_hat, B_hat_T = expansions(
                A, B, h, terms=terms, normalization=normalization, scaling=scaling, dtype=x.dtype
            )
            z = x.reshape(-1, x.shape[-1]) @ A_hat.T
            y = z @ B_hat_T
        ctx.save_for_backward(x, A, B, h, z)
        ctx.terms, ctx.normalization, ctx.scaling = terms, normalization, scaling
        return y.reshape(*x.shape[:-1], B.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h, z = ctx.saved_tensors
        terms, normalization, scaling = ctx.terms, ctx.normalization, ctx.scaling
        need_x, need_A, need_B, need_h = ctx.needs_input_grad[:4]
        grad_x = grad_A = grad_B = grad_h = None
        with without_autocast(x):
            flat = x.reshape(-1, x.shape[-1])
            grad_y = grad_y.reshape(-1, B.shape[0])
            A_hat, B_hat_T = expansions(
                A, B, h, terms=terms, normalization=normalization, scaling=scaling, dtype=x.dtype
            )
            if torch.is_grad_enabled():  # differentiated again: z has to be a function of x, A and h
                z = flat @ A_hat.T
            if need_B:
                grad_B = expand_vjp(z.T @ grad_y, B.T.contiguous(), None, terms, normalization)[0].T.to(B.dtype)
            if need_x or need_A or need_h:
                grad_z = grad_y @ B_hat_T.T
                if need_x:
                    grad_x = (grad_z @ A_hat).reshape(x.shape)
                if need_A or need_h:
                    grad_A, grad_h = expand_vjp(grad_z.T @ flat, A, h, terms, normalization)
                    grad_A = (scaling * grad_A).to(A.dtype)
                    grad_h = None if h is None or grad_h is None else (scaling * grad_h).to(h.dtype)
        return grad_x, grad_A, grad_B, grad_h, None, None, None
