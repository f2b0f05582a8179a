"""A LoRA in GGUF, the format of llama.cpp and Ollama, with the names and row order of the base model's GGUF file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pera.errors import UserError
from pera_lab.extras import missing_extra
from pera_lab.gguf_header import check_header


class Architecture(NamedTuple):
    """An architecture of llama.cpp.

    Rotary embeddings in transformers rotate entry i of a head with entry i + d/2. In llama.cpp's "llama" they rotate
    entry 2i with entry 2i + 1. A file of that architecture therefore stores the rows of q and k in the order
    0, d/2, 1, d/2 + 1, … within each head.
    """

    name: str
    """The name in ``general.architecture``."""
    permuted: bool = False
    """Whether the rows of q and k are stored in that order."""


ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
}
"""Supported architectures by the ``model_type`` of transformers."""

ADAPTER = "adapter.gguf"
"""File name of a GGUF adapter in an export folder."""

_WHOLE = "base_model.model."


def write_adapter(file: Path, state: dict[str, Tensor], alpha: int, config: PreTrainedConfig) -> None:
    """Write a LoRA of linear layers as a GGUF adapter, in float32.

    Args:
        file: the file to write.
        state: ``base_model.model.<layer>.lora_A.weight`` ``(r, in)`` and ``…lora_B.weight`` ``(out, r)``.
        alpha: lora_alpha. The reader scales by alpha / r.
        config: the configuration of the base model.

    Raises:
        UserError: the architecture is not in :data:`ARCHITECTURES`, or a layer has no name in GGUF.
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
    try:
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        if error.errno is None:  # numpy drops the reason, such as a full disk; another write raises it
            with file.open("ab") as f:
                f.write(bytes(1 << 16))
        raise


