"""Interaction strength (eq. 12): how strongly pairs of hidden features act together on the model's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pera.errors import UserError


def interaction_strength(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    layer: int,
    features: slice | list[int],
    output: Callable[[Any], Tensor] | None = None,
) -> Tensor:
    r"""Mean over samples of :math:`|∂²f / ∂h_i ∂h_j|`, by one Hessian–vector product for each feature.

    The paper leaves f and h open. Here h is a slice of the hidden state after block ``layer`` at the last
    position, and f, by default, the logit of the token that the model itself finds most likely there.
    Works for a base model and for any adapter. Since adapted layers are linear in their input, it
    measures the network around them.

    Args:
        model: in evaluation mode, padded on the left; left as it was.
        batch: keyword arguments of its forward, without labels.
        layer: index of the block, from 0; negative counts from the end.
        features: which entries of the hidden state.
        output: f of each sample from the model's output, ``(batch,)``.

    Returns:
        ``(features, features)``, symmetric, non-negative, on the CPU.

    Raises:
        UserError: the model has no such block.
    """
    blocks = hidden_blocks(model)
    if not -len(blocks) <= layer < len(blocks):
        raise UserError(f"layer={layer} does not exist; the model has {len(blocks)} blocks.")
    shift: Tensor | None = None

    def move(_module: nn.Module, _args: Any, result: Any) -> Any:
        nonlocal shift
        hidden = result[0] if isinstance(result, tuple) else result
        chosen = hidden[:, -1, features]
        shift = torch.zeros_like(chosen, requires_grad=True)
        moved = hidden.detach().clone()
        moved[:, -1, features] = moved[:, -1, features] + shift
        return (moved, *result[1:]) if isinstance(result, tuple) else moved

    handle = blocks[layer].register_forward_hook(move)
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            f = (output or _top_logit)(model(**batch, use_cache=False))
            assert shift is not None
            (gradient,) = torch.autograd.grad(f.sum(), shift, create_graph=True, materialize_grads=True)
            if not gradient.requires_grad:  # f is constant or linear in h
                return torch.zeros(gradient.shape[1], gradient.shape[1])
            rows = [
                torch.autograd.grad(g.sum(), shift, retain_graph=True, materialize_grads=True)[0]
                for g in gradient.unbind(1)
            ]
    finally:
        handle.remove()
    return torch.stack(rows, 1).detach().abs().mean(0).cpu()


def hidden_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer: the members of its longest list of modules.

    Raises:
        UserError: the model has none.
    """
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of blocks to look into.")
    return max(lists, key=len)


def _top_logit(result: Any) -> Tensor:
    top: Tensor = result.logits[:, -1].max(-1).values
    return top
