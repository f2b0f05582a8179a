"""Base model and adapter into one plain model."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from pera.errors import UserError
from pera.tuner import ParamWrapper, PeraConfig
from pera.tuner.tying import separate_shared_weights
from pera_lab.adapters import base_name
from pera_lab.card import write_card
from pera_lab.convert.checkpoint import (
    Checkpoint,
    empty_model,
    fill_adapter,
    sources,
    weights_on_demand,
    write_index,
)
from pera_lab.convert.verify import Agreement, compare, logits, prompts_of
from pera_lab.files import atomic_folder, read_object, require_free, write_json
from pera_lab.models import DTYPES, dequantise, local_folder, tokenizer_files
from pera_lab.opening import (
    Location,
    check_fingerprint,
    copy_tokenizer,
    locate_adapter,
    open_model,
    open_tokenizer,
)


def merge(
    source: str, output: Path, *, dtype: str = "stored", dequantised: bool = False, trust_remote_code: bool = False
) -> Agreement:
    """Merge the adapter of a run or an adapter folder into its base model and check that the outputs agree.

    The additions are made in float32 or better; the merged model, of the same architecture as the base and in
    files like the base's, is written in the base's dtype unless told otherwise. It is read back from the disk for the
    check. The folder is kept when the check fails, so that it can be looked at.

    A PERA or LoRA adapter is merged file by file, and the check reads each weight when it is wanted, so that memory
    stays near the largest file. In memory as a whole are merged: other methods, variants of LoRA and its
    initialisations that change the base, adapters on parameters, on weights that are shared, on tokens, and with other
    tokens than the base's; bases whose files transformers rearranges when it loads them, or that are quantised.
    A layer that shares its weight, as tied embeddings do, gets one of its own if the adapter is on it alone.

    Args:
        source: what :func:`pera_lab.opening.locate` takes, with an adapter.
        output: folder to write: model, tokenizer, ``verification.json``, model card.
        dtype: dtype of the merged model, a key of :data:`pera_lab.models.DTYPES`, or "stored".
        dequantised: dequantise a quantised base first, and write a plain model.
        trust_remote_code: run code that comes with the base, also where no recipe says so.

    Raises:
        UserError: the adapter is broken or holds NaN, or is for another base; the base is quantised, unless
            ``dequantised``, or it is not, with it; the sum is not finite in ``dtype``; the output cannot be written.
    """
    require_free(output)
    location = locate_adapter(source, trust_remote_code=trust_remote_code)
    adapter = location.require_adapter()
    config = adapter.config
    if config.is_prompt_learning:
        raise UserError(
            f"{source!r} is a {adapter.method} adapter, which is no change of weights and cannot be merged."
        )
    folder = local_folder(location.base, location.revision)
    quantised = "quantization_config" in read_object(folder / "config.json")
    if quantised and not dequantised:
        raise UserError(
            f"{source!r} sits on a quantised base, {location.base!r}, which would lose most of what was learned to "
            "rounding and cannot be saved; dequantise it first with --dequantise, or merge into the base model before "
            "quantisation."
        )
    if dequantised and not quantised:
        raise UserError(f"--dequantise: the base of {source!r}, {location.base!r}, is not quantised; leave it out.")
    streamed = None if quantised else _streamed(location, folder, config, dtype)
    if streamed is None:
        return _merge_in_memory(source, location, output, dtype, quantised)
    return _merge_by_files(source, location, output, folder, *streamed, dtype)


def _streamed(
    location: Location, folder: Path, config: PeftConfig, dtype: str
) -> tuple[Any, Checkpoint, torch.dtype] | None:
    """The model without its base's weights, and where they are; None if it has to be merged in memory."""
    if config.task_type == TaskType.SEQ_CLS:  # its head is no part of the base's files
        return None
    if not _factors_alone(config):
        return None
    if not any(folder.glob("*.safetensors")):
        return None
    checkpoint = Checkpoint(folder)
    first = next(key for keys in checkpoint.shards.values() for key in keys)
    computed = DTYPES[dtype] if dtype in DTYPES else checkpoint.read(first).dtype
    base = empty_model(checkpoint, computed, trust_remote_code=location.trust_remote_code)
    shared, found = _shared(base), sources(base, checkpoint)
    if found is None or not {key for keys in checkpoint.shards.values() for key in keys} <= set(base.state_dict()):
        return None
    check_fingerprint(location, base, lambda name: checkpoint.read(found[name]))
    adapter = location.require_adapter()
    if adapter.resized_to(base):
        return None
    model = adapter.load_on(base)
    fill_adapter(model, adapter.weights, computed)
    for name, module in model.get_base_model().named_modules():
        changed = isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))
        if isinstance(module, ParamWrapper) or (changed and base_name(f"{name}.weight") in shared):
            return None
    return model, checkpoint, computed


def _factors_alone(config: PeftConfig) -> bool:
    """Whether an adapter is PERA or plain LoRA on modules, with which the base stays as its files have it."""
    variants = [field.name for field in fields(config) if field.metadata.get("is_lora_variant")]
    further = ("trainable_token_indices", "target_parameters", "ensure_weight_tying", "lora_bias", *variants)
    return (
        type(config) in (PeraConfig, LoraConfig)  # not AdaLoRA's, which is a LoraConfig too
        and getattr(config, "init_lora_weights", True) in (True, False, "gaussian")  # others change it
        and not any(getattr(config, key, None) for key in further)
    )


