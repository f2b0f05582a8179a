"""Layers that share a weight, such as input and output embeddings: train one adapter, or separate the weights."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from typing import Any

from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pera.errors import UserError
from pera.tuner.layers import PeraLayer


def without(names: set[str] | list[str], keys: set[str]) -> set[str]:
    """``names`` without the names that equal, or end, one of the full names ``keys``."""
    return {name for name in names if not any(key == name or key.endswith(f".{name}") for key in keys)}


def with_name(pattern: str, name: str) -> str:
    """A regular expression that matches everything ``pattern`` matches, and the full name ``name``."""
    return rf"(?:{pattern})|{re.escape(name)}"


def sharing_the_embedding(model: Any) -> list[str]:
    """Names, in the base model, of the input embedding and then of the modules that share its weight."""
    names = {
        re.sub(r"\.(base_layer|original_module|token_adapter)", "", name): id(module._parameters.get("weight"))
        for name, module in model.named_modules(remove_duplicate=False)
        if "weight" in module._parameters and ".modules_to_save." not in name
    }
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    return [embedding, *(name for name, weight in names.items() if weight == names[embedding] and name != embedding)]


def separate_shared_weights(model: nn.Module) -> list[str]:
    """Give each adapted layer its own copy of a weight that it shares with another module, and warn.

    Otherwise a merge would silently change the other module too. Layers that share one PERA adapter
    (``ensure_weight_tying``) keep the shared weight. Works for any PEFT method.

    Returns:
        The names of the layers that got a copy.
    """
    sharing: dict[int, dict[str, nn.Module]] = defaultdict(dict)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            sharing[id(weight)][name] = module
    adapted = {
        id(module.get_base_layer()): (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer)  # PEFT ties these
    }
    separated = []
    for modules in sharing.values():
        layers = [adapted[id(module)] for module in modules.values() if id(module) in adapted]
        if len(modules) > 1 and layers and not _tied_together([layer for _, layer in layers], len(modules)):
            for name, layer in layers:
                base: Any = layer.get_base_layer()
                if hasattr(base.weight, "device_mesh") and getattr(layer, "parallel", None) is None:
                    raise UserError(
                        f"{name!r} cannot be merged under FSDP2, because it shares its weight with another layer; save "
                        "the adapter and merge it in one process, or train with ensure_weight_tying=True."
                    )
                base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
                separated.append(name)
    if separated:
        warnings.warn(
            f"{', '.join(separated)}: the weight was shared with another layer and has been separated, because a merge "
            "would change both. To keep it shared, train with ensure_weight_tying=True.",
            stacklevel=3,
        )
    return separated


def _tied_together(adapted: list[BaseTunerLayer], count: int) -> bool:
    """Whether all ``count`` modules are adapted, and all but one use the adapter of that one."""
    layers = [layer for layer in adapted if isinstance(layer, PeraLayer)]
    sources = [layer for layer in layers if not layer.tied]
    return (
        len(layers) == count
        and len(sources) == 1
        and all(
            not layer.pera_A and layer.tied == dict.fromkeys(sources[0].pera_A, sources[0])
            for layer in layers
            if layer is not sources[0]
        )
    )
