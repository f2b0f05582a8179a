"""PEFT's functions for quantized layers, which it has since version 0.20. With an older one they are refused."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pera.errors import UserError

__all__ = ["get_quantization_kwargs", "resolve_quantization_backend"]

try:
    from peft.utils import get_quantization_kwargs, resolve_quantization_backend
except ImportError:

    def get_quantization_kwargs(model: Any) -> dict[str, Any]:  # type: ignore[misc]
        """What PEFT 0.20 needs to know of a model to adapt its quantized layers: nothing here."""
        return {}

    def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> Any:  # type: ignore[misc]
        """None, for a plain layer; raises UserError for a quantized one."""
        weight = getattr(base_layer, "weight", None)
        plain = weight is None or (type(weight.data) in (torch.Tensor, DTensor) and weight.is_floating_point())
        if not plain or type(base_layer).__name__ == "HQQLinear":
            raise UserError(
                f"a quantized layer ({type(base_layer).__name__}) needs peft>=0.20, but {peft.__version__} is "
                "installed; upgrade peft, or load the model unquantized."
            )
        return None
