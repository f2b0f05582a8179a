"""The folder of a base model, checked before its weights are loaded.

transformers initializes what the files lack, ignores what the configuration does not ask for, and allocates whatever
the configuration names. Each of these gives a wrong model or a long wait without a word.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from pera.errors import UserError, one_line
from pera.tuner.layers import is_packed
from pera_lab.environment import out_of_memory
from pera_lab.files import read_object

TOKENIZER = ("tokenizer.", "tokenizer_config.", "vocab.", "vocab-", "merges.", "spiece.", "sentencepiece.", "tekken.")
"""Beginnings of the names of files that a tokenizer can be loaded from."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DEPTH = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers")
_SIZES = (
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size"),
    *("max_position_embeddings", "n_embd", "n_head", "n_positions", "d_model", "num_heads"),
)
_LARGEST = 10**9
_MOST_LABELS = 1_000_000
_FLOATS = ("F64", "F32", "BF16", "F16")


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files of a model.

    Raises:
        UserError: the index is broken, or names a file outside the folder.
    """
    if not (folder / INDEX).is_file():
        return [SINGLE]
    names = read_object(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"model: {str(folder / INDEX)!r} has no weight_map; download the model again.")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise UserError(
                f"model: {str(folder / INDEX)!r} names {name!r:.80}, which is not a file in its folder; download the "
                "model again."
            )
    return sorted(set(names.values()))


def open_weights(file: Path) -> Any:
    """A safetensors file, opened; raises UserError if it is missing or broken."""
    if not file.is_file():
        raise UserError(f"model: {str(file)!r} is missing; only safetensors weights are read.")
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"model: {str(file)!r} is not a complete safetensors file: {one_line(error)}.") from error


def files_fingerprint(folder: Path, dtype: torch.dtype) -> str:
    """A short hash of the names, shapes and first 16 values of the tensors in a model's files.

    Args:
        folder: the folder of the model.
        dtype: round the values to this dtype, so that copies in another dtype have the same hash.

    Raises:
        UserError: a file is missing or broken.
    """
    found = []
    for name in weight_files(folder):
        with open_weights(folder / name) as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)  # memory-mapped
                first = tensor.flatten()[:16]
                values = (first.to(dtype) if first.is_floating_point() else first).float().tolist()
                found.append(repr((key, tuple(tensor.shape), values)))
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()[:16]


def check_base(name: str, folder: Path, auto_class: Any, labels: int | None, *, trust_remote_code: bool) -> None:
    """Check that a folder holds a model of the wanted kind, whose weights fit its configuration.

    The model is built on the meta device, so nothing of its size is allocated.

    Args:
        name: the name of the model in messages.
        folder: the folder.
        auto_class: the class of transformers that loads the model.
        labels: number of outputs of a classification head; None for a causal language model.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: the folder holds another kind of model, or a file is broken.
    """
    content = read_object(folder / "config.json")
    foreign = bool(content.get("auto_map"))
    _check_kernels(name, content, trust_remote_code)
    if not foreign:
        kind = content.get("model_type")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise UserError(
                f"model: config.json of {name!r}: model_type={kind!r:.80} is not a model that this version of "
                "transformers knows."
            )
    for file in ("config.json", "generation_config.json"):
        _check_tokens(folder / file)
    if (quantised := content.get("quantization_config")) is not None:
        _check_quantisation(name, quantised)
        return  # the files hold packed weights, which the quantiser checks
    stored = _stored(folder)
    _check_depth(name, content, len(stored))
    _check_numbers(name, content)
    try:
        more = {} if labels is None else {"num_labels": labels}
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **more)
        if not foreign:
            _check_kind(name, config, labels)
        with torch.device("meta"):
            model = auto_class.from_config(config, trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # a model's code meets values that it does not expect
        if out_of_memory(error) or "trust_remote_code=True" in str(error):
            raise
        raise UserError(f"model: config.json of {name!r} describes no model: {_reason(error, content)}.") from error
    _check_shapes(name, model, stored)


def _check_kernels(name: str, content: dict[str, Any], trust_remote_code: bool) -> None:
    """Raise UserError if the configuration names code on the hub that computes a layer."""
    for key, value in content.items():
        if key.endswith("_implementation") and "/" in str(value) and not trust_remote_code:
            raise UserError(
                f"model: config.json of {name!r}: {key}={value!r} names code on the hub; remove it, or, if you trust "
                "that code, add --trust-remote-code."
            )


def _check_quantisation(name: str, settings: Any) -> None:
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    old = isinstance(settings, dict) and (settings.get("load_in_8bit") or settings.get("load_in_4bit"))  # bitsandbytes
    if not old and (not isinstance(method, str) or method not in AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise UserError(
            f"model: config.json of {name!r}: quantization_config.quant_method={method!r:.80} is unknown to this "
            "version of transformers."
        )


def _stored(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of each tensor in the weight files."""
    found = {}
    for name in weight_files(folder):
        with open_weights(folder / name) as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                found[key] = (part.get_shape(), part.get_dtype())
    return found


def _sections(content: dict[str, Any]) -> list[dict[str, Any]]:
    """A configuration and the ones inside it, such as ``text_config``."""
    return [content, *(each for each in content.values() if isinstance(each, dict))]


def _check_depth(name: str, content: dict[str, Any], tensors: int) -> None:
    """Raise UserError for numbers of parts that alone would take for ever to build."""
    for section in _sections(content):
        for key in _DEPTH:
            if isinstance(value := section.get(key), int) and value > tensors:
                raise UserError(
                    f"model: config.json of {name!r}: {key}={value} does not fit the {tensors} tensors of the weights."
                )
        if isinstance(value := section.get("num_labels"), int) and value > _MOST_LABELS:
            raise UserError(f"model: config.json of {name!r}: num_labels={value} should be at most {_MOST_LABELS}.")


