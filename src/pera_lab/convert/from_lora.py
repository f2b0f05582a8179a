"""A trained LoRA as a PERA adapter with equal outputs, to go on training with high-order terms."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig

from pera.errors import UserError
from pera.lora import from_lora
from pera.polynomial import Normalization, Terms
from pera_lab import models
from pera_lab.adapters import Adapter
from pera_lab.card import write_card
from pera_lab.convert.verify import Agreement, compare, logits, prompts_of
from pera_lab.files import atomic_folder, require_free
from pera_lab.opening import copy_tokenizer, locate_adapter, open_model


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
        source: what :func:`pera_lab.opening.locate` takes, with a LoRA adapter.
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
    location = locate_adapter(source, trust_remote_code=trust_remote_code)
    adapter = location.require_adapter()
    config = adapter.config
    if not isinstance(config, LoraConfig):
        raise UserError(f"{source!r} is a {adapter.method} adapter; only a LoRA adapter is imported.")
    model, tokenizer = open_model(location, dtype)
    prompts = prompts_of(location)
    before = logits(model, tokenizer, prompts)
    converted = from_lora(model, terms=terms, normalization=normalization)
    with atomic_folder(output) as folder:
        converted.save_pretrained(str(folder))
        copy_tokenizer(location, folder)
        del model, converted
        after = logits(*open_model(location._replace(run=None, adapter=Adapter(folder)), dtype), prompts)
        agreement = compare(before, after, models.DTYPES[dtype])
        agreement.save(folder, of="PERA adapter", against=source)
        write_card(folder, "adapter", location._replace(run=None, adapter=Adapter(folder)), agreement.sentence())
    return agreement
