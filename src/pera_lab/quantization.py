"""Base models that are quantized while they are loaded, as ``model.quantization`` asks for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils.import_utils import is_bitsandbytes_available

from pera.errors import UserError
from pera_lab.extras import missing_extra

Quantization = Literal["nf4", "fp4", "int8"]
"""nf4 and fp4 take about 4 bits per weight, int8 (LLM.int8()) takes 8. All of them are from bitsandbytes."""


def quantizer(
    kind: Quantization, name: str, config: Any, dtype: torch.dtype | None, whole: Iterable[str] | None
) -> BitsAndBytesConfig:
    """The settings with which transformers quantizes a model while it loads the weights.

    The 4-bit kinds use double quantization: the scales of the blocks are quantized too, which saves 0.37 bits per
    weight.

    Args:
        kind: how the linear layers are quantized.
        name: the name of the model in messages.
        config: the configuration of the model.
        dtype: dtype of the computation; None for the dtype of the files.
        whole: names of the modules that keep their dtype. None keeps the output head, as transformers does.

    Raises:
        UserError: bitsandbytes is missing or too old, or the stored model is quantized already.
    """
    if (stored := getattr(config, "quantization_config", None)) is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored
        raise UserError(
            f"model.quantization={kind!r}: {name!r} is already quantized ({method}); leave quantization out, or give "
            "the model before quantization."
        )
    check_installed(kind)
    options: dict[str, Any] = {"llm_int8_skip_modules": None if whole is None else sorted(whole)}
    if kind == "int8":
        options["load_in_8bit"] = True
    else:
        options |= {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": True}
        options["bnb_4bit_compute_dtype"] = dtype or config.dtype or torch.float32
    return BitsAndBytesConfig(**options)  # type: ignore[no-untyped-call]


def check_installed(kind: Quantization) -> None:
    """Raise UserError if bitsandbytes is missing or too old."""
    if not is_bitsandbytes_available():
        raise UserError(f"model.quantization={kind!r}: {missing_extra('bitsandbytes', 'quantized')}")


def check_blocks(name: str, model: nn.Module) -> None:
    """Check that bitsandbytes computes what the 4-bit layers of a model hold.

    Its kernel for CPUs with AVX-512 assumes that each row of a weight begins a new block of 64 entries. In other rows
    it takes the scale of another block, and the error is half the size of the weight (bitsandbytes 0.50.2).

    Args:
        name: the name of the model in messages.
        model: the loaded model, on the device that computes it.

    Raises:
        UserError: the model is on the CPU, and the rows of a layer are not a multiple of a block.
    """
    for path, layer in model.named_modules():
        state: Any = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None and layer.weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
            raise UserError(
                f"model: {name!r}: {path} has {state.shape[-1]} inputs, and on a CPU bitsandbytes computes 4-bit "
                f"layers right only for multiples of {state.blocksize}; use a GPU, model.quantization=int8, or none."
            )