def _shared(model: nn.Module) -> set[str]:
    """The names of weights that are one with another."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    return {name for same in names.values() if len(same) > 1 for name in same}


def _merge_by_files(
    source: str,
    location: Location,
    output: Path,
    base: Path,
    model: Any,
    checkpoint: Checkpoint,
    computed: torch.dtype,
    dtype: str,
) -> Agreement:
    tokenizer = open_tokenizer(location)
    prompts = prompts_of(location)
    with weights_on_demand(model, checkpoint, computed):
        before = logits(model, tokenizer, prompts)
    size = 0
    with atomic_folder(output) as folder:
        for name, keys in checkpoint.shards.items():
            merged = {key: _merged(model.get_base_model(), key, checkpoint.read(key), dtype, source) for key in keys}
            save_file(merged, folder / name, metadata={"format": "pt"})
            size += sum(weight.nbytes for weight in merged.values())
            del merged
        write_index(folder, checkpoint.shards, size)
        _copy_companions(base, folder, () if location.tokenizer is None else tokenizer_files(base))
        copy_tokenizer(location, folder)
        config = read_object(base / "config.json")
        if dtype != "stored":
            config.pop("torch_dtype", None)
            config["dtype"] = dtype
        write_json(folder / "config.json", config)  # last: without it the folder is no model
        del model
        gc.collect()
        written = Checkpoint(folder)
        plain = empty_model(written, computed, trust_remote_code=location.trust_remote_code)
        with weights_on_demand(plain, written, computed):
            after = logits(plain, tokenizer, prompts)
        return _finish(folder, source, location, compare(before, after, computed))


@torch.no_grad()
def _merged(base: nn.Module, key: str, weight: Tensor, dtype: str, source: str) -> Tensor:
    """The tensor ``key`` of the merged model, from that of the base model."""
    path, _, attribute = key.rpartition(".")
    owner: Any = base.get_submodule(path)
    stored = weight.dtype
    if isinstance(owner, ModulesToSaveWrapper):
        weight = getattr(owner.modules_to_save[owner.active_adapters[0]], attribute).detach()
    elif isinstance(owner, BaseTunerLayer):
        layer: Any = owner.get_base_layer()
        empty = layer._parameters[attribute]
        if attribute == "weight":
            layer.weight = nn.Parameter(weight.to(torch.promote_types(stored, torch.float32)), requires_grad=False)
            with _refusal(source):
                owner.merge(safe_merge=True)
            weight, layer.weight = layer.weight.detach(), empty
            owner.merged_adapters.clear()
        elif not empty.is_meta:  # a trained bias
            weight = empty.detach()
    elif (own := owner._parameters.get(attribute)) is not None and not own.is_meta:  # trained too
        weight = own.detach()
    if not weight.is_floating_point():
        return weight
    target = DTYPES.get(dtype, stored)
    result = weight.to(target)
    if result.dtype != weight.dtype and not torch.isfinite(result).all():
        raise UserError(f"{source!r} cannot be merged: {key} is beyond the range of {str(target)[6:]}; try bfloat16.")
    return result.contiguous()


def _merge_in_memory(source: str, location: Location, output: Path, dtype: str, quantised: bool) -> Agreement:
    model, tokenizer = open_model(location, "stored" if quantised else dtype)
    prompts = prompts_of(location)
    if quantised:
        before = logits(model, tokenizer, prompts)
        del model
        adapter = location.require_adapter()
        base, _ = open_model(location._replace(adapter=None, tokenizer=None), labels=adapter.labels)
        plain: Any = dequantise(base)
        model = adapter.load_on(plain.to(DTYPES.get(dtype, plain.dtype)))
    separate_shared_weights(model.base_model.model)
    if not quantised:
        before = logits(model, tokenizer, prompts)
    with _refusal(source):
        merged = model.merge_and_unload(safe_merge=True)
    with atomic_folder(output) as folder:
        merged.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        torch_dtype = next(merged.parameters()).dtype
        del model, merged
        written = Location(None, None, str(folder), trust_remote_code=location.trust_remote_code)
        after = logits(*open_model(written), prompts)
        return _finish(folder, source, location, compare(before, after, torch_dtype))


@contextmanager
def _refusal(source: str) -> Iterator[None]:
    """Turn what PEFT raises on weights that cannot take the adapter into one :class:`UserError`."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{source!r} cannot be merged: {' '.join(str(error).split()).rstrip('.')}.") from error


def _finish(folder: Path, source: str, location: Location, agreement: Agreement) -> Agreement:
    agreement.save(folder, of="merged model", against=source)
    write_card(folder, "merged", location, agreement.sentence())
    return agreement


def _copy_companions(base: Path, folder: Path, left_out: Collection[Path]) -> None:
    """Copy what belongs to the model beside its weights and configuration: tokenizer, chat template, generation
    settings, code; but not what is ``left_out``."""
    for file in sorted(base.iterdir()):
        wanted = file.suffix in (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")
        own = file.name in ("config.json", "verification.json") or file.name.endswith(".index.json")
        if file.is_file() and wanted and not own and file not in left_out:
            shutil.copyfile(file, folder / file.name)
