"""Base model and adapter into one plain model."""

from __future__ import annotations

from pathlib import Path

from pera.card import write_card
from pera.convert.verify import Agreement, compare, logits, prompts_of
from pera.errors import UserError
from pera.files import atomic_folder, require_free
from pera.models import load_model, saved_labels
from pera.runs import adapter_config, locate_adapter, method_name, open_model
from pera.tuner.tying import separate_shared_weights


def merge(source: str, output: Path, *, dtype: str = "stored") -> Agreement:
    """Merge the adapter of a run or an adapter folder into its base model and check that the outputs agree.

    A layer that shares its weight, as tied embeddings do, gets one of its own if the adapter is on it alone.
    The additions are made in float32 or better; the merged model, of the same architecture as the base,
    is written in the base's dtype unless told otherwise. It is read back from the disk for the check.
    The folder is kept when the check fails, so that it can be looked at.

    Args:
        source: what :func:`pera.runs.locate` takes, with an adapter.
        output: folder to write: model, tokenizer, ``verification.json``.
        dtype: dtype of the merged model, a key of :data:`pera.models.DTYPES`, or "stored".

    Raises:
        UserError: the adapter is broken or holds NaN, or the base is quantised; the output cannot be written.
    """
    require_free(output)
    location, adapter = locate_adapter(source)
    model, tokenizer = open_model(location, dtype)
    if not hasattr(model.base_model, "merge_and_unload"):
        method = method_name(adapter_config(adapter))
        raise UserError(f"{source!r} is a {method} adapter, which is no change of weights and cannot be merged.")
    if getattr(model.get_base_model(), "hf_quantizer", None) is not None:
        raise UserError(
            f"{source!r} sits on a quantised base, {location.base!r}, which would lose most of what was learned to "
            "rounding and cannot be saved; merge it into the base model before quantisation."
        )
    separate_shared_weights(model.base_model.model)
    prompts = prompts_of(location)
    before = logits(model, tokenizer, prompts)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"{source!r} cannot be merged: {error}.") from error
    with atomic_folder(output) as folder:
        merged.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        torch_dtype = next(merged.parameters()).dtype
        del model, merged
        after = logits(load_model(str(folder), dtype="stored", labels=saved_labels(str(folder))), tokenizer, prompts)
        agreement = compare(before, after, torch_dtype)
        agreement.save(folder, of="merged model", against=source)
        write_card(folder, "merged", location, agreement.sentence())
    return agreement
