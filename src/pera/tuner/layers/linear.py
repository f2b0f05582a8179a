"""PERA on a linear layer: y = x Wᵀ + s · x (B̂ Â)ᵀ."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pera.tuner.config import PeraConfig
from pera.tuner.layers.base import PeraLayer


class PeraLinear(PeraLayer):
    """An ``nn.Linear``, plain or quantised, with PERA adapters."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: PeraConfig, r: int, alpha: float | None, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, alpha, config=config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``(..., in_features)`` → ``(..., out_features)`` in the dtype of the base layer's output."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in self.active_adapters:
            if name in self.pera_A and name not in self.merged_adapters:
                result = result + self.adapter_output(name, x).to(dtype)
        return result

    def __repr__(self) -> str:
        return "pera." + super().__repr__()
