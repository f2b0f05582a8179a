"""What a quantized base needs before it is adapted."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def of_torchao(weight: Tensor) -> bool:
    """Whether a weight is packed by torchao. Its dtype is then the one that layers compute in."""
    return _library(weight) == "torchao"


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is packed by torchao or bitsandbytes."""
    return _library(weight) in ("torchao", "bitsandbytes")


def _library(weight: Tensor) -> str:
    return type(weight).__module__.partition(".")[0]


def keep_unpacked(model: nn.Module) -> None:
    """Keep the weights of bitsandbytes' 4-bit layers in the layout for training, merging and saving.

    On a CPU with avx512_bf16, the first evaluation of a layer packs its weight for a kernel that has no gradient with
    respect to its input. PEFT's merge then reads the packed bytes as if they were not packed (bitsandbytes 0.50.2, peft
    0.21.2). This function switches packing off and unpacks weights that are already packed. Their 4-bit codes are
    restored exactly; the scales of the blocks are rounded to bfloat16.
    """
    layer: Any
    for layer in model.modules():
        if not getattr(layer, "support_avx512bf16_for_cpu", False):
            continue
        layer.support_avx512bf16_for_cpu = False
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            layer.state_dict()  # unpacks the weight
            state = layer.weight.quant_state
            if state.absmax.ndim == 2:  # but leaves the scales transposed, unless they are quantized
                state.absmax = state.absmax.T.flatten().float()
