"""The ratios of the high-order terms and of the anchors during training."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pera.polynomial import expand_A, expand_B, num_products
from pera.tuner import PeraLayer
from pera.tuner.sharding import fsdp_units, gathered, whole
from pera_lab.diagnose.factors import kind


class RatioCallback(TrainerCallback):
    """Adds ``high_order_ratio`` and, if there are anchors, ``anchor_ratio``, by kind of module, to the Trainer's logs.

    The callback does nothing for a model without PERA layers. Trackers that come earlier in the list of callbacks do
    not see the entries. ``history`` keeps the high-order ratios of all steps.

    Args:
        adapter_name: the adapter to measure. None means the active adapter.
    """

    def __init__(self, adapter_name: str | None = None) -> None:
        self.adapter_name = adapter_name
        self.history: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the Trainer after each logging step."""
        found = ratios(kwargs["model"], self.adapter_name)
        if found.high_order and "loss" in kwargs["logs"]:
            kwargs["logs"]["high_order_ratio"] = found.high_order
            if found.anchors:
                kwargs["logs"]["anchor_ratio"] = found.anchors
            self.history.append((state.global_step, found.high_order))


class Ratios(NamedTuple):
    """‖part‖_F / ‖linear parts‖_F over all layers of one kind, such as "q_proj", by kind.

    Kinds whose linear part is zero, as before the first step, are left out.
    """

    high_order: dict[str, float]
    """Of squares and crosses together."""
    anchors: dict[str, float]
    """Of the crosses with frozen rows, for the kinds that have some."""


def high_order_ratios(model: nn.Module, adapter_name: str | None = None) -> dict[str, float]:
    """The high-order part of :func:`ratios`."""
    return ratios(model, adapter_name).high_order


@torch.no_grad()
def ratios(model: nn.Module, adapter_name: str | None = None) -> Ratios:
    """Compare the parts of ΔW with its linear part.

    The norms come from the K × K Gram matrices of the expansions, in O((m + n) K²) per layer. If the model is divided
    over processes, all of them have to call this.

    Args:
        model: a model with PERA layers.
        adapter_name: the adapter to measure. None means the active adapters.
    """
    norms: dict[str, list[float]] = {}
    anchored, units = set(), fsdp_units(model)
    adapted = [
        (name, layer, adapter)
        for name, layer in model.named_modules()
        if isinstance(layer, PeraLayer)
        for adapter in (layer.active_adapters if adapter_name is None else [adapter_name])
        if layer.has(adapter)
    ]
    for name, layer, adapter in adapted:
        source = layer.tied.get(adapter, layer)
        with gathered(source, units.get(source)):
            A, B, h = (whole(factor).clone() for factor in layer.factors(adapter))
        r, s = A.shape[-2], layer.scaling[adapter]
        A_hat, B_hat = expand_A(A, h, *layer.expansion[adapter]), expand_B(B, *layer.expansion[adapter])
        gram = s * s * (A_hat @ A_hat.mT) * (B_hat.mT @ B_hat)
        end = r + num_products(r, layer.expansion[adapter].terms)
        found = norms.setdefault(key := kind(name, layer), [0.0, 0.0, 0.0])
        for i, part in enumerate((slice(0, r), slice(r, end), slice(end, None))):
            found[i] += gram[..., part, part].sum().item()
        if layer.expansion[adapter].k:
            anchored.add(key)
    high_order, anchors = (
        {key: (max(parts[i], 0.0) / parts[0]) ** 0.5 for key, parts in norms.items() if parts[0] > 0} for i in (1, 2)
    )
    return Ratios(high_order, {key: ratio for key, ratio in anchors.items() if key in anchored})
