"""What a command was pointed at, and its model and tokenizer."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pera.errors import UserError
from pera_lab import models
from pera_lab.adapters import Adapter
from pera_lab.files import user_path
from pera_lab.mlx import MlxAdapter, is_mlx
from pera_lab.placement import Attention, DeviceMap
from pera_lab.progress import stage
from pera_lab.quantization import Quantization
from pera_lab.runs import Run
from pera_lab.text import quoted


class Location(NamedTuple):
    """What a command was pointed at."""

    run: Run | None
    """The run, if it is one."""
    adapter: Adapter | None
    """The adapter, if there is one."""
    base: str
    """The base model."""
    revision: str | None = None
    """Branch, tag or commit of the base model on the hub."""
    trust_remote_code: bool = False
    """Whether code that comes with the base model may run."""
    tokenizer: Path | None = None
    """The folder of a tokenizer that was saved with the adapter and replaces the base model's."""
    quantization: Quantization | None = None
    """How the base model is quantized while it is loaded."""
    attn_implementation: Attention | None = None
    """How the base model computes attention."""
    device_map: DeviceMap | None = None
    """How the layers of the base model are placed on several accelerators."""

    @property
    def name(self) -> str:
        """The run folder, else the adapter folder, else the base model."""
        return str(self.run.path if self.run else self.adapter.path if self.adapter else self.base)

    def require_adapter(self) -> Adapter:
        """The adapter; raises UserError if this is a base model."""
        if self.adapter is None:
            raise UserError(f"{self.base!r} has no adapter; give a run folder or an adapter folder.")
        return self.adapter


def locate(name: str, *, trust_remote_code: bool = False) -> Location:
    """Find out what ``name`` is: a run folder, an adapter folder, or a model (see :func:`pera_lab.models.resolve`).

    Args:
        name: a path, or the name of a model.
        trust_remote_code: run code that comes with the model. The recipe of a run cannot allow it.

    Raises:
        UserError: nothing is there, the run is unfinished, or the adapter does not name its base model.
    """
    location = _located(name, trust_remote_code)
    return location._replace(trust_remote_code=trust_remote_code)


def locate_adapter(name: str, *, trust_remote_code: bool = False) -> Location:
    """:func:`locate` for commands that need an adapter.

    Raises:
        UserError: as :func:`locate`, or ``name`` is a model.
    """
    location = locate(name, trust_remote_code=trust_remote_code)
    location.require_adapter()
    return location


def locate_run(run: Run, *, base: bool = False) -> Location:
    """The adapter of a run on its base model, or with ``base`` the base model alone. The adapter may not exist yet."""
    model, adapter = run.recipe.model, None if base else run.adapter
    source = (model.name, model.revision, run.trust_remote_code, run.adapter.tokenizer)
    return _loaded_as_by(run, Location(run, adapter, *source))


def _loaded_as_by(run: Run, location: Location) -> Location:
    """``location`` with its base model quantized and placed as the recipe of a run asks for."""
    model = run.recipe.model
    return location._replace(
        quantization=model.quantization, attn_implementation=model.attn_implementation, device_map=model.device_map
    )


def _run_of(adapter: Adapter) -> Run | None:
    """The run that an adapter folder lies in, if there is one."""
    run = Run(adapter.path.absolute().parent)
    return run if run.recipe_file.is_file() and run.adapter.path.name == adapter.path.name else None


def before_quantization(location: Location) -> Location:
    """``location`` with its base model as it is in the files, and a warning if that is not the base of the training.

    Conversions are exact on this base. On the quantized one, rounding would lose most of the adapter.
    """
    if location.quantization is not None:
        warnings.warn(
            f"{location.name!r} was trained on a base model quantized to {location.quantization}; this command uses "
            "the base model before quantization",
            stacklevel=2,
        )
    return location._replace(quantization=None)


def _located(name: str, trust_remote_code: bool) -> Location:
    path = user_path(name)
    held = {kind: file for kind, file in _KINDS.items() if os.path.isfile(path / file)}
    if "adapter" in held and not any(os.path.isfile(path / file) for file in models.WEIGHTS):
        held.pop("model", None)  # some trainers save the configuration of the base with the adapter
    if len(held) > 1:
        what = " and ".join(f"{kind} ({file})" for kind, file in held.items())
        raise UserError(f"{name!r} holds more than one of a run, an adapter and a model: {what}; separate them.")
    if "run" in held:
        run = Run(path, trust_remote_code=trust_remote_code)
        if not run.finished:
            raise UserError(f"{name!r} is an unfinished run; resume it with: pera train {quoted(name)} --resume")
        return locate_run(run)
    if "adapter" in held:
        adapter = MlxAdapter(path) if is_mlx(path) else Adapter(path)
        base, revision = adapter.config.base_model_name_or_path, adapter.config.revision
        if not base:
            key = "model" if isinstance(adapter, MlxAdapter) else "base_model_name_or_path"
            raise UserError(f"{name!r}: adapter_config.json has no {key}; add it.")
        location = Location(None, adapter, base, revision, tokenizer=adapter.tokenizer)
        inside = _run_of(adapter)
        return location if inside is None else _loaded_as_by(inside, location)
    if name and os.path.isdir(path) and "model" not in held:
        raise UserError(f"{name!r} is not a run folder, an adapter folder or a model folder.")
    return Location(None, None, name)


_KINDS = {"run": "recipe.yaml", "adapter": models.ADAPTER_CONFIG, "model": "config.json"}
"""The file that tells what a folder holds."""


