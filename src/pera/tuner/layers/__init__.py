"""The adapted layers, one file for each kind of base layer, and the choice among them."""

from __future__ import annotations

from peft.utils import resolve_quantization_backend
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from pera.tuner.layers.base import PeraLayer
from pera.tuner.layers.conv1d import PeraConv1DLinear
from pera.tuner.layers.linear import PeraLinear

__all__ = ["PeraConv1DLinear", "PeraLayer", "PeraLinear", "layer_class"]


def layer_class(base_layer: nn.Module) -> type[PeraLinear] | None:
    """The adapted layer for a base layer; None where there is none. Quantised linear layers, of any of the
    libraries PEFT knows, take the plain linear one."""
    if isinstance(base_layer, NonDynamicallyQuantizableLinear):  # of MultiheadAttention, which never calls it
        return None
    if isinstance(base_layer, nn.Linear):
        return PeraLinear
    if isinstance(base_layer, Conv1D):
        return PeraConv1DLinear
    backend = resolve_quantization_backend(base_layer)
    return PeraLinear if backend is not None and backend.layer_type == "linear" else None