def _check_kind(name: str, config: Any, labels: int | None) -> None:
    """Raise UserError if the model is of another kind than the one that is wanted."""
    if labels is not None:
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise UserError(f"model: {name!r} (model_type={config.model_type!r}) cannot classify texts.")
        return
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = "an encoder-decoder" if config.is_encoder_decoder else "not a language model"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        what = "an encoder"
    else:
        return
    raise UserError(
        f"model: {name!r} is {what} (model_type={config.model_type!r}), which writes no text; give a causal language "
        "model."
    )


def _check_numbers(name: str, content: dict[str, Any]) -> None:
    """Raise UserError for sizes and token ids that no model has."""
    for section in _sections(content):
        for key in _SIZES:
            value = section.get(key, 1)
            if isinstance(value, (str, float)) or (isinstance(value, int) and not 1 <= value <= _LARGEST):
                raise UserError(
                    f"model: config.json of {name!r}: {key}={value!r:.80} should be an integer from 1 to {_LARGEST}."
                )
        heads, shared = section.get("num_attention_heads"), section.get("num_key_value_heads")
        if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
            raise UserError(
                f"model: config.json of {name!r}: num_key_value_heads={shared} should divide "
                f"num_attention_heads={heads}."
            )


def _check_tokens(file: Path) -> None:
    """Raise UserError for ids of special tokens that are no numbers; without them, answers would not end."""
    content = read_object(file) if file.is_file() else {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = content.get(key)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and (isinstance(each, bool) or not isinstance(each, int)):
                raise UserError(f"model: {str(file)!r}: {key}={value!r:.80} should be the number of a token.")


def _reason(error: Exception, content: dict[str, Any]) -> str:
    """Why transformers cannot build a model from a configuration."""
    if "adding_idx must be within" in str(error):
        return f"pad_token_id={content.get('pad_token_id')} should be below vocab_size={content.get('vocab_size')}"
    if isinstance(error, KeyError):
        for section in _sections(content):
            for key, value in section.items():
                if error.args == (value,):
                    return f"{key}={value!r} is unknown"
    return f"{one_line(error):.200}" or type(error).__name__


def _check_shapes(name: str, model: Any, stored: dict[str, tuple[list[int], str]]) -> None:
    """Raise UserError if a stored tensor has another shape or dtype than the model gives it, or if the files are small
    for the model."""
    prefix = f"{model.base_model_prefix}."
    wanted = model.state_dict()
    for key, (shape, dtype) in stored.items():
        known = next((each for each in (key, prefix + key, key.removeprefix(prefix)) if each in wanted), None)
        if known is None:
            continue
        if shape != list(wanted[known].shape):
            raise UserError(
                f"model: the weights of {name!r} do not fit its config.json: {key} has shape {shape}, but config.json "
                f"asks for {list(wanted[known].shape)}."
            )
        if dtype not in _FLOATS and wanted[known].is_floating_point():
            raise UserError(
                f"model: the weights of {name!r} hold {key} as {dtype}, without a quantization_config; give the model "
                "in float32, bfloat16 or float16."
            )
    asked = sum(weight.numel() for weight in {id(each): each for each in model.parameters()}.values())
    if asked > 4 * sum(math.prod(shape) for shape, _ in stored.values()):
        missing = next((key for key in wanted if key not in stored and key.removeprefix(prefix) not in stored), "")
        raise UserError(f"model: {name!r} has no weights for {missing}, which its config.json asks for.")


def check_loaded(name: str, model: Any, unexpected: list[str]) -> None:
    """Check that no weight of a loaded model was left out, and that all are finite.

    Args:
        name: the name of the model in messages.
        model: the loaded model.
        unexpected: the stored tensors that the model has no place for.

    Raises:
        UserError: a tensor belongs to a layer that the model has, or to a block beyond its last; the output head should
            be tied but is not; or a weight is NaN or infinite. Tensors of other parts, such as another head, are left
            out on purpose.
    """
    modules = dict(model.named_modules())
    for key in sorted(unexpected):
        path = key.split(".")[:-1]
        owner = modules.get(".".join(path))
        parents = ((modules.get(".".join(path[:i])), part) for i, part in enumerate(path))
        beyond = any(isinstance(parent, nn.ModuleList) and part not in parent._modules for parent, part in parents)
        if beyond or (owner is not None and any(each is not None for each in owner._parameters.values())):
            raise UserError(f"model: the weights of {name!r} hold {key}, which its config.json has no place for.")
    quantizer = getattr(model, "hf_quantizer", None)
    quantized = quantizer is not None and quantizer.pre_quantized
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = head is not None and model._tied_weights_keys and model.config.get_text_config().tie_word_embeddings
    if tied and not quantized and head.weight is not model.get_input_embeddings().weight:
        raise UserError(
            f"model: config.json of {name!r}: tie_word_embeddings=true, but the weights hold another output head than "
            "the embeddings; set it to false."
        )
    for key, weight in () if quantized else model.named_parameters():
        if is_packed(weight):
            weight = dequantize_module_weight(modules[key.rpartition(".")[0]])
        whole = weight.is_floating_point() and weight.itemsize > 1
        if whole and not weight.sum(dtype=torch.float32).isfinite() and not weight.isfinite().all():
            raise UserError(f"model: the weights of {name!r} hold NaN or infinity in {key}; download the model again.")
