"""PERA on a linear layer: y = x Wᵀ + s · x (B̂ Â)ᵀ."""

from __future__ import annotations

from torch import Tensor

from pera.linear import computation_dtype, expanded_linear, pera_linear
from pera.tuner.layers.base import PeraLayer


class PeraLinear(PeraLayer):
    """An ``nn.Linear``, plain or quantised, with PERA adapters."""

    def adapter_output(self, adapter_name: str, x: Tensor) -> Tensor:
        """s · dropout(x) ΔWᵀ, ``(..., in_features)`` → ``(..., out_features)``, in the dtype of the computation."""
        if self._unchanging():
            dtype = computation_dtype(x)
            return expanded_linear(x.to(dtype), *self.expansions(adapter_name, dtype))
        terms, normalization = self.expansion[adapter_name]
        return pera_linear(
            self.pera_dropout[adapter_name](x),
            *self.factors(adapter_name),
            terms=terms,
            normalization=normalization,
            scaling=self.scaling[adapter_name],
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True
