"""PERA on a linear layer: y = x Wᵀ + s · x (B̂ Â)ᵀ, and on transformers' ``Conv1D``."""

from __future__ import annotations

from torch import Tensor

from pera.linear import computation_dtype, expanded_linear, expansions, pera_linear, without_autocast
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
        if self.parallel is not None and self.parallel.side is not None:
            y = self._of_part(adapter_name, x.to(dtype))
            return y if base is None else base + y.to(base.dtype)
        if self._unchanging() and (base is None or base.dtype == dtype):
            return expanded_linear(x.to(dtype), self.expansions(adapter_name, dtype), base)
        factors = self.factors(adapter_name)
        form = self.expansion_on(factors[0].device, adapter_name)._asdict()
        return pera_linear(x, *factors, **form, scaling=self.scaling[adapter_name], base=base)

    def _of_part(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return the output of a tensor-parallel layer, of which this process has a part of the inputs or outputs.

        Each process computes with whole factors, so ρ is right, and their gradients become equal: with divided inputs,
        x Âᵀ is summed and the gradient of A too; with divided outputs, the gradients of x Âᵀ and of B.
        """
        parallel = self.parallel
        assert parallel is not None
        inputs = parallel.side == "in"
        if self._unchanging():
            A_hat, weights, B_hat_T = self.expansions(adapter_name, x.dtype)
        else:
            A, B, h = self.factors(adapter_name)
            A, B = (parallel.sum_gradient(A), B) if inputs else (A, parallel.sum_gradient(B))
            form = self.expansion_on(A.device, adapter_name)._asdict()
            A_hat, weights, B_hat_T = expansions(A, B, h, **form, scaling=self.scaling[adapter_name], dtype=x.dtype)
        with without_autocast(x):
            if inputs:
                return (parallel.sum(x @ parallel.part(A_hat).T) * weights) @ B_hat_T
            return parallel.sum_gradient(x @ A_hat.T * weights) @ parallel.part(B_hat_T)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class PeraConv1DLinear(PeraLinear):
    """A ``Conv1D`` with PERA adapters: the linear layer of GPT-2, which stores its weight as (in, out)."""

    def _to_base_layout(self, delta: Tensor) -> Tensor:
        return delta.T
