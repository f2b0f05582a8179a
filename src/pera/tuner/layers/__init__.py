"""The adapted layers, one file for each kind of base layer, and the choice between them."""

from __future__ import annotations

from peft.utils import resolve_quantization_backend
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from pera.errors import UserError
from pera.tuner.layers.base import BASE, PeraLayer, require_one_name_each
from pera.tuner.layers.convolution import PeraConvolution
from pera.tuner.layers.embedding import PeraEmbedding
from pera.tuner.layers.linear import PeraConv1DLinear, PeraLinear
from pera.tuner.layers.parameter import ParamWrapper
from pera.tuner.layers.quantised import keep_unpacked

__all__ = [
    "BASE",
    "ParamWrapper",
    "PeraConv1DLinear",
    "PeraConvolution",
    "PeraEmbedding",
    "PeraLayer",
    "PeraLinear",
    "adapted_layers",
    "keep_unpacked",
    "layer_class",
    "require_one_name_each",
]


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, PeraLayer]:
    """Return the layers that an adapter changes, by their name in ``model``."""
    return {
        name: module
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
    if isinstance(base_layer, (nn.MultiheadAttention, NonDynamicallyQuantizableLinear)):
        raise UserError(
            f"target_modules: {name!r} belongs to torch.nn.MultiheadAttention, which never calls the layer, so an "
            "adapter would be ignored; name its in_proj_weight in target_parameters instead."
        )
    if hasattr(base_layer, "weight") and "weight" not in base_layer._parameters:
        raise UserError(
            f"target_modules: {name!r} computes its weight in every forward, such as weight_norm does, so an adapter "
            "could not be merged; leave it out."
        )
    for cls in (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        own_forward = isinstance(base_layer, cls) and type(base_layer).forward is not cls.forward
        if own_forward and not hasattr(base_layer, "embed_scale"):
            raise UserError(
                f"target_modules: {name!r} is a {type(base_layer).__name__}, whose forward is different from "
                f"torch.nn.{cls.__name__}, so an adapter would be wrong; leave it out."
            )
    if isinstance(base_layer, nn.Embedding):
        if base_layer.max_norm is not None:
            raise UserError(
                f"target_modules: {name!r} has max_norm={base_layer.max_norm}, which changes its weight in every "
                "forward, so a merged adapter would differ; leave it out."
            )
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
    raise UserError(
        f"target_modules: {name!r} is a {type(base_layer).__name__}, which PERA does not support; supported are "
        "torch.nn.Linear, plain or quantised, Embedding, Conv1d, Conv2d, Conv3d, and transformers' Conv1D."
    )
