"""Effect of the high-order terms: the change of the loss when they, or the rank that they add, are removed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pera.errors import UserError
from pera.polynomial import coefficient_pairs
from pera.tuner import PeraLayer, adapted_layers
from pera_lab.diagnose.cuts import Cuts, Factors, with_factors
from pera_lab.diagnose.factors import diagnose_adapter, kind
from pera_lab.diagnose.fullness import Fullness, Learned, fullness, learned
from pera_lab.files import write_json
from pera_lab.inference import largest_batch
from pera_lab.models import check_tokens, longest_input
from pera_lab.opening import Location, locate_run, open_model
from pera_lab.progress import stage
from pera_lab.recipe import Recipe
from pera_lab.runs import Run
from pera_lab.tasks.encoding import IGNORED, count_labels

Part = Literal["square", "cross", "high_order", "anchors"]


@dataclass(frozen=True)
class Effects:
    """Mean loss of an adapter on a data set, and the change of that loss without some of the terms.

    A positive change means that the terms help on these data. A LoRA has no terms to leave out.
    """

    tokens: int
    loss: float
    without: dict[Part, float]
    """Change of the loss when these terms are zeroed in every layer: squares, crosses, both, or the anchors. Only terms
    that the adapter has."""
    without_high_order: dict[str, float]
    """Change of the loss when all high-order terms are zeroed in one group of layers, by group. Empty for an adapter
    without products."""
    at_rank_r: float | None = None
    """Change of the loss when the ΔW of every layer is cut to its r leading directions; None if it was not measured.

    A LoRA of the same r can hold these directions. A change near zero means that the additional rank is not used, even
    if the adapter relies on its terms."""
    fullness: Fullness | None = None
    """The rank that the adapter needs and the bits that it learned; None if they were not measured."""


def effects(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    *,
    adapter_name: str = "default",
    group: Callable[[str], str] | None = None,
) -> Effects:
    """Measure the loss without squares, without crosses, without both, without anchors, and with ΔW cut to rank r.

    All high-order terms are also zeroed in one group of layers at a time.

    Args:
        model: a model with a PERA adapter, in evaluation mode. It is not changed.
        batches: keyword arguments of its forward, with ``labels``.
        adapter_name: the adapter to measure.
        group: returns the group of a layer from its module name. By default this is its kind, such as "q_proj".

    Raises:
        UserError: the model has no PERA adapter of that name, the adapter is not active, or all labels are ignored.
    """
    layers = adapted_layers(model, adapter_name)
    _require_in_use(model, layers.values(), adapter_name)
    groups: dict[str, list[PeraLayer]] = {}
    for name, layer in layers.items():
        groups.setdefault(group(name) if group else kind(name, layer), []).append(layer)
    loss, tokens = mean_loss(model, batches)

    def change(chosen: Iterable[PeraLayer], part: Part) -> float:
        with zeroed(chosen, part, adapter_name, others=layers.values()):
            return mean_loss(model, batches)[0] - loss

    with Cuts(model, adapter_name).at(None):
        at_rank_r = mean_loss(model, batches)[0] - loss
    parts = set().union(*(_parts(layer, adapter_name) for layer in layers.values()))
    products = "high_order" in parts
    return Effects(
        tokens=tokens,
        loss=loss,
        without={part: change(layers.values(), part) for part in get_args(Part) if part in parts},
        without_high_order={name: change(members, "high_order") for name, members in groups.items() if products},
        at_rank_r=at_rank_r,
    )


def run_effects(run: Run, *, examples: int = 64, batch_size: int = 8, ranks: bool = True) -> Effects:
    """Run :func:`adapter_effects` on the first held-out examples of a run's task, and write ``effect.json``.

    Args:
        run: a finished run with a PERA or LoRA adapter.
        examples: how many held-out examples are used.
        batch_size: examples per batch.
        ranks: whether the loss at lower ranks is measured.

    Raises:
        UserError: as for :func:`adapter_effects`, or the data changed since the training.
    """
    result = adapter_effects(locate_run(run), run.recipe, examples=examples, batch_size=batch_size, ranks=ranks)
    write_json(run.effect_file, asdict(result))
    return result


def adapter_effects(
    location: Location, recipe: Recipe, *, examples: int = 64, batch_size: int = 8, ranks: bool = True
) -> Effects:
    """Run :func:`effects`, if it is a PERA adapter, and :func:`fullness` on the first held-out examples of a task.

    The computation is in float32: the rounding of bfloat16 would hide small effects.

    Args:
        location: a PERA or LoRA adapter, with or without a run.
        recipe: the recipe with the task. Only its ``task`` and ``training.max_length`` are used.
        examples: how many held-out examples are used.
        batch_size: examples per batch.
        ranks: whether the loss at lower ranks is measured.

    Raises:
        UserError: the adapter is of another method, a variant of LoRA or broken, or an example does not fit the model.
    """
    adapter = location.require_adapter()
    diagnose_adapter(adapter)  # refuses other adapters before the model is loaded
    if adapter.labels != recipe.task.labels:
        made, asked = (f"a head of {n} outputs" if n else "no head" for n in (adapter.labels, recipe.task.labels))
        raise UserError(f"task.name={recipe.task.name!r} needs {asked}, but {location.name!r} has {made}.")
    model, batches = _held_out(location, recipe, examples, batch_size)
    if adapter.is_pera:
        with stage("measuring the effect of the terms"):
            result = effects(model, batches)
    else:
        loss, tokens = mean_loss(model, batches)
        result = Effects(tokens, loss, without={}, without_high_order={})
    if ranks:
        known = _learned(location, result.loss)
        with stage("measuring the needed rank"):
            found = fullness(Cuts(model), lambda: mean_loss(model, batches)[0], frequency_loss(batches), known)
        result = replace(result, fullness=found)
    return result


def _learned(location: Location, loss: float) -> Learned | str:
    run = location.run
    if run is None:
        return "An adapter folder does not have the losses of the first epoch; the folder of a run has them."
    if run.recipe.task.labels == 1:
        return "The loss of a regression does not count bits."
    return learned(run.metrics(), loss, sum(run.adapter.sizes.values()))


def run_loss(run: Run, *, examples: int | None = None, batch_size: int = 32) -> float:
    """Loss per label of a run's adapter on the held-out examples of its task, in float32.

    Args:
        run: a finished run.
        examples: how many held-out examples are used, from the first. None means all.
        batch_size: examples per batch.
    """
    return mean_loss(*held_out(run, examples, batch_size))[0]


def held_out(run: Run, examples: int | None, batch_size: int) -> tuple[Any, list[dict[str, Tensor]]]:
    """The model of a run in float32, and held-out examples of its task in batches, sorted by length.

    Args:
        run: a finished run.
        examples: how many held-out examples are used, from the first. None means all.
        batch_size: examples per batch.
    """
    return _held_out(locate_run(run), run.recipe, examples, batch_size)


def _held_out(
    location: Location, recipe: Recipe, examples: int | None, batch_size: int
) -> tuple[Any, list[dict[str, Tensor]]]:
    splits = recipe.build_splits()
    if location.run is not None:
        location.run.check_data(splits.manifest)
    model, tokenizer = open_model(location, "float32")
    limit = min(recipe.training.max_length, longest_input(model, tokenizer))
    encoded = recipe.task.encode(tokenizer, splits.test[:examples], limit).rows
    check_tokens(model, tokenizer, (row["input_ids"] for row in encoded))
    encoded = sorted(encoded, key=lambda row: len(row["input_ids"]))
    collate = recipe.task.collator(tokenizer, model.get_base_model())
    device = next(model.parameters()).device
    batch_size = largest_batch(model, batch_size)
    batches = [
        {key: value.to(device) for key, value in collate(encoded[i : i + batch_size]).items()}
        for i in range(0, len(encoded), batch_size)
    ]
    return model, batches


def zeroed(
    layers: Iterable[PeraLayer], part: Part, adapter_name: str = "default", *, others: Iterable[PeraLayer] = ()
) -> AbstractContextManager[None]:
    """Context manager that sets the coefficients of ``part`` to zero, learned or fixed.

    Args:
        layers: the layers to change.
        part: the terms to zero.
        adapter_name: the adapter to change.
        others: layers that keep their coefficients even if they are tied to one of ``layers``.
    """
    kept = {layer: layer.factors(adapter_name) for layer in others}
    return with_factors(kept | {layer: _without(layer, part, adapter_name) for layer in layers}, adapter_name)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[float, int]:
    """Loss per label over all batches, and the number of labels that are not ignored.

    Raises:
        UserError: all labels are ignored.
    """
    total, tokens = 0.0, 0
    for batch in batches:
        count = count_labels(batch["labels"])
        if count:  # otherwise the loss is the mean over zero labels, NaN
            total += model(**batch).loss.item() * count
            tokens += count
    if not tokens:
        raise UserError(
            f"batches: all labels of the {len(batches)} batches are ignored ({IGNORED}); give examples with an answer."
        )
    return total / tokens, tokens


def frequency_loss(batches: list[dict[str, Tensor]]) -> float:
    """Loss per label of a guess that knows only how often each label occurs in the batches: the entropy of the labels,
    or the variance of real numbers."""
    every = [batch["labels"][:, 1:].flatten() if batch["labels"].dim() == 2 else batch["labels"] for batch in batches]
    labels = torch.cat(every)
    if labels.is_floating_point():
        return float(labels.double().var(correction=0))
    counts = torch.bincount(labels[labels != IGNORED]).double()
    return float(torch.special.entr(counts / counts.sum()).sum())


def _require_in_use(model: nn.Module, layers: Collection[PeraLayer], adapter_name: str) -> None:
    if not layers:
        known = sorted({name for module in model.modules() if isinstance(module, PeraLayer) for name in module.r})
        raise UserError(f"adapter_name={adapter_name!r} is not a PERA adapter of the model, which has {known}.")
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise UserError(f"adapter_name={adapter_name!r} is merged; call unmerge_adapter first.")
    if any(layer.disable_adapters for layer in layers):
        raise UserError(f"adapter_name={adapter_name!r} is disabled; enable the adapters first.")
    if any(adapter_name not in layer.active_adapters for layer in layers):
        raise UserError(f"adapter_name={adapter_name!r} is not active; call set_adapter first.")


def _parts(layer: PeraLayer, adapter_name: str) -> set[Part]:
    """The kinds of terms that the adapter of a layer has in addition to the linear part."""
    expansion = layer.expansion[adapter_name]
    products = coefficient_pairs(layer.r[adapter_name], expansion.terms)
    found: set[Part] = {"square" if i == j else "cross" for i, j in products}
    if products:
        found.add("high_order")
    if expansion.k:
        found.add("anchors")
    return found


def _without(layer: PeraLayer, part: Part, adapter_name: str) -> Factors:
    """The factors of the adapter, with a coefficient of 0 for each term of ``part``."""
    A, B, h = layer.factors(adapter_name)
    pairs = coefficient_pairs(layer.r[adapter_name], layer.expansion[adapter_name].terms)
    dropped = [part == "high_order" or part == ("square" if i == j else "cross") for i, j in pairs]
    dropped += [part == "anchors"] * layer.expansion[adapter_name].k
    kept = [not term for term in dropped]
    return A, B, h.detach() * torch.tensor(kept, dtype=h.dtype, device=h.device)
