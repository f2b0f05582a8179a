"""The kinds of layers that an adapter is looked at by, such as "q_proj"."""

from __future__ import annotations

import re

from pera.tuner import ParamWrapper, PeraLayer


def kind(name: str, layer: PeraLayer | None = None) -> str:
    """The last part of a layer's name that says something, or the parameter that ``layer`` adapts.

    Args:
        name: of the layer in the model, or of one of its experts in a file.
        layer: the layer itself, where there is one.
    """
    if isinstance(layer, ParamWrapper):
        return layer.parameter_name
    return re.sub(r"(\.(\d+|base_layer))+$", "", name).rpartition(".")[2]
