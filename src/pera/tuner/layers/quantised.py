"""What a quantised base needs before it can be adapted."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_unpacked(model: nn.Module) -> None:
    """Keep the weights of bitsandbytes' 4-bit layers in the layout in which they are trained, merged and saved.

    On a CPU with avx512_bf16, a layer's first evaluation packs its weight for a kernel that passes no gradient to
    its input; and PEFT's merge reads the packed bytes as if they were not packed (bitsandbytes 0.50.2, peft
    0.21.2). So this is switched off, and what an earlier evaluation has packed is unpacked: the 4-bit codes come
    back as they were, the scales of their blocks rounded to bfloat16.
    """
    layer: Any
    for layer in model.modules():
        if not getattr(layer, "support_avx512bf16_for_cpu", False):
            continue
        layer.support_avx512bf16_for_cpu = False
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            layer.state_dict()  # unpacks the weight
            state = layer.weight.quant_state
            if state.absmax.ndim == 2:  # but leaves the scales transposed, unless they are quantised themselves
                state.absmax = state.absmax.T.flatten().float()
