"""Import a trained LoRA as a PERA adapter with equal outputs, to continue its training with high-order terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig

from pera.errors import UserError
from pera.lora import from_lora
from pera.polynomial import Normalization, Terms
from pera_lab import models
from pera_lab.adapters import Adapter
from pera_lab.card import write_card
from pera_lab.convert.verify import Agreement, compare, logits, prompts_of
from pera_lab.files import atomic_folder, require_free, reserved
from pera_lab.mlx import MlxAdapter
from pera_lab.opening import Location, before_quantization, copy_tokenizer, open_model


def import_lora(
    location: Location,
    output: Path,
    *,
    form: Literal["lora", "mlx"] | None = None,
    terms: Terms = "all",
    normalization: Normalization | None = None,
    anchors: int = 0,
    anchor_seed: int = 0,
    dtype: str = "float32",
) -> Agreement:
    """Write a LoRA as a PERA adapter, and check that the outputs agree.

    The conversion is :func:`pera.lora.from_lora`: A, B and the scale stay as they are, and h is zero.

    Args:
        location: the LoRA and its base model.
        output: folder to write. It holds the adapter in PEFT's format, ``verification.json`` and a model card.
        form: what the LoRA should be: "lora" for PEFT's format, "mlx" for mlx-lm's, None for either.
        terms: products of the new adapter, "all", "square" or "cross"; with anchors also "none".
        normalization: normalization of the products; None means "rms" if there are products.
        anchors, anchor_seed: frozen rows of the new adapter; see :class:`pera.PeraConfig`.
        dtype: dtype of the check, a key of :data:`pera_lab.models.DTYPES`.

    Returns:
        The comparison of the PERA adapter, read back from the disk, with the LoRA.

    Raises:
        UserError: the adapter is not a LoRA, is broken, or uses an option that PERA lacks, such as DoRA; ``terms``
            leave no product and there are no anchors; the output exists or another process writes it.
    """
    with reserved(output):
        require_free(output)
        options = {"terms": terms, "normalization": normalization, "anchors": anchors, "anchor_seed": anchor_seed}
        _check_form(location, form)
        return _import_lora(before_quantization(location), output, options, dtype)


def _check_form(location: Location, form: Literal["lora", "mlx"] | None) -> None:
    found = "mlx" if isinstance(location.require_adapter(), MlxAdapter) else "lora"
    if form not in (None, found):
        names = {"lora": "an adapter in PEFT's format", "mlx": "an adapter of mlx-lm"}
        raise UserError(f"--from {form}: {location.name!r} is {names[found]}; use --from {found}.")


def _import_lora(location: Location, output: Path, options: dict[str, Any], dtype: str) -> Agreement:
    """:func:`import_lora` to a folder that no other process writes."""
    adapter = location.require_adapter()
    if not isinstance(adapter.config, LoraConfig):
        raise UserError(f"{location.name!r} is a {adapter.method} adapter; only a LoRA adapter can be imported.")
    model, tokenizer = open_model(location, dtype, needs_tokenizer=False)
    prompts = prompts_of(location)
    before = logits(model, tokenizer, prompts)
    converted = from_lora(model, **options)
    with atomic_folder(output) as folder:
        converted.save_pretrained(str(folder))
        copy_tokenizer(location, folder)
        del model, converted
        written = location._replace(run=None, adapter=Adapter(folder))
        agreement = compare(
            before, logits(*open_model(written, dtype, needs_tokenizer=False), prompts), models.DTYPES[dtype]
        )
        agreement.save(folder, of="PERA adapter", against=location.name)
        write_card(folder, "adapter", written, agreement.sentence())
    return agreement
