"""The high-order ratio during training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pera.polynomial import expand_A, expand_B, num_products
from pera.tuner import PeraLayer
from pera_lab.diagnose.factors import kind


class RatioCallback(TrainerCallback):
    """Adds ``high_order_ratio``, by kind of module, to the logs of transformers' Trainer.

    The callback does nothing for a model without PERA layers. Trackers that come earlier in the list of callbacks do
    not see the entry. ``history`` keeps it for all steps.

    Args:
        adapter_name: the adapter to measure. None means the active adapter.
    """

    def __init__(self, adapter_name: str | None = None) -> None:
        self.adapter_name = adapter_name
        self.history: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the Trainer after each logging step."""
        ratios = high_order_ratios(kwargs["model"], self.adapter_name)
        if ratios and "loss" in kwargs["logs"]:
            kwargs["logs"]["high_order_ratio"] = ratios
            self.history.append((state.global_step, ratios))


@torch.no_grad()
def high_order_ratios(model: nn.Module, adapter_name: str | None = None) -> dict[str, float]:
    """‖high-order parts‖_F / ‖linear parts‖_F over all layers of one kind, such as "q_proj", by kind.

    The norms come from the K × K Gram matrices of the expansions, in O((m + n) K²) per layer. Kinds whose linear part
    is zero, as before the first step, are left out.

    Args:
        model: a model with PERA layers.
        adapter_name: the adapter to measure. None means the active adapters.
    """
    norms: dict[str, tuple[float, float]] = {}
    adapted = [
        (name, layer, adapter)
        for name, layer in model.named_modules()
        if isinstance(layer, PeraLayer)
        for adapter in (layer.active_adapters if adapter_name is None else [adapter_name])
        if layer.has(adapter)
    ]
    for name, layer, adapter in adapted:
        A, B, h = layer.factors(adapter)
        r, s = A.shape[-2], layer.scaling[adapter]
        A_hat, B_hat = expand_A(A, h, *layer.expansion[adapter]), expand_B(B, *layer.expansion[adapter])
        gram = s * s * (A_hat @ A_hat.mT) * (B_hat.mT @ B_hat)
        products = slice(r, r + num_products(r, layer.expansion[adapter].terms))
        linear, high_order = norms.get(key := kind(name, layer), (0.0, 0.0))
        norms[key] = linear + gram[..., :r, :r].sum().item(), high_order + gram[..., products, products].sum().item()
    return {key: (max(high, 0.0) / linear) ** 0.5 for key, (linear, high) in norms.items() if linear > 0}
