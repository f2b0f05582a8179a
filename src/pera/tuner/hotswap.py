"""Load the values of a saved adapter into a loaded one, without rebuilding the model."""

from __future__ import annotations

from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError

from pera.errors import UserError
from pera.tuner.config import PeraConfig
from pera.tuner.layers import adapted_layers
from pera.tuner.names import plain_name
from pera.tuner.saved import check_values
from pera.tuner.sharding import whole

_UNREADABLE = (ValueError, OSError, KeyError, TypeError, RuntimeError, EOFError, UnpicklingError, SafetensorError)
"""Errors that PEFT raises for a folder that is missing, truncated or of an unknown method."""


def hotswap_adapter(model: PeftModel, path: str, adapter_name: str = "default", **kwargs: Any) -> None:
    """Load the weights and the scale of a saved PERA adapter into a loaded one, in place.

    Modules and parameters stay the same objects, so a compiled model stays compiled and an optimizer keeps its
    parameters. Dropout stays as it is::

        model = PeftModel.from_pretrained(base, "adapters/french")
        hotswap_adapter(model, "adapters/german")   # same layers, ranks, terms, …

    Args:
        model: model with the adapter, not merged.
        path: folder or hub id of an adapter with the same layers, ranks, terms, coefficients, normalization and
            anchors.
        adapter_name: name of the adapter to replace.
        kwargs: arguments of ``PeftConfig.from_pretrained`` and ``load_peft_weights``, such as ``revision``.

    Raises:
        UserError: the adapter is not in the model or cannot be read from ``path``, it is merged, or the two adapters
            differ in more than values. The model is then unchanged.
    """
    if adapter_name not in getattr(model, "peft_config", {}):
        raise UserError(f"adapter {adapter_name!r} is not in the model; load one before you swap it.")
    try:
        config: Any = PeftConfig.from_pretrained(path, **kwargs)
        saved = load_peft_weights(path, device="cpu", **kwargs)
    except _UNREADABLE as error:
        raise UserError(f"{path!r} cannot be read as an adapter: {error}") from error
    layers = adapted_layers(model.get_base_model(), adapter_name)
    for layer in layers.values():
        layer.check_base_weight()
    weights = {plain_name(key): weight for key, weight in saved.items()}
    before: Any = model.peft_config[adapter_name]
    for name, other in ((repr(path), config), (f"adapter {adapter_name!r}", before)):
        if not isinstance(other, PeraConfig):
            raise UserError(f"{name} is a {type(other).__name__}, not a PERA adapter; use load_adapter instead.")
    expansion = ("terms", "coefficients", "normalization", "anchors", "anchor_seed")
    for key in (*expansion, "trainable_token_indices", "ensure_weight_tying"):
        here, there = getattr(before, key), getattr(config, key)
        if here != there:
            raise UserError(f"{path!r} has {key}={there!r}, the loaded adapter {here!r}; use load_adapter instead.")
    shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
    current = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    for key, weight in current.items():
        if shapes.pop(key, None) != (shape := tuple(weight.shape)):
            raise UserError(f"{path!r} does not have {key} of shape {shape}; use load_adapter instead.")
    base = dict(model.named_parameters(remove_duplicate=False))
    for key in sorted(shapes):  # with some adapters, PEFT also saves embeddings of the base
        there = base.get(key)
        here = None if there is None else whole(there).cpu()
        if here is None or here.shape != shapes[key] or not torch.equal(here, weights[key].to(here.dtype)):
            raise UserError(f"{path!r} has {key}, which the loaded adapter lacks; use load_adapter instead.")
    try:
        check_values({key: weights[key] for key in current})
    except UserError as error:
        raise UserError(f"{path!r}: {error}") from error
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise UserError(f"adapter {adapter_name!r} is merged; call unmerge_adapter first.")
    for key in ("inference_mode", "pera_dropout"):
        setattr(config, key, getattr(before, key))
    with torch.no_grad():
        set_peft_model_state_dict(model, {key: weights[key] for key in current}, adapter_name=adapter_name)
    for layer in layers.values():
        source = layer.tied.get(adapter_name, layer)
        r, alpha = config.layer_settings(next(name for name, other in layers.items() if other is source))
        layer.rescale(adapter_name, r if alpha is None else alpha, config.scaling(r, alpha))
    model.peft_config[adapter_name] = config
