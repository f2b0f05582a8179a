"""Interaction strength (eq. 12): how strongly pairs of hidden features act together on the model's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import TaskType
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pera.errors import UserError
from pera_lab.diagnose.effect import held_out
from pera_lab.files import write_json
from pera_lab.runs import Run


@dataclass(frozen=True)
class Interaction:
    """What ``interaction.json`` holds."""

    examples: int
    layer: int
    """Number of the block behind which the features are."""
    strength: list[list[float]]
    """Of each pair of features, ``(features, features)``."""


def interaction_strength(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    layer: int,
    features: slice | list[int],
    position: int = -1,
    output: Callable[[Any], Tensor] | None = None,
) -> Tensor:
    r"""Mean over samples of :math:`|∂²f / ∂h_i ∂h_j|`, by one Hessian–vector product for each feature.

    The paper leaves f and h open. Here h is a slice of the hidden state after block ``layer`` at one
    position, and f, by default, the largest logit, of a language model that at the last position.
    Works for a base model and for any adapter. Since adapted layers are linear in their input, it
    measures the network around them.

    Args:
        model: in evaluation mode, padded on the left; left as it was.
        batch: keyword arguments of its forward, without labels.
        layer: index of the block, from 0; negative counts from the end.
        features: which entries of the hidden state.
        position: of the token whose hidden state it is.
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
        chosen = hidden[:, position, features]
        shift = torch.zeros_like(chosen, requires_grad=True)
        moved = hidden.detach().clone()
        moved[:, position, features] = moved[:, position, features] + shift
        return (moved, *result[1:]) if isinstance(result, tuple) else moved

    handle = blocks[layer].register_forward_hook(move)
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            f = (output or _largest_logit)(model(**batch, use_cache=False))
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


def run_interaction(run: Run, *, examples: int = 8, features: int = 16) -> Tensor:
    """:func:`interaction_strength` of a run's model on the first held-out examples of its task, in float32, at its
    middle block: of the first ``features`` hidden features of the last token, or of a classifier's first, which it
    reads. Kept in ``interaction.json``.

    Returns:
        ``(features, features)``.
    """
    model, batches = held_out(run, examples, batch_size=1)  # without padding, the last position is the last token
    layer = len(hidden_blocks(model)) // 2
    position = 0 if model.peft_config["default"].task_type == TaskType.SEQ_CLS else -1
    found = [
        interaction_strength(model, batch, layer=layer, features=slice(0, features), position=position)
        for batch in ({key: value for key, value in batch.items() if key != "labels"} for batch in batches)
    ]
    strength = torch.stack(found).mean(0)
    write_json(run.interaction_file, asdict(Interaction(len(found), layer, strength.tolist())))
    return strength


def _largest_logit(result: Any) -> Tensor:
    """Of a classifier, or of a language model at the last position."""
    top: Tensor = result.logits.max(-1).values
    return top if top.dim() == 1 else top[:, -1]


def hidden_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer: the members of its longest list of modules.

    Raises:
        UserError: the model has none.
    """
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of blocks to look into.")
    return max(lists, key=len)
