"""Base models: found by a hub id, a folder, a GGUF file or the name of an embedded model, and loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from peft.utils import CONFIG_NAME
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.peft_utils import find_adapter_config_file

from pera.errors import UserError, nearest
from pera.tuner.layers import keep_unpacked, of_torchao
from pera_lab import processes
from pera_lab.bases import INDEX, SINGLE, TOKENIZER, check_base, check_loaded, files_fingerprint
from pera_lab.embedded import EMBEDDED, cannot_load, embedded_folder, embedded_name, gguf_folder, unquantised
from pera_lab.environment import device, fast_dtype, out_of_memory
from pera_lab.files import read_object, refuse_pipe, user_path
from pera_lab.placement import Attention, DeviceMap, check_attention, check_computed, check_map, check_placed
from pera_lab.quantization import Quantization, check_blocks, check_quantized, quantizer


class MissingModel(UserError):
    """There is no model of this name. ``problem`` is the message without what would be right."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem


ADAPTER_CONFIG = CONFIG_NAME

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""The file that a folder with the weights of a model has one of."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    labels: int | None = None,
    quantization: Quantization | None = None,
    attn_implementation: Attention | None = None,
    device_map: DeviceMap | None = None,
) -> PreTrainedModel:
    """Load a base model in evaluation mode, on the accelerator if there is one.

    Args:
        name: an embedded model, a folder, a ``.gguf`` file or a hub id; see :func:`resolve`.
        dtype: a key of :data:`DTYPES`, "stored" for the dtype of the files, or "auto" for
            :func:`pera_lab.environment.fast_dtype` (float32 for a classifier).
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run code that comes with the model.
        labels: number of outputs of a classification head, or 1 for regression. A missing head is initialized at
            random. The head is always float32, since bfloat16 would lose small training steps. None loads a causal
            language model.
        quantization: quantize the linear layers while loading, except for the head. ``dtype`` is then the dtype of the
            computation and of the other weights.
        attn_implementation: how attention is computed; None lets transformers choose.
        device_map: how layers are placed on several accelerators; None puts all on one.

    Raises:
        UserError: there is no such model, it cannot be read, quantized or placed, it lacks weights other than the
            head's, or it cannot compute attention in that way.
    """
    check_map(device_map)
    location = resolve(name)
    _check_plain(name, location, revision)
    if (settings := Path(location) / GENERATION_CONFIG_NAME).is_file():
        read_object(settings)  # transformers ignores a broken file, and with it the end of an answer
    torch_dtype = {"auto": fast_dtype() if labels is None else torch.float32, "stored": "auto", **DTYPES}[dtype]
    auto_class: Any = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    head = {} if labels is None else {"num_labels": labels}
    remote: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if os.path.isdir(location):
        with reading(name):
            check_base(name, Path(location), auto_class, labels, trust_remote_code=trust_remote_code)
    with reading(name):
        options: dict[str, Any] = {}
        if attn_implementation is not None or quantization is not None:
            config = AutoConfig.from_pretrained(location, **remote, **head)
        if attn_implementation is not None:
            check_attention(attn_implementation, name, config, auto_class, trust_remote_code)
            options["attn_implementation"] = attn_implementation
        if device_map is not None or quantization is not None:
            options["device_map"] = device_map or {"": device()}
        if quantization is not None:
            whole = None if labels is None else _parts_of_head(auto_class, config, trust_remote_code)
            computed = torch_dtype if isinstance(torch_dtype, torch.dtype) else None
            options["quantization_config"] = quantizer(quantization, name, config, computed, whole)
        model, loading = auto_class.from_pretrained(
            location, dtype=torch_dtype, use_safetensors=True, output_loading_info=True, **remote, **head, **options
        )
    if not processes.loads_base():
        return model.eval()  # type: ignore[no-any-return]  # the weights come from another process
    body = f"{model.base_model_prefix}."
    missing = sorted(key for key in loading["missing_keys"] if labels is None or key.startswith(body))
    if missing:
        raise UserError(
            f"model: {name!r} has no weights for {missing[0]}, so it cannot be loaded as {auto_class.__name__}."
        )
    check_placed(device_map, name, model)
    check_computed(attn_implementation, name, model)
    check_loaded(name, model, loading["unexpected_keys"])
    keep_unpacked(model)
    if quantization is not None:
        check_quantized(quantization, name, model)
    check_blocks(name, model)
    if labels is not None:
        _keep_head_in_float32(model)
    placed = "device_map" in options or processes.fsdp()  # FSDP moves each process's part of the weights
    loaded: PreTrainedModel = (model if placed else model.to(device())).eval()
    return loaded


