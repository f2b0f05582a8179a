"""A LoRA in GGUF, the form that llama.cpp and Ollama read: names and rows as in the GGUF file of the base model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pera.errors import UserError, missing_extra, nearest


class Architecture(NamedTuple):
    """How llama.cpp names a family of models, and whether it stores the rows of q and k in another order.

    transformers rotates the first half of a head against the second, llama.cpp's "llama" neighbours against one
    another; so there row i of the first half comes to stand before row i of the second.
    """

    name: str
    permuted: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
}
"""By the ``model_type`` of transformers."""

ADAPTER = "adapter.gguf"
"""The file of a GGUF adapter in the folder of its export."""

_WHOLE = "base_model.model."


def write_adapter(file: Path, state: dict[str, Tensor], alpha: int, config: PreTrainedConfig) -> None:
    """Write a LoRA of linear layers as a GGUF adapter, in float32.

    Args:
        file: the file to write.
        state: ``base_model.model.<layer>.lora_A.weight`` ``(r, in)`` and ``…lora_B.weight`` ``(out, r)``.
        alpha: lora_alpha; the reader scales by alpha / r.
        config: the configuration of the base model.

    Raises:
        UserError: the architecture is not one of :data:`ARCHITECTURES`, or a layer has no name in it.
    """
    gguf = _library()
    architecture = architecture_of(config)
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    names = tensor_names(layers_of(state), config)
    for layer in sorted(names, key=lambda layer: names[layer]):
        A, B = (state[f"{_WHOLE}{layer}.lora_{factor}.weight"].float() for factor in "AB")
        if heads := _permuted_heads(layer, config):
            B = B.reshape(heads, 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape)
        for suffix, factor in (("lora_a", A), ("lora_b", B)):
            writer.add_tensor(f"{names[layer]}.{suffix}", np.ascontiguousarray(factor.numpy()))
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_adapter(file: Path, base: PreTrainedModel) -> PeftModel:
    """The base model with a GGUF adapter on it, as a LoRA of PEFT's, in evaluation mode.

    Raises:
        UserError: the file is no LoRA adapter in GGUF, or one for another architecture or for other shapes.
    """
    gguf = _library()
    reader = open_gguf(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    if fields.get(gguf.Keys.General.TYPE) != gguf.GGUFType.ADAPTER or fields.get(gguf.Keys.Adapter.TYPE) != "lora":
        raise UserError(f"{str(file)!r} is a GGUF file, but no LoRA adapter; its general.type should be 'adapter'.")
    config: Any = base.config
    architecture = architecture_of(config)
    if (found := _architecture(reader)) != architecture.name:
        raise UserError(f"{str(file)!r} is an adapter for {found!r}, and the base model is a {architecture.name!r}.")
    linear = {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    layers = {name: layer for layer, name in tensor_names(linear, config, skip=True).items()}
    state: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        name, _, suffix = tensor.name.rpartition(".")
        if name not in layers or suffix not in ("lora_a", "lora_b"):
            raise UserError(f"{str(file)!r} has {tensor.name!r}, which the base model has no place for.")
        layer = layers[name]
        factor = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if suffix == "lora_b" and (heads := _permuted_heads(layer, config)):
            factor = factor.reshape(heads, -1, 2, factor.shape[1]).transpose(1, 2).reshape(factor.shape)
        rows, columns = linear[layer].weight.shape
        if factor.ndim != 2 or factor.shape[suffix == "lora_a"] != (columns if suffix == "lora_a" else rows):
            raise UserError(
                f"{str(file)!r} has {tensor.name!r} of shape {tuple(factor.shape)}, which does not fit a weight of "
                f"{(rows, columns)} in the base model."
            )
        state[f"{_WHOLE}{layer}.lora_{suffix[-1].upper()}.weight"] = factor
    targets = {key.removeprefix(_WHOLE).rpartition(".lora_")[0] for key in state}
    if len(state) != 2 * len(targets) or not targets:
        raise _cut_off(file)
    ranks = {layer: len(state[f"{_WHOLE}{layer}.lora_A.weight"]) for layer in targets}
    alpha = float(fields.get(gguf.Keys.Adapter.LORA_ALPHA, 0.0))  # as llama.cpp: without one the scale is 1
    largest = max(ranks.values())
    lora = LoraConfig(
        r=largest,
        lora_alpha=alpha or largest,  # type: ignore[arg-type]
        target_modules=sorted(targets),
        rank_pattern={layer: rank for layer, rank in ranks.items() if rank != largest},
        alpha_pattern={} if alpha else {layer: rank for layer, rank in ranks.items() if rank != largest},
    )
    model: Any = get_peft_model(base, lora)
    set_peft_model_state_dict(model, state)
    return model.eval()  # type: ignore[no-any-return]


def check_base(file: Path, adapter: Path) -> None:
    """Raise UserError unless a GGUF adapter fits the GGUF model ``file``, by architecture, names and shapes; llama.cpp
    would refuse it without a reason, or worse, not."""
    model, factors = open_gguf(file), open_gguf(adapter)
    found, expected = (_architecture(reader) for reader in (model, factors))
    if found != expected:
        raise UserError(f"{str(file)!r} is a {found!r} model, and the adapter is for a {expected!r}.")
    shapes, ends = ({tensor.name: _shape(tensor) for tensor in reader.tensors} for reader in (model, factors))
    names = sorted({name.rpartition(".lora_")[0] for name in ends})
    split = model.fields.get("split.count")  # the rest of the tensors lies in other files, which llama.cpp finds
    elsewhere = split is not None and split.contents() > 1
    for name in names:
        A, B = (ends.get(f"{name}.lora_{suffix}", ()) for suffix in "ab")
        if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
            raise _cut_off(adapter)
        if name not in shapes and elsewhere:
            continue
        if shapes.get(name) != (needed := (B[0], A[1])):
            there = f"has {name} of shape {shapes[name]}" if name in shapes else f"has no {name}"
            raise UserError(f"{str(file)!r} {there}, and the adapter is for one of {needed}.")
    if not names:
        raise _cut_off(adapter)


def layers_of(state: dict[str, Tensor]) -> list[str]:
    """The names in the base model of the layers that a LoRA ``state`` has factors for."""
    return sorted({key.removeprefix(_WHOLE).partition(".lora_")[0] for key in state if ".lora_" in key})


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """llama.cpp's name for the architecture of a transformers model; raises UserError if it is none of
    :data:`ARCHITECTURES`."""
    kind = str(config.model_type)
    if kind not in ARCHITECTURES:
        raise UserError(f"the base model is a {kind!r}, for which no GGUF adapter is written; {_known()}")
    return ARCHITECTURES[kind]


def tensor_names(layers: Iterable[str], config: PreTrainedConfig, *, skip: bool = False) -> dict[str, str]:
    """The names that the weights of the modules ``layers`` have in GGUF, by module.

    Raises:
        UserError: GGUF has no name for one of them, unless ``skip``, which leaves it out.
    """
    gguf = _library()
    architecture = architecture_of(config).name
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    names = {layer: known.get_name(f"{layer}.weight", try_suffixes=(".weight",)) for layer in layers}
    if not skip and (missing := [layer for layer, name in names.items() if name is None]):
        raise UserError(f"{missing[0]!r} has no name in a GGUF file of architecture {architecture!r}; leave it out.")
    return {layer: name for layer, name in names.items() if name is not None}


def open_gguf(file: Path) -> Any:
    """A reader of a GGUF file; raises UserError if it is missing or broken."""
    try:
        return _library().GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{str(file)!r} is not a whole GGUF file: {error}") from error


def is_adapter(file: Path) -> bool:
    """Whether a GGUF file holds an adapter, not a model."""
    gguf = _library()
    field = open_gguf(file).fields.get(gguf.Keys.General.TYPE)
    return field is not None and field.contents() == gguf.GGUFType.ADAPTER


def _cut_off(adapter: Path) -> UserError:
    return UserError(f"{str(adapter)!r} lacks one of the two factors of a layer, or all; it may have been cut off.")


def _architecture(reader: Any) -> str:
    field = reader.fields.get(_library().Keys.General.ARCHITECTURE)
    return "" if field is None else str(field.contents())


def _shape(tensor: Any) -> tuple[int, ...]:
    """As PyTorch counts it."""
    return tuple(int(side) for side in reversed(tensor.shape))


def _permuted_heads(layer: str, config: Any) -> int:
    """How many heads the rows of a weight are divided into where GGUF orders them anew; else 0."""
    if not architecture_of(config).permuted:
        return 0
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    }
    return int(heads.get(layer.rpartition(".")[2], 0))


def _known() -> str:
    return nearest("", ARCHITECTURES)


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise missing_extra("gguf", "gguf") from error
    return gguf