@contextmanager
def _where_the_base_is_named(location: Location) -> Iterator[None]:
    """Add the file and the key that name the base model to the message if there is no such model. A run that is only
    starting has no file yet."""
    try:
        yield
    except models.MissingModel as error:
        if location.run is not None and location.run.new:
            raise
        if location.run is not None:
            key, file = "model.name", repr(str(location.run.recipe_file))
        elif location.adapter is not None:
            key, file = "base_model_name_or_path", repr(str(location.adapter.path / models.ADAPTER_CONFIG))
        else:
            raise
        raise UserError(f"{error.problem}; set {key} in {file} to a folder, a .gguf file or a hub id.") from error


def base_folder(location: Location) -> Path:
    """The local folder of the base model of a :class:`Location`; see :func:`pera_lab.models.local_folder`."""
    with _where_the_base_is_named(location):
        return models.local_folder(location.base, location.revision)


def open_model(
    location: Location, dtype: str = "stored", labels: int | None = None, *, needs_tokenizer: bool = True
) -> tuple[Any, Any]:
    """Load the model and tokenizer of a :class:`Location`, in evaluation mode.

    Args:
        location: what to load. With an adapter, the model is a ``PeftModel`` and the adapter is not merged.
        dtype: dtype of the base model, a key of :data:`pera_lab.models.DTYPES`, "stored" or "auto".
        labels: outputs of a new classification head (see :func:`pera_lab.models.load_model`). A head that was saved
            with the adapter or the model is loaded without being asked for.
        needs_tokenizer: whether a base without a tokenizer is an error.

    Returns:
        The model and its tokenizer, or None if there is no tokenizer.

    Raises:
        UserError: the base model cannot be loaded or is not the one the adapter was trained on, or the tokenizer has
            more tokens than the model embeds.
    """
    source: dict[str, Any] = {"revision": location.revision, "trust_remote_code": location.trust_remote_code}
    if location.adapter is not None:
        labels = location.adapter.labels
    elif labels is None:
        labels = models.saved_labels(location.base)
    with _where_the_base_is_named(location), stage(f"loading {location.base}"):
        if needs_tokenizer:
            models.check_tokenizer(location.base, location.tokenizer or models.resolve(location.base))
        base = models.load_model(
            location.base,
            dtype=dtype,
            labels=labels,
            quantization=location.quantization,
            attn_implementation=location.attn_implementation,
            device_map=location.device_map,
            **source,
        )
    check_fingerprint(location, base)
    model = base if location.adapter is None else location.adapter.load_on(base)
    tokenizer = open_tokenizer(location)
    if tokenizer is None:
        return model, None
    if location.tokenizer is not None and len(tokenizer) > (rows := models.token_rows(base) or 0):
        raise UserError(
            f"{str(location.tokenizer)!r} has a tokenizer of {len(tokenizer)} tokens, but the model embeds {rows}; "
            "save the adapter with save_embedding_layers=True, or with its base model's tokenizer."
        )
    models.keep_padding_in_range(base, tokenizer)
    if labels is not None:
        tokenizer.padding_side = "right"  # encoders count positions from the left, padding included
        base.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def open_tokenizer(location: Location) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a :class:`Location`: the one saved with the adapter, else the base model's; None if there
    is neither."""
    if location.tokenizer is None and not models.has_tokenizer(models.resolve(location.base)):
        return None
    source: dict[str, Any] = {"revision": location.revision, "trust_remote_code": location.trust_remote_code}
    return models.load_tokenizer(location.tokenizer or location.base, **source)


def copy_tokenizer(location: Location, folder: Path) -> None:
    """Copy the tokenizer that was saved with the adapter, if there is one, to ``folder``."""
    for file in models.tokenizer_files(location.tokenizer) if location.tokenizer else ():
        shutil.copyfile(file, folder / file.name)


def check_fingerprint(
    location: Location, base: PreTrainedModel, read: Callable[[str], torch.Tensor] | None = None
) -> None:
    """Check that ``base`` is the model that the adapter was trained on, as its run recorded it.

    Nothing is checked if no fingerprint was recorded, or if ``base`` was stored quantized or has a lower precision than
    the recorded model. The record of a base that was quantized while loading is compared with the files.

    Args:
        location: the adapter, and the run that may have recorded its base model.
        base: the base model as it was loaded.
        read: returns a weight of the base by name, for weights on the meta device.

    Raises:
        UserError: the fingerprints differ.
    """
    if location.adapter is None:
        return
    run = location.run or _run_of(location.adapter)
    recorded = {} if run is None else run.recorded_base()
    trained_in, loaded_in = models.DTYPES.get(recorded.get("dtype", "")), next(base.parameters()).dtype
    if run is None or trained_in is None:
        return
    if "quantization" in recorded:
        found = models.stored_fingerprint(location.base, location.revision, trained_in)
    else:
        if getattr(base, "hf_quantizer", None) is not None:
            return
        if loaded_in != trained_in and torch.promote_types(loaded_in, trained_in) != loaded_in:
            return
        found = models.fingerprint(run.body(base), trained_in, read)
    if found != recorded.get("fingerprint", found):
        raise UserError(
            f"{str(location.adapter.path)!r} was trained on {recorded.get('name')!r} with fingerprint "
            f"{recorded['fingerprint']}, but the base model {location.base!r} has fingerprint {found}; use the base "
            "model of the training."
        )
