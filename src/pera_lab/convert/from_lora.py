"""Import a trained LoRA as a PERA adapter with equal outputs, to continue its training with high-order terms."""

from __future__ import annotations

from copy import copy
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
from pera_lab.adapters import Adapter
from pera_lab.card import write_card
from pera_lab.convert.verify import Agreement, compare, logits, prompts_of
from pera_lab.files import atomic_folder, require_free
from pera_lab.opening import Location, copy_tokenizer, open_model

_RENAMED = {
    "lora_A.weight": "pera_A",
    "lora_B.weight": "pera_B",
    "lora_embedding_A": "pera_A",
    "lora_embedding_B": "pera_B",
}


def import_lora(
    location: Location,
    output: Path,
    *,
    terms: Terms = "all",
    normalization: Normalization = "rms",
    dtype: str = "float32",
) -> Agreement:
    """Write a LoRA as a PERA adapter, and check that the outputs agree.

    A, B and the scale stay as they are, and h is zero, so ΔW = s BA. With ``normalization="rms"`` the products have the
    scale of one factor, so h has a gradient of that scale when training continues.

    Args:
        location: the LoRA and its base model.
        output: folder to write. It holds the adapter in PEFT's format, ``verification.json`` and a model card.
        terms: products that the adapter can learn from now on, "all", "square" or "cross".
        normalization: normalization of the products; see :mod:`pera.polynomial`.
        dtype: dtype of the check, a key of :data:`pera_lab.models.DTYPES`.

    Returns:
        The comparison of the PERA adapter, read back from the disk, with the LoRA.

    Raises:
        UserError: the adapter is not a LoRA, is broken, or uses an option that PERA lacks, such as DoRA; ``terms``
            leave no product; the output exists.
    """
    require_free(output)
    adapter = location.require_adapter()
    config = adapter.config
    if not isinstance(config, LoraConfig):
        raise UserError(f"{location.name!r} is a {adapter.method} adapter; only a LoRA adapter can be imported.")
    if terms == "none":
        raise UserError("--terms none leaves no products to learn; use all, square or cross.")
    for key in ("target_parameters", "lora_bias"):
        if value := getattr(config, key):
            raise UserError(f"{location.name!r} has {key}={value!r}, which cannot be imported; merge it instead.")
    model, tokenizer = open_model(location, dtype)
    prompts = prompts_of(location)
    before = logits(model, tokenizer, prompts)
    ours = _configuration(config, terms, normalization)
    weights = _as_pera(adapter.weights)
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
        written = location._replace(run=None, adapter=Adapter(folder))
        agreement = compare(before, logits(*open_model(written, dtype), prompts), models.DTYPES[dtype])
        agreement.save(folder, of="PERA adapter", against=location.name)
        write_card(folder, "adapter", written, agreement.sentence())
    return agreement


def _configuration(config: LoraConfig, terms: Terms, normalization: Normalization) -> PeraConfig:
    """The configuration of the PERA adapter. How the LoRA was initialized no longer matters."""
    plain = copy(config)
    plain.init_lora_weights = True
    ours = PeraConfig.from_lora(plain, terms=terms, normalization=normalization)
    ours.base_model_name_or_path, ours.task_type = config.base_model_name_or_path, config.task_type
    return ours


def _as_pera(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a LoRA under the names that PERA gives them."""
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
    """h of each layer, under the name that PEFT gives it in a file."""
    return {name.removesuffix(".default"): weight for name, weight in model.named_parameters() if ".pera_h." in name}
