"""Merge an adapter into its base model and write the result as a plain model."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import METADATA_FIELDS
from transformers.utils import GENERATION_CONFIG_NAME

from pera.errors import UserError, one_line
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
from pera_lab.embedded import state_rope_theta, with_rope_theta
from pera_lab.files import atomic_folder, read_object, require_free, reserved, write_json
from pera_lab.inference import base_model, stop_tokens
from pera_lab.models import DTYPES, dequantise, tokenizer_files
from pera_lab.opening import (
    Location,
    base_folder,
    before_quantization,
    check_fingerprint,
    copy_tokenizer,
    open_model,
    open_tokenizer,
)
from pera_lab.progress import ProgressBar, stage


def merge(location: Location, output: Path, *, dtype: str = "stored", dequantised: bool = False) -> Agreement:
    """Merge an adapter into its base model and check that the outputs agree.

    The merged model has the architecture of the base. The check reads it back from the disk. The folder is kept if
    the check fails, so that it can be examined.

    A PERA or LoRA adapter is merged file by file, and the check reads each weight when it is needed. Memory use stays
    near the size of the largest file. These cases are merged in memory as a whole:

    - other methods, variants of LoRA, and initializations of LoRA that change the base;
    - adapters on parameters, on shared weights or on tokens, and adapters with more tokens than the base;
    - quantised bases, classifiers, and bases whose files transformers rearranges when it loads them.

    If only one of two layers with a shared weight has an adapter, as with tied embeddings, that layer gets a weight of
    its own.

    If the recipe of a run quantized its base, the adapter is merged into the base before quantization.

    Args:
        location: the adapter and its base model.
        output: folder to write the model, the tokenizer, ``verification.json`` and a model card to.
        dtype: dtype of the merged model, a key of :data:`pera_lab.models.DTYPES`, or "stored" for the base's dtype.
            The additions are made in float32 or better.
        dequantised: dequantise a quantised base first, and merge into that.

    Returns:
        The comparison of the merged model with base and adapter.

    Raises:
        UserError: the adapter is broken, is for another base or does not change weights; the base is quantised without
            ``dequantised``, or is not quantised with it; a weight overflows in ``dtype``; the output exists or another
            process writes it.
    """
    with reserved(output):
        require_free(output)
        return _merge(location, output, dtype, dequantised)


def _merge(location: Location, output: Path, dtype: str, dequantised: bool) -> Agreement:
    """:func:`merge` to a folder that no other process writes."""
    adapter = location.require_adapter()
    if adapter.config.is_prompt_learning:
        raise UserError(f"{location.name!r} is a {adapter.method} adapter, which does not change weights to merge.")
    if not dequantised:
        location = before_quantization(location)
    elif location.quantization == "int8":
        raise UserError(
            "--dequantise: int8 also rounds the inputs of layers, so no plain model has the outputs of "
            f"{location.name!r}; leave it out to merge into the base model before quantization."
        )
    folder = base_folder(location)
    stored_so = bool(read_object(folder / "config.json").get("quantization_config"))
    quantised = stored_so or location.quantization is not None
    if quantised and not dequantised:
        raise UserError(
            f"the base of {location.name!r}, {location.base!r}, is quantised, and rounding would lose most of the "
            "adapter; add --dequantise, or merge into the base model before quantisation."
        )
    if dequantised and not quantised:
        raise UserError(
            f"--dequantise: the base of {location.name!r}, {location.base!r}, is not quantised; leave it out."
        )
    streamed = None if quantised else _stream(location, folder, dtype)
    if streamed is None:
        return _merge_in_memory(location, output, dtype, quantised)
    return _merge_by_files(location, output, streamed, dtype)


class _Streamed(NamedTuple):
    """A model with an adapter whose base weights stay in the files."""

    model: Any
    checkpoint: Checkpoint
    dtype: torch.dtype
    """The dtype of its computation."""


def _stream(location: Location, folder: Path, dtype: str) -> _Streamed | None:
    """Open the model without the weights of its base; None if it has to be merged in memory."""
    adapter = location.require_adapter()
    if adapter.labels is not None:  # the head is not in the files of the base
        return None
    if not _only_factors(adapter.config):
        return None
    if not any(folder.glob("*.safetensors")):
        return None
    checkpoint = Checkpoint(folder)
    stored = [key for keys in checkpoint.shards.values() for key in keys]
    computed = DTYPES[dtype] if dtype in DTYPES else checkpoint.read(stored[0]).dtype
    base = empty_model(checkpoint, computed, trust_remote_code=location.trust_remote_code)
    shared, found = _shared(base), sources(base, checkpoint)
    if len(shared & set(stored)) > 1:  # stored twice, perhaps with different values
        return None
    if found is None or not set(stored) <= set(base.state_dict()):
        return None
    check_fingerprint(location, base, lambda name: checkpoint.read(found[name]))
    if adapter.resized_to(base):
        return None
    model = adapter.load_on(base)
    fill_adapter(model, adapter.weights, computed)
    for name, module in model.get_base_model().named_modules():
        changed = isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))
        if isinstance(module, ParamWrapper) or (changed and base_name(f"{name}.weight") in shared):
            return None
    return _Streamed(model, checkpoint, computed)


def _only_factors(config: PeftConfig) -> bool:
    """Whether an adapter is PERA or plain LoRA on modules, so that it leaves the base as it is in the files."""
    variants = [field.name for field in fields(config) if field.metadata.get("is_lora_variant")]
    further = ("trainable_token_indices", "target_parameters", "ensure_weight_tying", "lora_bias", *variants)
    return (
        type(config) in (PeraConfig, LoraConfig)  # AdaLoRA's configuration is a subclass
        and getattr(config, "init_lora_weights", True) in (True, False, "gaussian")  # the others change the base
        and not any(getattr(config, key, None) for key in further)
    )


def _shared(model: nn.Module) -> set[str]:
    """Names of weights that two modules share."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    return {name for same in names.values() if len(same) > 1 for name in same}