def _check_plain(name: str, location: str, revision: str | None) -> None:
    """Raise UserError if an adapter lies next to the weights of a model, because transformers would load it too."""
    with reading(name):
        found = find_adapter_config_file(location, revision=revision)
    if found is not None:
        raise UserError(
            f"model: {name!r} also holds an adapter ({ADAPTER_CONFIG}), which would change the base model; move the "
            "adapter to a folder of its own."
        )


def _parts_of_head(auto_class: Any, config: Any, trust_remote_code: bool) -> list[str]:
    """Names of the modules of a classifier outside its pretrained body."""
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=trust_remote_code)
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def _keep_head_in_float32(model: PreTrainedModel) -> None:
    for name, head in model.named_children():
        if name != model.base_model_prefix and next(head.parameters(), None) is not None:
            head.float().register_forward_pre_hook(_in_float32)


def _in_float32(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.float() for each in inputs)


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the left.

    Args:
        source: the name of a base model as in :func:`load_model`, or the folder of a tokenizer as a path.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: there is no such tokenizer, or it cannot be read.
    """
    location = source if isinstance(source, Path) else resolve(source)
    check_tokenizer(str(source), location)
    try:
        with reading(str(source)):
            tokenizer = AutoTokenizer.from_pretrained(
                location, revision=revision, trust_remote_code=trust_remote_code, padding_side="left"
            )
    except UserError as error:
        raise _tokenizer_refusal(str(source), location, error) from error
    longest = tokenizer.model_max_length
    if not isinstance(longest, (int, float)) or longest < 1:
        raise UserError(
            f"model: the tokenizer of {str(source)!r}: model_max_length={longest!r:.80} should be at least 1."
        )
    if tokenizer.pad_token is None:  # the attention mask hides it, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _tokenizer_refusal(name: str, location: str | Path, error: UserError) -> UserError:
    """The error for a tokenizer that transformers cannot load, with the broken file if there is one."""
    for file in tokenizer_files(Path(location)) if os.path.isdir(location) else ():
        if file.suffix == ".json":
            try:
                read_object(file)
            except UserError as broken:
                return UserError(f"model: the tokenizer of {name!r} is broken: {broken}")
    if "sentencepiece" in str(error) or "tiktoken" in str(error):
        return UserError(
            f"model: the tokenizer of {name!r} has no tokenizer.json, and its other files need sentencepiece or "
            "tiktoken; add tokenizer.json, or install one of them."
        )
    if isinstance(error, MissingModel):
        return error
    return UserError(str(error).replace("model: ", "model: the tokenizer of ", 1))


def has_tokenizer(location: str | Path) -> bool:
    """Whether a folder has the files of a tokenizer. True for a hub id, whose files are not known."""
    folder = Path(location)
    if not os.path.isdir(folder):
        return True
    names = [file.name for file in tokenizer_files(folder)]
    return any(name.startswith(TOKENIZER) or name.endswith((".model", ".tiktoken")) for name in names)


def check_tokenizer(name: str, location: str | Path) -> None:
    """Raise UserError if a folder has no tokenizer, with ``name`` in the message."""
    if not has_tokenizer(location):
        raise UserError(
            f"model: {name!r} has no tokenizer; copy its files, such as tokenizer.json and tokenizer_config.json, from "
            "the original model."
        )


def configuration(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a base model.

    Args:
        name: the base model, as in :func:`load_model`.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: there is no such model, or its configuration cannot be read.
    """
    location = resolve(name)
    with reading(name):
        found: PreTrainedConfig = AutoConfig.from_pretrained(
            location, revision=revision, trust_remote_code=trust_remote_code
        )
        return found


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files in a folder, including its chat template."""
    names = ("tokenizer", "special_tokens_map.", "added_tokens.", "chat_template.", "vocab.", "merges.", "tekken.")
    endings = (".jinja", ".model", ".tiktoken")
    wanted = (file for file in folder.iterdir() if file.name.startswith(names) or file.suffix in endings)
    return sorted(file for file in wanted if file.is_file())


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn the errors that the libraries raise on unreadable model files into one :class:`UserError`.

    Out-of-memory errors are not caught. transformers raises errors of any kind on a broken folder, and the panics of
    the Rust libraries are no Exceptions.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, Exception) and out_of_memory(error):
            raise
        message = str(cannot_load(name, error))
        if isinstance(error, OSError) and not os.path.isdir(user_path(name)) and not embedded_name(name):
            raise MissingModel(message.rstrip("."), "give a folder, a .gguf file or a hub id.") from error
        raise UserError(message) from error


def saved_labels(name: str) -> int | None:
    """Number of outputs of a local model's classification head from its ``config.json``; None if it has no head."""
    file = user_path(name) / "config.json"
    config = read_object(file) if os.path.isfile(file) else {}
    names, labels = config.get("architectures"), config.get("id2label")
    if not isinstance(names, list) or not any(str(each).endswith("ForSequenceClassification") for each in names):
        return None
    return len(labels) if isinstance(labels, dict) and labels else 2  # transformers omits id2label for two labels


