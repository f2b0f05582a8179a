"""Base models that are quantized while they are loaded, as ``model.quantization`` asks for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils.import_utils import is_bitsandbytes_available, is_torchao_available

from pera.errors import UserError
from pera.tuner.layers import is_packed
from pera_lab.extras import missing_extra

Quantization = Literal["nf4", "fp4", "int8", "torchao-int8"]
"""nf4 and fp4 take about 4 bits per weight, int8 (LLM.int8()) takes 8; these are from bitsandbytes. torchao-int8 takes
8 bits per weight and, unlike int8, leaves the inputs of layers as they are."""


def quantizer(
    kind: Quantization, name: str, config: Any, dtype: torch.dtype | None, whole: Iterable[str] | None
) -> BitsAndBytesConfig | TorchAoConfig:
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
        UserError: the package is missing or too old, or the stored model is quantized already.
    """
    if (stored := getattr(config, "quantization_config", None)) is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored
        raise UserError(
            f"model.quantization={kind!r}: {name!r} is already quantized ({method}); leave quantization out, or give "
            "the model before quantization."
        )
    check_installed(kind)
    skipped = None if whole is None else sorted(whole)
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)
    options: dict[str, Any] = {"llm_int8_skip_modules": skipped}
    if kind == "int8":
        options["load_in_8bit"] = True
    else:
        options |= {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": True}
        options["bnb_4bit_compute_dtype"] = dtype or config.dtype or torch.float32
    return BitsAndBytesConfig(**options)  # type: ignore[no-untyped-call]


def check_installed(kind: Quantization) -> None:
    """Raise UserError if the package that quantizes is missing or too old."""
    if kind == "torchao-int8":
        package, installed = "torchao", is_torchao_available()
    else:
        package, installed = "bitsandbytes", is_bitsandbytes_available()
    if not installed:
        raise UserError(f"model.quantization={kind!r}: {missing_extra(package, 'quantized')}")


def check_quantized(kind: Quantization, name: str, model: nn.Module) -> None:
    """Raise UserError if no layer of a loaded model is quantized, as torchao leaves the transposed layers of GPT-2."""
    if not any(is_packed(weight) for weight in model.parameters()):
        raise UserError(
            f"model.quantization={kind!r}: {name!r} has no layer that this quantizes; give another kind, such as nf4 "
            "or int8, or leave quantization out."
        )


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
