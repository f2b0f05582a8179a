"""What the high-order terms do: the change of the loss when they, or the rank that they add, are taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pera.convert.truncate import truncate_factors
from pera.files import write_json
from pera.polynomial import coefficient_pairs, lora_factors
from pera.runs import Run, open_model
from pera.tasks.prompts import IGNORED, encode_task, task_collator
from pera.tuner import PeraLayer, adapted_layers

Part = Literal["square", "cross", "high_order"]


@dataclass(frozen=True)
class Effects:
    """Mean loss of an adapter on some data, and how it changes without some of its terms.

    A positive change means that the terms help on these data. All are zero for a LoRA.
    """

    tokens: int
    loss: float
    without: dict[Part, float]
    """Change of the loss when the terms are zeroed in every layer."""
    without_high_order: dict[str, float]
    """Change of the loss when all high-order terms are zeroed in one group of layers, by group."""
    at_rank_r: float | None = None
    """Change of the loss when the ΔW of every layer is cut to its r leading directions, the most of it that a LoRA of
    equal r can hold. Near zero, the higher rank is not used, however much the adapter relies on its terms. None where it
    was not measured."""


def effects(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    *,
    adapter_name: str = "default",
    group: Callable[[str], str] | None = None,
) -> Effects:
    """Zero the square, the cross and all high-order terms, everywhere and group by group, cut ΔW to rank r, and take the
    loss each time.

    Args:
        model: a model with a PERA adapter, in evaluation mode; left as it was.
        batches: keyword arguments of its forward, with ``labels``.
        adapter_name: the adapter to look at.
        group: the group of a layer, by its module name; by default the last part of the name, such as
            "q_proj".
    """
    group = group or (lambda name: name.rpartition(".")[2])
    layers = adapted_layers(model, adapter_name)
    groups: dict[str, list[PeraLayer]] = {}
    for name, layer in layers.items():
        groups.setdefault(group(name), []).append(layer)
    loss, tokens = mean_loss(model, batches)

    def change(chosen: Iterable[PeraLayer], part: Part) -> float:
        with zeroed(chosen, part, adapter_name):
            return mean_loss(model, batches)[0] - loss

    with cut_to_r(layers.values(), adapter_name):
        at_rank_r = mean_loss(model, batches)[0] - loss
    parts: tuple[Part, ...] = ("square", "cross", "high_order")
    return Effects(
        tokens=tokens,
        loss=loss,
        without={part: change(layers.values(), part) for part in parts},
        without_high_order={name: change(members, "high_order") for name, members in groups.items()},
        at_rank_r=at_rank_r,
    )


def run_effects(run: Run, *, examples: int = 32, batch_size: int = 8) -> Effects:
    """:func:`effects` of a run's adapter on the first held-out examples of its task, kept in ``effect.json``.

    Computed in float32, because small effects drown in the rounding of bfloat16.
    """
    model, batches = held_out(run, examples, batch_size)
    result = effects(model, batches)
    write_json(run.effect_file, asdict(result))
    return result


def run_loss(run: Run, *, examples: int | None = None, batch_size: int = 32) -> float:
    """Loss per label of a run's adapter on the held-out examples of its task, or the first of them, in float32."""
    return mean_loss(*held_out(run, examples, batch_size))[0]


def held_out(run: Run, examples: int | None, batch_size: int) -> tuple[Any, list[dict[str, Tensor]]]:
    """The model of a run in float32, and the first held-out examples of its task in batches."""
    recipe = run.recipe
    model, tokenizer = open_model(run.location, "float32")
    task = recipe.build_task()
    encoded = encode_task(task, tokenizer, task.test[:examples], recipe.training.max_length).rows
    encoded.sort(key=lambda row: len(row["input_ids"]))
    collate = task_collator(task, tokenizer, model.get_base_model())
    device = next(model.parameters()).device
    batches = [
        {key: value.to(device) for key, value in collate(encoded[i : i + batch_size]).items()}
        for i in range(0, len(encoded), batch_size)
    ]
    return model, batches


@contextmanager
def zeroed(layers: Iterable[PeraLayer], part: Part, adapter_name: str = "default") -> Iterator[None]:
    """Within the block, the coefficients of ``part``, learned or fixed, are zero in ``layers``."""
    changed: list[PeraLayer] = []
    try:
        for layer in layers:
            own = layer.coefficients
            masked = own(adapter_name).detach() * _kept(layer, part, adapter_name)
            vars(layer)["coefficients"] = lambda name, own=own, masked=masked: (
                masked if name == adapter_name else own(name)
            )
            changed.append(layer)
        yield
    finally:
        for layer in changed:
            del vars(layer)["coefficients"]


@contextmanager
def cut_to_r(layers: Iterable[PeraLayer], adapter_name: str = "default") -> Iterator[None]:
    """Within the block, each layer is the LoRA of its own r whose ΔW is nearest to the layer's (Eckart and Young)."""
    own = [(layer, layer.expansion[adapter_name], layer.scaling[adapter_name]) for layer in layers]
    cut = []
    for layer, expansion, scaling in own:
        trained = layer.factors(adapter_name)
        A, B, h = (factor.detach().cpu().double() for factor in trained)  # not every accelerator has float64
        nearest = truncate_factors(*lora_factors(A, B, h, *expansion, scaling), layer.r[adapter_name])
        cut.append([factor.to(trained[0]) for factor in nearest])
    try:
        for (layer, expansion, _), (A, B) in zip(own, cut, strict=True):
            factors = layer.factors
            vars(layer)["factors"] = lambda name, factors=factors, A=A, B=B: (
                (A, B, A.new_empty(0)) if name == adapter_name else factors(name)
            )
            layer.expansion[adapter_name] = expansion._replace(terms="none", normalization="none")
            layer.scaling[adapter_name] = 1.0
        yield
    finally:
        for layer, expansion, scaling in own:
            vars(layer).pop("factors", None)
            layer.expansion[adapter_name], layer.scaling[adapter_name] = expansion, scaling


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[float, int]:
    """Loss per label, over all batches, and the number of labels that count."""
    total, tokens = 0.0, 0
    for batch in batches:
        labels: Any = batch["labels"]
        count = int((labels[:, 1:] != IGNORED).sum()) if labels.dim() == 2 else len(labels)
        total += model(**batch).loss.item() * count
        tokens += count
    return total / tokens, tokens


def _kept(layer: PeraLayer, part: Part, adapter_name: str) -> Tensor:
    """1 for each coefficient that stays, 0 for each that belongs to ``part``."""
    h = layer.coefficients(adapter_name)
    pairs = coefficient_pairs(layer.r[adapter_name], layer.expansion[adapter_name].terms)
    zeroed = [part == "high_order" or (part == "square") == (i == j) for i, j in pairs]
    return torch.tensor(zeroed, device=h.device).logical_not().to(h.dtype)
