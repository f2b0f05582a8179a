"""A trained LoRA as a PERA adapter with equal outputs, to go on training with high-order terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from pera.errors import UserError
from pera.polynomial import Normalization, Terms
from pera.tuner import PeraConfig
from pera_lab import models
from pera_lab.card import write_card
from pera_lab.convert.verify import Agreement, compare, logits, prompts_of
from pera_lab.files import atomic_folder, require_free
from pera_lab.runs import adapter_config, adapter_weights, copy_tokenizer, locate_adapter, method_name, open_model

_RENAMED = {
    "lora_A.weight": "pera_A",
    "lora_B.weight": "pera_B",
    "lora_embedding_A": "pera_A",
    "lora_embedding_B": "pera_B",
}


def import_lora(
    source: str,
    output: Path,
    *,
    terms: Terms = "all",
    normalization: Normalization = "rms",
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Agreement:
    """Write the LoRA of a run or an adapter folder as a PERA adapter, and check that the outputs agree.

    A and B stay as they are and h is zero, so that ΔW = s BA. The scale and all that is not about products is
    carried over; with ``normalization="rms"`` the products have the scale of one factor, and h a gradient to match,
    once training goes on.

    Args:
        source: what :func:`pera_lab.runs.locate` takes, with a LoRA adapter.
        output: folder to write: PEFT's format, ``verification.json``.
        terms: products that take part from now on, "all", "square" or "cross".
        normalization: of the products: "rms", "centred" or "none".
        dtype: what the check is computed in, a key of :data:`pera_lab.models.DTYPES`.
        trust_remote_code: run code that comes with the base, also where no recipe says so.

    Raises:
        UserError: there is no LoRA, it is broken, it uses what PERA lacks (DoRA, fused experts, …), or ``terms`` leave
            no product; the output cannot be written.
    """
    require_free(output)
    location, adapter = locate_adapter(source, trust_remote_code=trust_remote_code)
    config = adapter_config(adapter)
    if not isinstance(config, LoraConfig):
        raise UserError(f"{source!r} is a {method_name(config)} adapter; only a LoRA adapter is imported.")
    if terms == "none":
        raise UserError("--terms none leaves no products to wake; use all, square or cross.")
    for key in ("target_parameters", "lora_bias"):
        if value := getattr(config, key):
            raise UserError(f"{source!r} has {key}={value!r}, which is not imported; merge it instead.")
    model, tokenizer = open_model(location, dtype)
    prompts = prompts_of(location)
    before = logits(model, tokenizer, prompts)
    ours = _configuration(config, terms, normalization)
    weights = _as_pera(adapter_weights(adapter))
    base: Any = model.unload()
    fresh = get_peft_model(base, ours)
    for key, h in _coefficients(fresh).items():
        weights[key] = torch.zeros_like(h)
    with atomic_folder(output) as folder:
        save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        ours.inference_mode = True
        ours.save_pretrained(str(folder))
        copy_tokenizer(location, folder)
        del model, base, fresh
        after = logits(*open_model(location._replace(run=None, adapter=folder), dtype), prompts)
        agreement = compare(before, after, models.DTYPES[dtype])
        agreement.save(folder, of="PERA adapter", against=source)
        write_card(folder, "adapter", location._replace(run=None, adapter=folder), agreement.sentence())
    return agreement


def _configuration(config: LoraConfig, terms: Terms, normalization: Normalization) -> PeraConfig:
    """The configuration of the PERA adapter. How the LoRA's first values were drawn does not matter any more."""
    config.init_lora_weights = True
    ours = PeraConfig.from_lora(config, terms=terms, normalization=normalization)
    ours.base_model_name_or_path, ours.task_type = config.base_model_name_or_path, config.task_type
    return ours


def _as_pera(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, weight in weights.items():
        ending = next((ending for ending in _RENAMED if key.endswith(f".{ending}")), None)
        if ending is None:
            renamed[key] = weight
            continue
        matrix = weight.flatten(1) if weight.ndim > 2 else weight  # kernels of a convolution
        renamed[f"{key.removesuffix(ending)}{_RENAMED[ending]}"] = matrix.contiguous()
    return renamed


def _coefficients(model: PeftModel) -> dict[str, Tensor]:
    """h of each layer, as PEFT names it in a file."""
    return {name.removesuffix(".default"): weight for name, weight in model.named_parameters() if ".pera_h." in name}
