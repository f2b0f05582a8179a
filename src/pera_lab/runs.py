"""The run folder: what is in it, how it is read and written, and what a later command may take in its place."""

from __future__ import annotations

import math
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType, TaskType
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pera.errors import UserError
from pera.tuner import check_lists
from pera_lab import models
from pera_lab.files import disk_errors, read_json, read_lines, read_object, require_free, write_atomic, write_json
from pera_lab.recipe import Recipe, difference, load_recipe

T = TypeVar("T")

PACKAGES = (
    *("pera", "torch", "transformers", "peft", "accelerate", "safetensors"),
    *("reasoning-gym", "scipy", "scikit-learn", "datasets", "lm-eval", "matplotlib", "jinja2", "gguf", "xllamacpp"),
)
"""What :func:`environment` reports on: the core, then what is optional."""

_WRAPPERS = re.compile(r"\.(base_layer|original_module|token_adapter|modules_to_save)\b")
"""What PEFT puts into the names of the modules of a base model."""

HEAD = re.compile(r"\.(classifier|score)\.")
"""What the names of the weights of a classification head hold; PEFT trains modules of these names with an adapter."""

COMPLETE = "complete"
"""Empty file that marks a checkpoint whose saving has ended."""


class Run:
    """A run folder; docs/architecture.md lists what is in it. The adapter is there if and only if training has
    ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[Path] | None = None  # the folders that create() made
        self.recipe_file = path / "recipe.yaml"
        self.environment_file = path / "environment.json"
        self.data_file = path / "data.json"
        self.metrics_file = path / "metrics.jsonl"
        self.validation_file = path / "validation.jsonl"
        self.scores_file = path / "scores.json"
        self.lm_eval_file = path / "lm_eval.json"
        self.cost_file = path / "cost.json"
        self.effect_file = path / "effect.json"
        self.interaction_file = path / "interaction.json"
        self.predictions = path / "predictions"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"

    @classmethod
    def create(cls, recipe: Recipe, output: Path | None = None) -> Run:
        """A new run folder with its recipe: ``output``, by default ``runs/<recipe>-<time>``.

        Raises:
            UserError: the folder exists and is not empty, or cannot be made.
        """
        path = output or _unused(Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        require_free(path, replaced=False)
        run = cls(path)
        run._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        write_atomic(run.recipe_file, recipe.to_yaml())
        return run

    @contextmanager
    def discarded_on_error(self) -> Iterator[None]:
        """If the block fails before anything was logged, saved or scored, take away again what :meth:`create` made."""
        try:
            yield
        except BaseException:
            saved = any(self.checkpoints.glob("*"))  # the folder itself is there before the first step
            begun = saved or self.scores_file.is_file() or self.metrics() or self.validation()
            if self._made is not None and not begun:
                for file in (self.recipe_file, self.environment_file, self.data_file, self.metrics_file):
                    file.unlink(missing_ok=True)
                for folder in (self.checkpoints, *self._made):
                    with suppress(OSError):  # another run may have come to lie in a parent
                        folder.rmdir()
            raise

    @classmethod
    def latest_unfinished(cls, recipe: Recipe) -> Run:
        """The newest unfinished run of a recipe in ``runs/``.

        Raises:
            UserError: there is none.
        """
        candidates = [cls(p.parent) for p in Path("runs").glob(f"{recipe.name}-*/recipe.yaml")]
        unfinished = [run for run in candidates if not run.adapter.is_dir() and run.recipe.name == recipe.name]
        if not unfinished:
            raise UserError(f"--resume: runs/ has no unfinished run of {recipe.name!r}; start one without --resume.")
        return max(unfinished, key=lambda run: run.recipe_file.stat().st_mtime)

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe of the run."""
        return load_recipe(str(self.recipe_file))

    @property
    def location(self) -> Location:
        """The run's adapter on its base model, for :func:`open_model`."""
        base, tokenizer = self.recipe.model, _own_tokenizer(self.adapter)
        return Location(self, self.adapter, base.name, base.revision, base.trust_remote_code, tokenizer)

    def last_checkpoint(self) -> Path | None:
        """The last checkpoint that was saved completely; later, broken ones are removed."""
        found = ((p.name.removeprefix("checkpoint-"), p) for p in self.checkpoints.glob("checkpoint-*") if p.is_dir())
        steps = {int(step): path for step, path in found if step.isdecimal()}
        for step in sorted(steps, reverse=True):
            if (steps[step] / COMPLETE).is_file():
                return steps[step]
            shutil.rmtree(steps[step])
        return None

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; a last line that was cut off by a kill is left out."""
        return [line for line in read_lines(self.metrics_file) if "step" in line]

    def validation(self) -> list[dict[str, Any]]:
        """The lines of ``validation.jsonl``: loss and metrics on the rows that choose the checkpoint."""
        return [line for line in read_lines(self.validation_file) if "step" in line]

    def scores(self) -> dict[str, Any]:
        """The content of ``scores.json``: ``base`` and ``adapter``, as far as they were measured."""
        return read_object(self.scores_file) if self.scores_file.is_file() else {}

    def body(self, model: torch.nn.Module) -> torch.nn.Module:
        """What the fingerprint of a base model is of: all but a new classification head, which differs by seed."""
        body: torch.nn.Module = model if self.recipe.task_type == "CAUSAL_LM" else model.base_model  # type: ignore
        return body

    def data_hashes(self) -> dict[str, str]:
        """The SHA-256 of each data file by its place in ``data.json``, such as "test.piqa", as far as recorded."""
        return _hashes(read_object(self.data_file)) if self.data_file.is_file() else {}

    def check_data(self, manifest: Mapping[str, Any]) -> None:
        """Raise UserError if the files of a task are not those that the run was begun with: other rows would be drawn,
        and what was trained on would be scored. Nothing is said where no file was recorded."""
        recorded = self.data_hashes()
        found = _hashes(manifest)
        for split in {**recorded, **found} if recorded else {}:
            if recorded.get(split) != found.get(split):
                was, now = (hashes.get(split, "none")[:16] for hashes in (recorded, found))
                raise UserError(
                    f"task.data: the file of {split!r} is not the one that {str(self.path)!r} was begun with: its "
                    f"SHA-256 begins with {now}, in data.json with {was}; restore the file, or train anew."
                )

    def recorded_base(self) -> dict[str, str]:
        """Name, dtype and fingerprint of the base model as ``environment.json`` has them; empty if it is not there."""
        recorded = read_object(self.environment_file).get("base_model", {}) if self.environment_file.is_file() else {}
        if not isinstance(recorded, dict) or not all(isinstance(value, str) for value in recorded.values()):
            raise UserError(
                f"{str(self.environment_file)!r}: base_model={recorded!r} should hold name, dtype and fingerprint; "
                "restore or remove the file."
            )
        return recorded

    def _check_base(self, base: dict[str, str]) -> None:
        """Raise UserError if the base model is not the one that the run was begun with, or in another dtype."""
        recorded = self.recorded_base()
        for key in ("dtype", "fingerprint"):
            if (was := recorded.get(key, base[key])) != base[key]:
                raise UserError(
                    f"--resume: {str(self.path)!r} was begun with {base['name']!r} of the {key} {was}, and here it has "
                    f"{base[key]}; go on with the same model on the same kind of machine, or train anew."
                )

    def write_environment(self, model: torch.nn.Module, command: list[str]) -> None:
        """Record versions, hardware, seed, dtype and the fingerprint of the base model.

        Raises:
            UserError: the run was begun with another base model, or with it in another dtype.
        """
        recipe = self.recipe
        base = {
            "name": recipe.model.name,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "fingerprint": models.fingerprint(self.body(model)),
        }
        self._check_base(base)
        write_json(
            self.environment_file,
            {
                "command": command,
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                **environment(),
                "seed": recipe.training.seed,
                "base_model": base,
            },
        )


def read_as(file: Path, kind: type[T]) -> T:
    """The content of a JSON file of a run as what it was written from, such as a dataclass.

    Raises:
        UserError: the file is missing, is not JSON, or holds something else.
    """
    return checked(read_json(file), kind, repr(str(file)))


def checked(content: Any, kind: type[T], name: str) -> T:
    """What was read from the file ``name`` as what it was written from; UserError if it holds something else."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise UserError(f"{name} is not as pera writes it ({where}: {first['msg']}).") from error