def resolve(name: str) -> str:
    """The local folder or hub id that ``name`` stands for. Embedded and GGUF models are converted first.

    The path of an embedded model on another machine resolves to this machine's copy.

    Raises:
        UserError: ``name`` is not an embedded model, a model folder, a GGUF file or a hub id.
    """
    if name in EMBEDDED:
        return str(embedded_folder(name))
    path, shown = user_path(name), repr(name if len(name) <= 200 else f"{name[:200]}…")
    if name and os.path.isdir(path):
        for file in path.iterdir():
            refuse_pipe(file)
        if os.path.isfile(path / "config.json"):
            return str(path)
        if os.path.isfile(path / ADAPTER_CONFIG):
            raise MissingModel(f"model: {shown} is an adapter, not a base model", "merge it with: pera merge")
        raise MissingModel(f"model: folder {shown} has no config.json", "give the folder of a transformers model.")
    if os.path.isfile(path):
        if path.suffix != ".gguf":
            raise MissingModel(f"model: {shown} is a file", "give a folder, or a file ending in .gguf.")
        return str(gguf_folder(path))
    if known := embedded_name(name):
        return resolve(known)
    if _is_hub_id(name) and not os.path.isdir(path.parent):
        return name
    if "/" in name or name.startswith((".", "~")):
        raise MissingModel(f"model: folder {shown} does not exist", "give a folder, a .gguf file or a hub id.")
    raise MissingModel(
        f"model: {shown} is not an embedded model, a folder, a .gguf file or a hub id", nearest(name, EMBEDDED)
    )


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not name.startswith((".", "~"))


def longest_input(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The longest input of a model, in tokens.

    This is the smallest of three limits: the configuration's (with RoPE scaling), the tokenizer's, and the rows of a
    table of learned positions. RoBERTa and its relatives count positions from ``padding_idx + 1``, so 514 rows are 512
    tokens. A model without any limit is given :data:`NO_LIMIT`.
    """
    limits: list[Any] = [NO_LIMIT, None if tokenizer is None else tokenizer.model_max_length]
    config = getattr(model, "config", None)
    if config is not None:
        text = config.get_text_config()
        positions: Any = getattr(text, "max_position_embeddings", None)
        limits += [_extended(text, positions) if _is_length(positions) else None]
        if text is config:  # the tables of a model for images as well count patches
            limits += [_table_rows(module) for name, module in model.named_modules() if _is_table(name)]
    return min(int(limit) for limit in limits if _is_length(limit))


NO_LIMIT = 2**17
"""Longest input in tokens of a model that declares no limit, such as one with relative positions."""


def _is_length(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 1


def _extended(config: Any, positions: float) -> float:
    """The configuration's limit, extended by RoPE scaling if it states the length that is scaled."""
    scaling = getattr(config, "rope_parameters", None) or {}
    original: Any = scaling.get("original_max_position_embeddings")
    factor: Any = scaling.get("factor")
    return max(positions, original * factor) if _is_length(original) and _is_length(factor) else positions


def _is_table(name: str) -> bool:
    """Whether a module is a table of positions, or inside it when an adapter wraps it."""
    return bool({"position_embeddings", "embed_positions", "positions_embed", "wpe"} & set(name.split(".")[-3:]))


def _table_rows(module: Any) -> int | None:
    if isinstance(module, nn.ParameterDict):  # the factors of an adapter
        return None
    weight, padding = getattr(module, "weight", None), getattr(module, "padding_idx", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    return len(weight) - getattr(module, "offset", 0) - (0 if padding is None else padding + 1)


def token_rows(model: Any) -> int | None:
    """Number of tokens that a model embeds; None if it has no table of tokens."""
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    weight = getattr(getattr(table, "base_layer", table), "weight", None)
    return None if weight is None else len(weight)


def keep_padding_in_range(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad with another token if the model does not embed the tokenizer's. Padding is masked, so any token will do."""
    rows = token_rows(model)
    if rows is not None and tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        known = [i for i in (tokenizer.eos_token_id, tokenizer.unk_token_id) if i is not None and i < rows]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(known[0] if known else 0)


def check_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Sequence[int]]) -> None:
    """Check that a model embeds all tokens of some texts.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        rows: the token ids of each text.

    Raises:
        UserError: a token has an id above the model's embeddings.
    """
    size = token_rows(model)
    largest = max((max(ids, default=0) for ids in rows), default=0)
    if size is not None and largest >= size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"model: the tokenizer gives {token!r} the id {largest}, but the model embeds {size} tokens; resize the "
            "embeddings of the base model, or use its own tokenizer."
        )