def read_adapter(file: Path, base: PreTrainedModel) -> PeftModel:
    """Load a GGUF adapter on its base model as a LoRA of PEFT, in evaluation mode.

    Raises:
        UserError: the file is not a LoRA adapter in GGUF, or its architecture or a shape does not fit the base model.
    """
    gguf = _library()
    reader = open_gguf(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    if fields.get(gguf.Keys.General.TYPE) != gguf.GGUFType.ADAPTER or fields.get(gguf.Keys.Adapter.TYPE) != "lora":
        raise UserError(f"{str(file)!r} is not a LoRA: general.type should be 'adapter' and adapter.type 'lora'.")
    config: Any = base.config
    architecture = architecture_of(config)
    if (found := _architecture(reader)) != architecture.name:
        raise UserError(f"{str(file)!r} is an adapter for {found!r}, but the base model is {architecture.name!r}.")
    linear = {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    layers = {name: layer for layer, name in tensor_names(linear, config, skip=True).items()}
    state: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        name, _, suffix = tensor.name.rpartition(".")
        if name not in layers or suffix not in ("lora_a", "lora_b"):
            raise UserError(f"{str(file)!r} holds {tensor.name!r}, which matches no layer of the base model.")
        layer = layers[name]
        factor = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if suffix == "lora_b" and (heads := _permuted_heads(layer, config)):
            factor = factor.reshape(heads, -1, 2, factor.shape[1]).transpose(1, 2).reshape(factor.shape)
        rows, columns = linear[layer].weight.shape
        if factor.ndim != 2 or factor.shape[suffix == "lora_a"] != (columns if suffix == "lora_a" else rows):
            raise UserError(
                f"{str(file)!r}: {tensor.name!r} has shape {tuple(factor.shape)}, which does not fit the base model's "
                f"weight {(rows, columns)}."
            )
        state[f"{_WHOLE}{layer}.lora_{suffix[-1].upper()}.weight"] = factor
    targets = {key.removeprefix(_WHOLE).rpartition(".lora_")[0] for key in state}
    if len(state) != 2 * len(targets) or not targets:
        raise _cut_off(file)
    ranks = {layer: len(state[f"{_WHOLE}{layer}.lora_A.weight"]) for layer in targets}
    alpha = float(fields.get(gguf.Keys.Adapter.LORA_ALPHA, 0.0))  # without alpha llama.cpp scales by 1
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
    """Check that a GGUF adapter fits a GGUF model. llama.cpp rejects a wrong one without a reason, or accepts it.

    Raises:
        UserError: the architectures, the names of tensors or their shapes do not match.
    """
    model, factors = open_gguf(file), open_gguf(adapter)
    found, expected = (_architecture(reader) for reader in (model, factors))
    if found != expected:
        raise UserError(f"{str(file)!r} is a model of {found!r}, but the adapter is for {expected!r}.")
    shapes, ends = ({tensor.name: _shape(tensor) for tensor in reader.tensors} for reader in (model, factors))
    names = sorted({name.rpartition(".lora_")[0] for name in ends})
    split = model.fields.get("split.count")  # llama.cpp finds the other files of a split model
    elsewhere = split is not None and split.contents() > 1
    for name in names:
        A, B = (ends.get(f"{name}.lora_{suffix}", ()) for suffix in "ab")
        if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
            raise _cut_off(adapter)
        if name not in shapes and elsewhere:
            continue
        if shapes.get(name) != (needed := (B[0], A[1])):
            there = f"has {name} with shape {shapes[name]}" if name in shapes else f"has no {name}"
            raise UserError(f"{str(file)!r} {there}, but the adapter needs {needed}.")
    if not names:
        raise _cut_off(adapter)


def layers_of(state: dict[str, Tensor]) -> list[str]:
    """Names of the base model's layers that have factors in the state dict of a LoRA."""
    return sorted({key.removeprefix(_WHOLE).partition(".lora_")[0] for key in state if ".lora_" in key})


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The llama.cpp architecture of a transformers model.

    Raises:
        UserError: its ``model_type`` is not in :data:`ARCHITECTURES`.
    """
    kind = str(config.model_type)
    if kind not in ARCHITECTURES:
        raise UserError(
            f"model_type={kind!r} of the base model is not supported in GGUF; supported: {', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[kind]


def tensor_names(layers: Iterable[str], config: PreTrainedConfig, *, skip: bool = False) -> dict[str, str]:
    """Names in GGUF of the weights of modules.

    Args:
        layers: names of the modules in the base model.
        config: the configuration of the base model.
        skip: leave out a module that has no name in GGUF.

    Returns:
        The GGUF name by module name.

    Raises:
        UserError: a module has no name in GGUF and ``skip`` is False.
    """
    gguf = _library()
    architecture = architecture_of(config).name
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    names = {layer: known.get_name(f"{layer}.weight", try_suffixes=(".weight",)) for layer in layers}
    if not skip and (missing := [layer for layer, name in names.items() if name is None]):
        raise UserError(
            f"{missing[0]!r} has no name in GGUF files of architecture {architecture!r}; merge the adapter."
        )
    return {layer: name for layer, name in names.items() if name is not None}


def open_gguf(file: Path) -> Any:
    """Open a GGUF file for reading; raises UserError if it is missing or broken."""
    check_header(file)
    try:
        return _library().GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{str(file)!r} is not a complete GGUF file: {error}") from error


def is_adapter(file: Path) -> bool:
    """Whether a GGUF file holds an adapter rather than a model."""
    gguf = _library()
    field = open_gguf(file).fields.get(gguf.Keys.General.TYPE)
    return field is not None and field.contents() == gguf.GGUFType.ADAPTER


def _cut_off(adapter: Path) -> UserError:
    return UserError(f"{str(adapter)!r} lacks lora_a or lora_b of a layer, or holds no layer; it may be truncated.")


def _architecture(reader: Any) -> str:
    field = reader.fields.get(_library().Keys.General.ARCHITECTURE)
    return "" if field is None else str(field.contents())


def _shape(tensor: Any) -> tuple[int, ...]:
    """The shape of a GGUF tensor in the order of PyTorch."""
    return tuple(int(side) for side in reversed(tensor.shape))


def _permuted_heads(layer: str, config: Any) -> int:
    """Number of heads whose rows GGUF permutes in this layer; 0 if it keeps the order."""
    if not architecture_of(config).permuted:
        return 0
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    }
    return int(heads.get(layer.rpartition(".")[2], 0))


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise missing_extra("gguf", "gguf") from error
    return gguf