def _merge_by_files(location: Location, output: Path, streamed: _Streamed, dtype: str) -> Agreement:
    model, checkpoint, computed = streamed
    base = checkpoint.folder
    tokenizer = open_tokenizer(location)
    prompts = prompts_of(location)
    with weights_on_demand(model, checkpoint, computed):
        before = logits(model, tokenizer, prompts)
    size = 0
    with atomic_folder(output) as folder:
        with ProgressBar("merging files") as bar:
            for done, (name, keys) in enumerate(checkpoint.shards.items()):
                bar.update(done, len(checkpoint.shards))
                merged = {k: _merged(model.get_base_model(), k, checkpoint.read(k), dtype, location) for k in keys}
                save_file(merged, folder / name, metadata={"format": "pt"})
                size += sum(weight.nbytes for weight in merged.values())
                del merged
            bar.update(len(checkpoint.shards))
        write_index(folder, checkpoint.shards, size)
        _copy_companions(base, folder, () if location.tokenizer is None else tokenizer_files(base))
        copy_tokenizer(location, folder)
        _write_generation_settings(folder, base, model, tokenizer)
        config = read_object(base / "config.json")
        if dtype != "stored":
            config.pop("torch_dtype", None)
            config["dtype"] = dtype
        write_json(folder / "config.json", with_rope_theta(config))  # last: a folder without it is not a model
        written = Checkpoint(folder)
        plain = empty_model(written, computed, trust_remote_code=location.trust_remote_code)
        with weights_on_demand(plain, written, computed):
            after = logits(plain, tokenizer, prompts)
        return _finish(folder, location, compare(before, after, computed))


@torch.no_grad()
def _merged(base: nn.Module, key: str, weight: Tensor, dtype: str, location: Location) -> Tensor:
    """Compute a tensor of the merged model.

    Args:
        base: the base model with the layers of the adapter.
        key: the name of the tensor.
        weight: the tensor of the base model.
        dtype: as for :func:`merge`.
        location: the adapter, for messages.
    """
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
            with _refusal(location):
                owner.merge(safe_merge=True)
            weight, layer.weight = layer.weight.detach(), empty
            owner.merged_adapters.clear()
        elif not empty.is_meta:  # a trained bias
            weight = empty.detach()
    elif (own := owner._parameters.get(attribute)) is not None and not own.is_meta:  # a trained bias of another layer
        weight = own.detach()
    if not weight.is_floating_point():
        return weight
    result = weight.to(DTYPES.get(dtype, stored))
    if not torch.isfinite(weight).all():
        raise UserError(f"{location.name!r} cannot be merged: {key} holds NaN or infinity.")
    if result.dtype != weight.dtype and not torch.isfinite(result).all():
        raise UserError(
            f"{location.name!r} cannot be merged: {key} is beyond the range of {str(result.dtype)[6:]}; "
            "try --dtype bfloat16."
        )
    return result.contiguous()