def _hashes(manifest: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The SHA-256 of each file in a manifest by its place there, such as "train" or "test.piqa"."""
    found: dict[str, str] = {}
    for key, entry in manifest.items():
        if isinstance(entry, Mapping):
            found |= {prefix + key: entry["sha256"]} if entry.get("sha256") else _hashes(entry, f"{prefix}{key}.")
    return found


def _unused(path: Path) -> Path:
    """``path``, or with a number behind it if it is taken."""
    numbered = (path.with_name(f"{path.name}-{i}") for i in count(2))
    return next(p for p in chain([path], numbered) if not p.exists())


def resumable(source: str, overrides: list[str] | None, output: Path | None) -> Run:
    """The unfinished run to go on with: ``source`` itself if it is a run folder, else ``output``, else the newest
    unfinished run of the recipe ``source`` in ``runs/``.

    Raises:
        UserError: there is no such run, it is finished, or the recipe given now is not the one it was
            started with.
    """
    if (Path(source) / "recipe.yaml").is_file():
        run = Run(Path(source))
        given = load_recipe(str(run.recipe_file), overrides)
        if output is not None:
            raise UserError(f"--output={str(output)!r} has no effect when a run folder is resumed.")
    else:
        given = load_recipe(source, overrides)
        run = Run(output) if output is not None else Run.latest_unfinished(given)
    if not run.recipe_file.is_file():
        raise UserError(f"--resume: {str(run.path)!r} is not a run folder; start one without --resume.")
    if run.adapter.is_dir():
        raise UserError(f"--resume: {str(run.path)!r} is finished; look at it with: pera evaluate {run.path}")
    if (changed := difference(run.recipe, given)) is not None:
        raise UserError(f"--resume: {changed} differs from the recipe that {str(run.path)!r} was started with.")
    return run


class Location(NamedTuple):
    """What a command was pointed at: the run, if it is one, the adapter folder, if there is one, the base model, and
    the folder of a tokenizer that was saved with the adapter and takes the place of the base's."""

    run: Run | None
    adapter: Path | None
    base: str
    revision: str | None = None
    trust_remote_code: bool = False
    tokenizer: Path | None = None


def locate(name: str, *, trust_remote_code: bool = False) -> Location:
    """Find out what ``name`` is: a run folder, an adapter folder, or a model (see :func:`pera_lab.models.resolve`).

    Args:
        name: a path, or the name of a model.
        trust_remote_code: run code that comes with the model, also where no recipe says so.

    Raises:
        UserError: nothing is there, the run is unfinished, or the adapter does not say what its base is.
    """
    location = _located(name)
    return location._replace(trust_remote_code=True) if trust_remote_code else location


def _located(name: str) -> Location:
    path = Path(name).expanduser()
    if (path / "recipe.yaml").is_file():
        run = Run(path)
        if not run.adapter.is_dir():
            raise UserError(f"{name!r} is an unfinished run; go on with: pera train {name} --resume")
        return run.location
    if (path / "adapter_config.json").is_file():
        config = adapter_config(path)
        if not config.base_model_name_or_path:
            raise UserError(f"{name!r}: adapter_config.json names no base_model_name_or_path; add it.")
        base, revision = config.base_model_name_or_path, config.revision
        return Location(None, path, base, revision, tokenizer=_own_tokenizer(path))
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{name!r} is neither a run folder, nor an adapter folder, nor a model folder.")
    return Location(None, None, name)


def _own_tokenizer(adapter: Path) -> Path | None:
    """The folder of an adapter if a tokenizer was saved in it, as TRL, Axolotl and LLaMA-Factory do."""
    return adapter if (adapter / "tokenizer_config.json").is_file() else None


def locate_adapter(name: str, *, trust_remote_code: bool = False) -> tuple[Location, Path]:
    """:func:`locate` for what needs an adapter, and the folder of that adapter.

    Raises:
        UserError: as :func:`locate`, or ``name`` is a model.
    """
    location = locate(name, trust_remote_code=trust_remote_code)
    if location.adapter is None:
        raise UserError(f"{name!r} has no adapter; give a run or an adapter folder.")
    return location, location.adapter


def open_model(
    location: Location, dtype: str = "stored", labels: int | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model of a :class:`Location`, in a ``PeftModel`` with the adapter unmerged if it has one, in evaluation
    mode, and its tokenizer.

    ``labels`` asks for a new classification head (:func:`pera_lab.models.load_model`); a saved one, with an adapter
    or a model, is loaded without being asked for.
    """
    source: dict[str, Any] = {"revision": location.revision, "trust_remote_code": location.trust_remote_code}
    if location.adapter is not None:
        labels = adapter_labels(location.adapter)
    elif labels is None:
        labels = models.saved_labels(location.base)
    base = models.load_model(location.base, dtype=dtype, labels=labels, **source)
    check_fingerprint(location, base)
    model = base if location.adapter is None else load_adapter(base, location.adapter)
    tokenizer = open_tokenizer(location)
    if location.tokenizer is not None and len(tokenizer) > (rows := _rows(base)):
        raise UserError(
            f"{str(location.tokenizer)!r} has a tokenizer of {len(tokenizer)} tokens, and the model embeds {rows}; "
            "save the adapter with save_embedding_layers=True, or with the tokenizer of its base."
        )
    if labels is not None:
        tokenizer.padding_side = "right"  # positions of an encoder are counted from the left, padding included
        base.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def open_tokenizer(location: Location) -> PreTrainedTokenizerBase:
    """The tokenizer of a :class:`Location`: the one that was saved with the adapter, else the base's."""
    source: dict[str, Any] = {"revision": location.revision, "trust_remote_code": location.trust_remote_code}
    return models.load_tokenizer(location.tokenizer or location.base, **source)


def copy_tokenizer(location: Location, folder: Path) -> None:
    """Copy the tokenizer that was saved with an adapter, if one was, to ``folder``."""
    for file in models.tokenizer_files(location.tokenizer) if location.tokenizer else ():
        shutil.copyfile(file, folder / file.name)


def adapter_labels(folder: Path) -> int | None:
    """Outputs of the classification head in an adapter folder; None if the adapter is for a causal language model.

    Raises:
        UserError: it is for classification, and holds no head.
    """
    if adapter_config(folder).task_type != TaskType.SEQ_CLS:
        return None
    for key, weight in adapter_weights(folder).items():
        if key.endswith(("classifier.weight", "classifier.out_proj.weight", "score.weight")):
            return int(weight.shape[0])
    raise UserError(f"{str(folder)!r} is an adapter for classification, and holds no weights of the head.")


def check_fingerprint(
    location: Location, base: PreTrainedModel, read: Callable[[str], torch.Tensor] | None = None
) -> None:
    """Raise UserError if ``base`` is not the model that the run of the adapter recorded it was trained on.

    Nothing is said where nothing was recorded, or where ``base`` was loaded in less than the precision of the record,
    or quantised. ``read`` is for weights on the meta device; see :func:`pera_lab.models.fingerprint`.
    """
    if location.adapter is None:
        return
    run = location.run or Run(location.adapter.absolute().parent)
    recorded = run.recorded_base() if run.recipe_file.is_file() else {}
    trained_in, loaded_in = models.DTYPES.get(recorded.get("dtype", "")), next(base.parameters()).dtype
    if trained_in is None or getattr(base, "hf_quantizer", None) is not None:
        return
    if loaded_in != trained_in and torch.promote_types(loaded_in, trained_in) != loaded_in:
        return
    found = models.fingerprint(run.body(base), trained_in, read)
    if found != recorded.get("fingerprint", found):
        raise UserError(
            f"{str(location.adapter)!r} was trained on {recorded.get('name')!r} with the fingerprint "
            f"{recorded['fingerprint']}, and the base model {location.base!r} has {found}; give the one it was "
            "trained on."
        )


def adapter_config(folder: Path) -> PeftConfig:
    """The configuration in an adapter folder.

    Raises:
        UserError: it is missing, not JSON, of an unknown method, or holds a value its method refuses.
    """
    content = read_json(folder / "adapter_config.json")
    if not isinstance(content, dict) or "peft_type" not in content:
        raise UserError(f"{str(folder)!r}: adapter_config.json names no peft_type.")
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(value := content.get(key), str | None):
            raise UserError(f"{str(folder)!r}: adapter_config.json: {key}={value!r} should be a string.")
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(folder))
        check_lists(config)
    except KeyError as error:
        raise UserError(f"{str(folder)!r}: peft_type={content['peft_type']!r} is not a method of this PEFT.") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{str(folder)!r}: adapter_config.json: {error}") from error
    return config


def method_name(config: PeftConfig) -> str:
    """PEFT's name of an adapter's method, such as "LORA"."""
    return PeftType(config.peft_type).value


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in an adapter folder, on the CPU.

    Raises:
        UserError: the weights file is missing, cut off, or holds NaN or infinity.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file() and (folder / WEIGHTS_NAME).is_file():
        raise UserError(
            f"{str(folder)!r} has its weights in {WEIGHTS_NAME}, and only safetensors is read; if you trust the file, "
            f"write it anew: PeftModel.from_pretrained(base, {str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    if not file.is_file():
        raise UserError(f"{str(folder)!r} has no {SAFETENSORS_WEIGHTS_NAME}; the adapter's weights are missing.")
    try:
        with safe_open(file, framework="pt") as f:
            weights = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(file)!r} is not a whole safetensors file: {error}.") from error
    for key, weight in weights.items():
        if not torch.isfinite(weight.float() if weight.itemsize == 1 else weight).all():  # float8 cannot say itself
            raise UserError(f"{str(folder)!r}: NaNs detected in the weights of {key}. The adapter seems to be broken.")
    return weights


def resized_to(base: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path) -> int | None:
    """How many tokens an adapter was trained with, if they are not those of its base: PEFT saves embeddings whole with
    it after ``resize_token_embeddings``.

    Args:
        base: the base model as it was loaded.
        weights: the weights of the adapter.
        folder: its folder, for the message.

    Raises:
        UserError: the weights lack the new rows of the embeddings or of the head.
    """
    embeddings, rows = _embeddings(base), _rows(base)
    saved = {base_name(key): len(weight) for key, weight in saved_embeddings(base, weights).items()}
    resized = max((found for found in saved.values() if found != rows), default=None)
    shared = len({id(weight) for weight in embeddings.values()}) == 1
    if resized and not shared and (missing := sorted(embeddings.keys() - saved.keys())):
        raise UserError(
            f"{str(folder)!r} was trained with {resized} tokens, and its base has {rows}; its file lacks "
            f"{missing[0]!r}, so merge it where it was trained."
        )
    return resized


def saved_embeddings(base: PreTrainedModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the token embeddings and of the head that PEFT saves whole with some adapters."""
    embeddings = _embeddings(base)
    return {key: weight for key, weight in weights.items() if base_name(key) in embeddings}


def _rows(base: Any) -> int:
    return len(base.get_input_embeddings().weight)


def _embeddings(base: Any) -> dict[str, torch.Tensor]:
    """The weights of the token embeddings and of the head by their names."""
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    return {f"{name}.weight": module.weight for name, module in base.named_modules() if module in ends}


def base_name(key: str) -> str:
    """The name in the base model of a weight of a model with an adapter, or of one that PEFT saved."""
    return _WRAPPERS.sub("", key.removeprefix("base_model.model."))


def trained_sizes(folder: Path) -> dict[str, int]:
    """Number of values of each trained tensor in an adapter folder, from the header of the file. Left out is what PEFT
    saves beside: the base weights of some embeddings, and DeLoRA's norms of the base's columns."""
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as f:
        sizes = {key: math.prod(f.get_slice(key).get_shape()) for key in f.keys()}  # noqa: SIM118
    return {key: n for key, n in sizes.items() if not key.endswith((".base_layer.weight", ".delora_w_norm"))}


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a saved adapter of any PEFT method on its base model, for inference. The base gets as many tokens as the
    adapter was trained with.

    Raises:
        UserError: the folder is broken, or the adapter was trained on another base model.
    """
    config = adapter_config(folder)
    weights = adapter_weights(folder)
    saved = saved_embeddings(base, weights)
    whole = tuple(f"base_model.model.{base_name(key).removesuffix('weight')}" for key in saved)
    if rows := resized_to(base, weights, folder):
        base.resize_token_embeddings(rows, mean_resizing=False)
    try:
        empty = any(weight.is_meta for weight in base.parameters())  # the adapter's weights are there all the same
        model = PeftModel.from_pretrained(base, str(folder), config=config, low_cpu_mem_usage=empty)
    except KeyError as error:
        raise UserError(
            f"{str(folder)!r} does not fit its own configuration: the weights file lacks {error}."
        ) from error
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        first, *others = " ".join(str(error).split()).split(" size mismatch for ")
        reason = " size mismatch for ".join([first, *others[:1]]) + (
            f" ({len(others)} such)" if len(others) > 1 else ""
        )
        raise UserError(f"{str(folder)!r} does not fit its base model or its own configuration: {reason}") from error
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    for key in sorted(expected.keys() ^ weights.keys()):
        if key not in expected and key.startswith(whole):  # all that is in embeddings which PEFT saved whole
            continue
        where = "the weights file lacks" if key in expected else "the base model has no place for"
        raise UserError(f"{str(folder)!r} does not fit the base model: {where} {key!r}.")
    return model.eval()


def environment() -> dict[str, Any]:
    """Versions and hardware of this machine; None stands for an optional package that is not installed."""
    accelerator = models.device()
    return {
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if accelerator.type == "cuda" else accelerator.type,
        "fast_dtype": str(models.fast_dtype()).removeprefix("torch."),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def command_line() -> list[str]:
    """The command that is running, for the record."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
