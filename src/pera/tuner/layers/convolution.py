"""PERA on a convolution: the flattened kernels are the rows of a matrix, and ΔW is added to it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from pera.errors import UserError
from pera.linear import computation_dtype
from pera.tuner.layers.base import PeraLayer


class PeraConvolution(PeraLayer):
    """An ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` with PERA adapters.

    With flattened kernels the weight is a matrix ``(out_channels, in_channels / groups · kernel size)``. ``pera_A`` is
    ``(r, in_channels / groups · kernel size)`` and ``pera_B`` is ``(out_channels, r)``. The adapter convolves with the
    K kernels of Â, with the stride, padding, dilation and groups of the base. A convolution of size 1 with B̂ follows.
    Every group of channels uses all K kernels.
    """

    def _features(self) -> tuple[int, int]:
        base: Any = self.get_base_layer()
        self._kernel = base.in_channels // base.groups, *base.kernel_size
        return math.prod(self._kernel), base.out_channels

    def _to_base_layout(self, delta: Tensor) -> Tensor:
        return delta.reshape(-1, *self._kernel)

    @staticmethod
    def check_lora(base_layer: Any, name: str) -> None:
        for key, plain in (("groups", 1), ("dilation", (1,) * len(base_layer.dilation)), ("padding_mode", "zeros")):
            if getattr(base_layer, key) != plain:
                raise UserError(
                    f"{name!r} is a convolution with {key}={getattr(base_layer, key)!r}, which PEFT's LoRA ignores; "
                    "merge the adapter instead."
                )

    @staticmethod
    def as_lora(base_layer: Any, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        kernel = base_layer.kernel_size
        mixing = B.reshape(*B.shape, *[1] * len(kernel))
        return {"lora_A.weight": A.reshape(len(A), -1, *kernel), "lora_B.weight": mixing}

    def adapter_output(self, adapter_name: str, x: Tensor) -> Tensor:
        """Map ``(batch, in_channels, ...)`` to ``(batch, out_channels, ...)``, in the dtype of the computation."""
        base: Any = self.get_base_layer()
        dtype = computation_dtype(x)
        A_hat, weights, B_hat_T = self.expansions(adapter_name, dtype)
        weights = weights.unsqueeze(1) if isinstance(weights, Tensor) else weights
        kernels = (A_hat * weights).reshape(-1, *self._kernel)
        kernels = kernels.repeat(base.groups, *[1] * (kernels.ndim - 1))
        z = base._conv_forward(self.pera_dropout[adapter_name](x).to(dtype), kernels, None)
        mixing = B_hat_T.T.reshape(self.out_features, -1, *[1] * (kernels.ndim - 2))
        y: Tensor = _CONVOLUTIONS[kernels.ndim](z, mixing, groups=base.groups)
        return y


_CONVOLUTIONS = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}
