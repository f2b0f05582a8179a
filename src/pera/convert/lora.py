"""A PERA adapter as the LoRA of rank K that it equals, readable without pera."""

from __future__ import annotations

from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from pera import models
from pera.card import write_card
from pera.convert.fold import fold
from pera.convert.verify import Agreement, compare, logits, prompts_of
from pera.errors import UserError
from pera.files import atomic_folder, require_free
from pera.runs import adapter_config, adapter_weights, locate_adapter, method_name, open_model
from pera.tuner import PeraConfig


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
        UserError: there is no PERA adapter, it is broken or not finite, LoRA lacks a kind of layer in it; the output
            cannot be written.
    """
    require_free(output)
    location, adapter = locate_adapter(source)
    config = adapter_config(adapter)
    if not isinstance(config, PeraConfig):
        raise UserError(f"{source!r} is a {method_name(config)} adapter; only a PERA adapter is exported to LoRA.")
    adapter_weights(adapter)  # refuses what is broken or not finite
    model, tokenizer = open_model(location, dtype)
    lora, weights = fold(model)
    for key in ("target_modules", "exclude_modules"):  # PEFT makes them sets, which are written in any order
        if isinstance(names := getattr(lora, key), set):
            setattr(lora, key, sorted(names))
    lora.inference_mode = True
    with atomic_folder(output) as folder:
        save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        lora.save_pretrained(str(folder))
        prompts = prompts_of(location)
        before = logits(model, tokenizer, prompts)
        del model
        after = logits(*open_model(location._replace(adapter=folder), dtype), prompts)
        agreement = compare(before, after, models.DTYPES[dtype])
        agreement.save(folder, of="LoRA export", against=source)
        write_card(folder, "lora", location, agreement.sentence())
    return agreement