def _merge_in_memory(location: Location, output: Path, dtype: str, quantised: bool) -> Agreement:
    trained = location.run.recipe.model.dtype if location.run is not None and location.quantization else "stored"
    model, tokenizer = open_model(location, trained if quantised else dtype, needs_tokenizer=False)
    prompts = prompts_of(location)
    if quantised:
        before = logits(model, tokenizer, prompts)
        del model
        adapter = location.require_adapter()
        base, _ = open_model(
            location._replace(adapter=None, tokenizer=None), trained, adapter.labels, needs_tokenizer=False
        )
        plain: Any = dequantise(base)
        model = adapter.load_on(plain.to(DTYPES.get(dtype, plain.dtype)))
    separate_shared_weights(model.base_model.model)
    if not quantised:
        before = logits(model, tokenizer, prompts)
    with stage("merging"), _refusal(location):
        merged = model.merge_and_unload(safe_merge=True)
    with atomic_folder(output) as folder:
        _write_model(folder, merged, location, tokenizer)
        computed = next(merged.parameters()).dtype
        del model, merged
        written = Location(None, None, str(folder), trust_remote_code=location.trust_remote_code)
        after = logits(*open_model(written, needs_tokenizer=False), prompts)
        return _finish(folder, location, compare(before, after, computed))


def _write_model(folder: Path, model: Any, location: Location, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write a model that was made from an adapter and its base, with the tokenizer and generation settings."""
    own = model.generation_config if (generates := model.can_generate()) else None
    if generates:  # saving refuses settings without effect, which bases have
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    model.save_pretrained(str(folder))
    state_rope_theta(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    if generates:
        model.generation_config = own
        _write_generation_settings(folder, base_folder(location), model, tokenizer)


def write_base(
    folder: Path, model: Any, location: Location, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype
) -> None:
    """Write the base model with the modules and tokens that an adapter trained whole, but without its factors.

    Args:
        folder: the folder to write.
        model: the base model with the adapter. It is used up.
        location: the adapter and its base model.
        tokenizer: their tokenizer.
        dtype: dtype of the files. A trained weight that would be rounded in it keeps its own.
    """
    base = model.get_base_model()
    for name, layer in list(base.named_modules()):
        if isinstance(layer, model.base_model.tuner_layer_cls):
            base.set_submodule(name, layer.get_base_layer())
    plain = model.merge_and_unload(safe_merge=True)
    for weight in plain.parameters():
        rounded = weight.detach().to(dtype)
        if torch.equal(rounded.to(weight.dtype), weight):
            weight.data = rounded
    _write_model(folder, plain, location, tokenizer)
    write_json(folder / "config.json", {**read_object(folder / "config.json"), "dtype": str(dtype)[6:]})


@contextmanager
def _refusal(location: Location) -> Iterator[None]:
    """Raise :class:`UserError` in place of the errors of PEFT for weights that cannot take the adapter."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{location.name!r} cannot be merged: {one_line(error).rstrip('.')}.") from error


def _finish(folder: Path, location: Location, agreement: Agreement) -> Agreement:
    agreement.save(folder, of="merged model", against=location.name)
    write_card(folder, "merged", location, agreement.sentence())
    return agreement


def _write_generation_settings(folder: Path, base: Path, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write the base's generation settings with the token that the adapter was taught as the end of an answer.

    Args:
        folder: the folder of the merged model.
        base: the folder of the base model. Its other settings are kept.
        model: the model, for the settings of a base without such a file.
        tokenizer: the tokenizer of the adapter. Without one, the base's end is kept.
    """
    plain, source = base_model(model), base / GENERATION_CONFIG_NAME
    if source.is_file():
        content = read_object(source)
        plain.generation_config = GenerationConfig.from_dict(content)
    else:
        content = {k: v for k, v in plain.generation_config.to_diff_dict().items() if k not in METADATA_FIELDS}
    stops = [] if tokenizer is None else stop_tokens(model, tokenizer)
    if stops:
        content["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    write_json(folder / GENERATION_CONFIG_NAME, content)


def _copy_companions(base: Path, folder: Path, left_out: Collection[Path]) -> None:
    """Copy the files next to the weights of the base: tokenizer, chat template, generation settings and code.

    Args:
        base: the folder of the base model.
        folder: the folder of the merged model.
        left_out: files that are not copied.
    """
    for file in sorted(base.iterdir()):
        wanted = file.suffix in (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")
        own = file.name in ("config.json", "verification.json") or file.name.endswith(".index.json")
        if file.is_file() and wanted and not own and file not in left_out:
            shutil.copyfile(file, folder / file.name)
