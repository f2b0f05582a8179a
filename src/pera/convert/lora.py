"""A PERA adapter as the LoRA of rank K that it equals, readable without pera."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from pera import models
from pera.card import write_card
from pera.convert.verify import Agreement, compare, logits, prompts_of
from pera.errors import UserError
from pera.files import atomic_folder, require_free
from pera.polynomial import lora_factors
from pera.runs import adapter_config, adapter_weights, locate_adapter, method_name, open_model
from pera.tuner import PeraConfig
from pera.tuner.saved import saved_factors


def export_lora(source: str, output: Path, *, dtype: str = "float32") -> Agreement:
    """Write the adapter of a run or an adapter folder as a LoRA in PEFT's format, and check that the outputs agree.

    Exact: h, normalization and scale are folded into the factors, in float64, and r = lora_alpha = K for every
    layer, without patterns; layers of smaller expanded rank are padded with zeros. The export is read
    back from the disk for the check, and kept when the check fails.

    Args:
        source: what :func:`pera.runs.locate` takes, with a PERA adapter.
        output: folder to write: ``adapter_config.json``, weights, ``verification.json``.
        dtype: what the check is computed in, a key of :data:`pera.models.DTYPES`.

    Raises:
        UserError: there is no PERA adapter, it is broken or not finite; the output cannot be written.
    """
    require_free(output)
    location, adapter = locate_adapter(source)
    config = adapter_config(adapter)
    if not isinstance(config, PeraConfig):
        raise UserError(f"{source!r} is a {method_name(config)} adapter; only a PERA adapter is exported to LoRA.")
    weights = fold(adapter_weights(adapter), config)
    with atomic_folder(output) as folder:
        save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        rank = max(w.shape[0] for key, w in weights.items() if key.endswith(".lora_A.weight"))
        lora_config(config, rank).save_pretrained(str(folder))
        prompts = prompts_of(location)
        before = logits(*open_model(location, dtype), prompts)
        after = logits(*open_model(location._replace(adapter=folder), dtype), prompts)
        agreement = compare(before, after, models.DTYPES[dtype])
        agreement.save(folder, of="LoRA export", against=source)
        write_card(folder, "lora", location, agreement.sentence())
    return agreement


def fold(weights: dict[str, Tensor], config: PeraConfig) -> dict[str, Tensor]:
    """The tensors of a saved PERA adapter as those of a LoRA.

    Args:
        weights: ``<layer>.pera_A`` ``(r, in)``, ``<layer>.pera_B`` ``(out, r)``, ``<layer>.pera_h``, and whatever
            else was saved (biases, further modules), which is passed on as it is.
        config: the adapter's configuration.

    Returns:
        ``<layer>.lora_A.weight`` ``(K, in)`` and ``<layer>.lora_B.weight`` ``(out, K)`` in float32, K the largest
        expanded rank of all layers.

    Raises:
        UserError: as :func:`pera.tuner.saved.saved_factors`.
    """
    folded: dict[str, Tensor] = {key: w for key, w in weights.items() if ".pera_" not in key}
    factors = {layer: lora_factors(*saved) for layer, saved in saved_factors(weights, config).items()}
    rank = max(A.shape[0] for A, _ in factors.values())
    for layer, (A, B) in factors.items():
        missing = rank - A.shape[0]
        folded[f"{layer}.lora_A.weight"] = pad(A, (0, 0, 0, missing)).float().contiguous()
        folded[f"{layer}.lora_B.weight"] = pad(B, (0, missing)).float().contiguous()
    return folded


def lora_config(config: PeraConfig, rank: int) -> LoraConfig:
    """The configuration of the LoRA of rank K that equals a PERA adapter: same modules, r = lora_alpha = K."""
    carried: dict[str, Any] = {
        key: getattr(config, key)
        for key in (
            "task_type",
            "base_model_name_or_path",
            "revision",
            "target_modules",
            "exclude_modules",
            "modules_to_save",
            "layers_to_transform",
            "layers_pattern",
        )
    }
    bias = "lora_only" if config.bias == "pera_only" else config.bias
    lora = LoraConfig(r=rank, lora_alpha=rank, bias=bias, inference_mode=True, **carried)
    for key in ("target_modules", "exclude_modules"):  # PEFT makes them sets, which are written in any order
        if isinstance(names := getattr(lora, key), set):
            setattr(lora, key, sorted(names))
    return lora
