"""PERA on a linear layer: y = x Wᵀ + s · x (B̂ Â)ᵀ, and on transformers' ``Conv1D``."""

from __future__ import annotations

from torch import Tensor

from pera.linear import computation_dtype, expanded_linear, pera_linear
from pera.tuner.layers.base import PeraLayer


class PeraLinear(PeraLayer):
    """An ``nn.Linear``, plain or quantized, with PERA adapters."""

    def adapter_output(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return s · dropout(x) ΔWᵀ, ``(..., out_features)``, in the dtype of the computation."""
        return self._applied(adapter_name, x, None)

    def add_adapter_output(self, result: Tensor, adapter_name: str, x: Tensor) -> Tensor:
        return self._applied(adapter_name, x, result)

    def _applied(self, adapter_name: str, x: Tensor, base: Tensor | None) -> Tensor:
        dtype = computation_dtype(x)
        x = self.pera_dropout[adapter_name](x)  # users may switch it on in evaluation
        if self._unchanging() and (base is None or base.dtype == dtype):
            return expanded_linear(x.to(dtype), self.expansions(adapter_name, dtype), base)
        factors = self.factors(adapter_name)
        form = self.expansion_on(factors[0].device, adapter_name)._asdict()
        return pera_linear(x, *factors, **form, scaling=self.scaling[adapter_name], base=base)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class PeraConv1DLinear(PeraLinear):
    """A ``Conv1D`` with PERA adapters: the linear layer of GPT-2, which stores its weight as (in, out)."""

    def _to_base_layout(self, delta: Tensor) -> Tensor:
        return delta.T
