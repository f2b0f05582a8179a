"""The adapted layers, one file for each kind of base layer, and the choice between them."""

from __future__ import annotations

from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from pera.errors import UserError
from pera.tuner.behaviour import departure, layers_within
from pera.tuner.layers.base import BASE, PeraLayer, require_one_name_each
from pera.tuner.layers.convolution import PeraConvolution
from pera.tuner.layers.embedding import PeraEmbedding
from pera.tuner.layers.linear import PeraConv1DLinear, PeraLinear
from pera.tuner.layers.parameter import ParamWrapper
from pera.tuner.layers.quantised import is_packed, keep_unpacked, of_torchao
from pera.tuner.names import plain_name

__all__ = [
    "BASE",
    "ParamWrapper",
    "PeraConv1DLinear",
    "PeraConvolution",
    "PeraEmbedding",
    "PeraLayer",
    "PeraLinear",
    "adapted_layers",
    "is_packed",
    "keep_unpacked",
    "layer_class",
    "of_torchao",
    "require_one_name_each",
]


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, PeraLayer]:
    """Return the layers that an adapter changes, by their name in ``model``."""
    return {
        plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, PeraLayer) and module.has(adapter_name)
    }


def layer_class(base_layer: nn.Module, name: str, quantization: dict[str, object]) -> type[PeraLayer]:
    """Return the class of the adapted layer for a base layer.

    A quantized linear layer of any library that PEFT supports takes the plain linear one.

    Args:
        base_layer: the layer to adapt.
        name: its name in error messages.
        quantization: PEFT's ``get_quantization_kwargs`` of the model.

    Raises:
        UserError: this kind of layer is not supported, or its adapter would be ignored or wrong.
    """
    inside = layers_within(base_layer, name)
    if name in map(plain_name, inside):
        raise UserError(
            f"target_modules: {name!r} is in a {type(base_layer).__name__}, which would ignore an adapter; add the "
            "adapter before you compile or wrap the layer."
        )
    if (reason := departure(base_layer, quantization)) is not None:
        raise UserError(f"target_modules: {name!r} {reason}")
    if isinstance(base_layer, nn.Embedding):
        return PeraEmbedding
    if isinstance(base_layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return PeraConvolution
    if isinstance(base_layer, Conv1D):
        return PeraConv1DLinear
    if isinstance(base_layer, nn.Linear):
        return PeraLinear
    backend = resolve_quantization_backend(base_layer, **quantization)
    if backend is not None and backend.layer_type == "linear":
        return PeraLinear
    if inside:
        raise UserError(
            f"target_modules: {name!r} is a {type(base_layer).__name__}, which is not a layer but holds layers; name "
            f"{' and '.join(map(repr, inside[:3]))} instead."
        )
    raise UserError(
        f"target_modules: {name!r} is a {type(base_layer).__name__}, which PERA does not support; supported are "
        "torch.nn.Linear, plain or quantised, Embedding, Conv1d, Conv2d, Conv3d, and transformers' Conv1D."
    )