def fingerprint(
    model: torch.nn.Module, dtype: torch.dtype | None = None, read: Callable[[str], torch.Tensor] | None = None
) -> str:
    """A short hash of the names, shapes and first 16 values of a model's weights, to tell base models apart.

    Args:
        model: the model.
        dtype: round the values to this dtype, to compare with a model that was loaded in it.
        read: returns a weight by name, for weights on the meta device.

    Returns:
        The first 16 hexadecimal digits of a SHA-256.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if weight.is_meta and read is not None:
            weight = read(name)
        if of_torchao(weight):
            weight = weight.dequantize()
        first = weight.flatten()[:16]
        if dtype is not None and first.is_floating_point():
            first = first.to(dtype)
        digest.update(repr((name, tuple(weight.shape), first.float().tolist())).encode())
    return digest.hexdigest()[:16]


def stored_fingerprint(name: str, revision: str | None, dtype: torch.dtype) -> str:
    """:func:`pera_lab.bases.files_fingerprint` of a base model by name, which tells quantized bases apart.

    Raises:
        UserError: as :func:`local_folder`.
    """
    location = resolve(name)
    cached = (try_to_load_from_cache(location, file, revision=revision) for file in (INDEX, SINGLE))
    known = None if os.path.isdir(location) else next((file for file in cached if isinstance(file, str)), None)
    return files_fingerprint(local_folder(name, revision) if known is None else Path(known).parent, dtype)


def local_folder(name: str, revision: str | None = None) -> Path:
    """The local folder of a base model. The files of a hub id are downloaded if they are not cached.

    Raises:
        UserError: as :func:`resolve`, or the download fails.
    """
    location = resolve(name)
    _check_plain(name, location, revision)
    if os.path.isdir(location):
        return Path(location)
    with reading(name):
        wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken"]
        return Path(snapshot_download(location, revision=revision, allow_patterns=wanted))


def dequantise(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its weights dequantised.

    Raises:
        UserError: transformers cannot dequantise this kind of quantisation.
    """
    method = getattr(model.config.quantization_config, "quant_method", "unknown")
    for module in model.modules():
        weight: Any = module._parameters.get("weight")
        if weight is not None and of_torchao(weight):
            module._parameters["weight"] = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
    transposed = [name for name, module in model.named_modules() if getattr(module, "source_cls", None) is Conv1D]
    quantised: Any = model
    try:
        plain = quantised if str(getattr(method, "value", method)) == "torchao" else quantised.dequantize()
    except (NotImplementedError, ValueError, ImportError) as error:
        raise UserError(f"--dequantise: a base model quantised with {method} cannot be dequantised: {error}") from error
    for name in transposed:  # bitsandbytes holds them as nn.Linear
        layer = plain.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.T.contiguous(), requires_grad=False)
    return unquantised(plain).eval()  # type: ignore[no-any-return]
