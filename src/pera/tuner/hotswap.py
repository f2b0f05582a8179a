"""Another adapter in the place of one that is loaded, without touching the model around it."""

from __future__ import annotations

from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError

from pera.errors import UserError
from pera.tuner.config import PeraConfig
from pera.tuner.layers import adapted_layers

_UNREADABLE = (ValueError, OSError, KeyError, TypeError, RuntimeError, EOFError, UnpicklingError, SafetensorError)
"""What PEFT lets through of a folder that is missing, cut off or of an unknown method."""


def hotswap_adapter(model: PeftModel, path: str, adapter_name: str = "default", **kwargs: Any) -> None:
    """Replace the weights and the scale of a loaded PERA adapter by those of a saved one, in place. Its dropout
    stays.

    No module and no parameter is replaced, so that a compiled model stays compiled and an optimizer keeps its
    parameters. Everything is checked first: on an error nothing has changed.

    Args:
        model: a model with the adapter, not merged.
        path: folder of an adapter, or hub id, with the same layers, ranks and expansion.
        adapter_name: name of the adapter to replace.
        kwargs: for ``PeftConfig.from_pretrained`` and ``load_peft_weights``, such as ``revision``.

    Raises:
        UserError: there is no such adapter in the model or at ``path``, it is merged, or the two differ in more
            than values.
    """
    if adapter_name not in getattr(model, "peft_config", {}):
        raise UserError(f"adapter {adapter_name!r} is not in the model; load one before swapping.")
    try:
        config: Any = PeftConfig.from_pretrained(path, **kwargs)
        weights = load_peft_weights(path, device="cpu", **kwargs)
    except _UNREADABLE as error:
        raise UserError(f"{path!r} is no adapter that can be read: {error}") from error
    before: Any = model.peft_config[adapter_name]
    for name, other in ((repr(path), config), (f"adapter {adapter_name!r}", before)):
        if not isinstance(other, PeraConfig):
            raise UserError(f"{name} is a {type(other).__name__}, not a PERA adapter; load it instead of swapping.")
    for key in ("terms", "coefficients", "normalization", "trainable_token_indices", "ensure_weight_tying"):
        here, there = getattr(before, key), getattr(config, key)
        if here != there:
            raise UserError(f"{path!r} has {key}={there!r}, the loaded adapter {here!r}; load it instead of swapping.")
    shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
    current = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    for key, weight in current.items():
        if shapes.pop(key, None) != (shape := tuple(weight.shape)):
            raise UserError(f"{path!r} does not have {key} of shape {shape}; load it instead of swapping.")
    base = dict(model.named_parameters(remove_duplicate=False))
    for key in sorted(shapes):  # PEFT saves embeddings of the base with some adapters
        there = base.get(key)
        if there is None or there.shape != shapes[key] or not torch.equal(there.cpu(), weights[key].to(there.dtype)):
            raise UserError(f"{path!r} has {key}, which the loaded adapter lacks; load it instead of swapping.")
    if broken := [key for key in current if not torch.isfinite(weights[key]).all()]:
        raise UserError(f"{path!r}: NaNs detected in the weights of {broken[0]}. The adapter seems to be broken.")
    layers = adapted_layers(model.get_base_model(), adapter_name)
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
