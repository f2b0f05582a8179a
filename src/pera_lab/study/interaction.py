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
    """The content of ``interaction.json``."""

    examples: int
    layer: int
    """Index of the block whose output holds the features."""
    strength: list[list[float]]
    """One value for each pair of features, ``(features, features)``."""


def interaction_strength(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    layer: int,
    features: slice | list[int],
    position: int = -1,
    output: Callable[[Any], Tensor] | None = None,
) -> Tensor:
    r"""Mean over samples of :math:`|∂²f / ∂h_i ∂h_j|`, computed with one Hessian–vector product per feature.

    The paper does not define f and h. Here h is a slice of the hidden state after block ``layer`` at one position.
    By default f is the largest logit; for a language model, the largest logit at the last position.

    The function works for a base model and for any adapter. Adapted layers are linear in their input, so the value
    describes the network around them.

    Args:
        model: a model in evaluation mode that pads on the left. It is not changed.
        batch: keyword arguments of its forward, without labels.
        layer: index of the block, from 0. Negative values count from the end.
        features: indices into the hidden state.
        position: the token whose hidden state is used.
        output: returns f of each sample, ``(batch,)``, from the model's output.

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
    """Interaction strength of a run's model at its middle block, in float32. Also writes ``interaction.json``.

    The features are the first ``features`` entries of the hidden state of the last token, which a language model
    reads its answer from. For a classifier they belong to the first token.

    Args:
        run: a finished run.
        examples: how many held-out examples of its task are used, from the first.
        features: how many hidden features are used, from the first.

    Returns:
        ``(features, features)``; see :func:`interaction_strength`.
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
    """The largest logit of each sample; for a language model, at the last position."""
    top: Tensor = result.logits.max(-1).values
    return top if top.dim() == 1 else top[:, -1]


def hidden_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer: the members of its longest ``ModuleList``.

    Raises:
        UserError: the model has none.
    """
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise UserError(f"{type(model).__name__} has no nn.ModuleList, so its blocks cannot be found.")
    return max(lists, key=len)
