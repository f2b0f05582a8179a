"""PERA on transformers' ``Conv1D``, the linear layer of GPT-2, which stores its weight as (in, out)."""

from __future__ import annotations

from torch import Tensor

from pera.tuner.layers.linear import PeraLinear


class PeraConv1DLinear(PeraLinear):
    """A ``Conv1D`` with PERA adapters; only the layout of the weight differs from a linear layer's."""

    def _to_base_layout(self, delta: Tensor) -> Tensor:
        return delta.T
