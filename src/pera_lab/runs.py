"""The run folder: what it holds, and which run a command resumes."""

from __future__ import annotations

import glob
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from pera.errors import UserError
from pera_lab import checkpoints, models, processes
from pera_lab.adapters import Adapter
from pera_lab.environment import environment
from pera_lab.files import (
    check_folder_name,
    check_output,
    disk_errors,
    lock_of,
    locked,
    read_lines,
    read_object,
    remove_empty,
    require_free,
    unfinished,
    write_atomic,
    write_json,
)
from pera_lab.recipe import Recipe, difference, load_recipe
from pera_lab.text import quoted


class Run:
    """A run folder; docs/architecture.md lists its files.

    Args:
        path: the folder.
        trust_remote_code: run code that comes with the base model. The recipe in the folder cannot allow it, because
            the folder may come from somebody else.
    """

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        self.path = path
        self.trust_remote_code = trust_remote_code
        self._made: list[Path] | None = None
        self.lock_file = path / ".lock"
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
        self.adapter = Adapter(path / "adapter")

    @classmethod
    def create(cls, recipe: Recipe, output: Path | None = None) -> Run:
        """Create a run folder that holds ``recipe``.

        Args:
            recipe: the recipe to train. It decides whether code that comes with the base model may run.
            output: the folder (default: ``runs/<recipe>-<time>``).

        Raises:
            UserError: the folder is not empty or cannot be created.
        """
        if output is None:
            check_folder_name(recipe.name)
        path = output or Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        check_output(path)
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        if output is None:
            path = _new_folder(path)
            made.insert(0, path)
        run = cls(path, trust_remote_code=recipe.model.trust_remote_code)
        run._require_free()
        try:
            with disk_errors(path):
                path.mkdir(parents=True, exist_ok=True)
            with run.in_use():
                run._require_free()
                write_atomic(run.recipe_file, recipe.record())
        except BaseException:
            remove_empty(made)
            raise
        run._made = made
        return run

    def _require_free(self) -> None:
        if self.recipe_file.is_file():
            raise UserError(
                f"output: {str(self.path)!r} exists and is not empty: it holds a run; give another folder, or continue "
                f"the run with: pera train {quoted(self.path)} --resume"
            )
        own = (self.lock_file, lock_of(self.recipe_file), unfinished(self.recipe_file))  # a kill may leave them
        require_free(self.path, replaced=False, ignored=own)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep other processes from training this run while the block runs.

        Raises:
            InUse: another process trains it.
            UserError: the folder cannot be written.
        """
        with locked(self.lock_file, self.path):
            yield

    def remove_stale_lock(self) -> None:
        """Remove the lock that a process left which was killed when training had ended."""
        with suppress(UserError), self.in_use():
            pass

    @contextmanager
    def discarded_on_error(self) -> Iterator[None]:
        """Remove what :meth:`create` made if the block fails before anything is saved or scored.

        What was logged is kept after an interruption. After a :class:`UserError`, such as a loss that is not finite,
        it is removed, because nothing can be resumed. A folder that another process uses is left to it.
        """
        try:
            yield
        except BaseException as error:
            with suppress(OSError, UserError):
                self._discard(logs=isinstance(error, UserError))
            raise

    def _discard(self, *, logs: bool) -> None:
        with self.in_use():
            saved = any(self.checkpoints.glob("*"))  # the folder itself exists before the first step
            started = saved or self.scores_file.is_file() or (not logs and (self.metrics() or self.validation()))
            if self._made is None or started:
                return
            logged = (self.metrics_file, self.validation_file)
            for file in (self.recipe_file, self.environment_file, self.data_file, *logged):
                for path in (file, lock_of(file), unfinished(file)):
                    path.unlink(missing_ok=True)
        remove_empty([self.checkpoints, *self._made])  # a parent may hold another run

    @classmethod
    def latest_unfinished(cls, recipe: Recipe) -> Run:
        """The newest unfinished run of a recipe in ``runs/``.

        Raises:
            UserError: there is none.
        """
        candidates = [cls(p.parent) for p in Path("runs").glob(f"{glob.escape(recipe.name)}-*/recipe.yaml")]
        unfinished = [run for run in candidates if not run.finished and run.recipe.name == recipe.name]
        if not unfinished:
            raise UserError(f"--resume: runs/ has no unfinished run of {recipe.name!r}; start one without --resume.")
        return max(unfinished, key=lambda run: run.recipe_file.stat().st_mtime)

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe of the run."""
        return load_recipe(str(self.recipe_file), recorded=True)

    @property
    def new(self) -> bool:
        """Whether this process created the folder, so that its recipe is the user's."""
        return self._made is not None

    @property
    def finished(self) -> bool:
        """Whether training has ended. The adapter folder exists from then on."""
        return self.adapter.path.is_dir()

    def last_checkpoint(self) -> Path | None:
        """The last complete checkpoint, or None."""
        return next(iter(checkpoints.complete(self.checkpoints)), None)

    def remove_incomplete_checkpoints(self) -> None:
        """Remove the checkpoints that a killed process did not complete."""
        kept = checkpoints.complete(self.checkpoints)
        for checkpoint in checkpoints.saved(self.checkpoints):
            if checkpoint not in kept:
                shutil.rmtree(checkpoint)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, without a last line that was truncated by a kill."""
        return [line for line in read_lines(self.metrics_file) if isinstance(line.get("step"), int)]

    def validation(self) -> list[dict[str, Any]]:
        """The lines of ``validation.jsonl``: loss and metrics on the rows that the checkpoint is chosen by."""
        return [line for line in read_lines(self.validation_file) if "step" in line]

    def scores(self) -> dict[str, Any]:
        """The content of ``scores.json``: the measured scores, such as "base" and "adapter"."""
        return read_object(self.scores_file) if self.scores_file.exists() else {}

    def body(self, model: torch.nn.Module) -> torch.nn.Module:
        """The part of a base model that is fingerprinted: all but a classification head, which is drawn at random."""
        return self.recipe.task.pretrained_part(model)

    def data_hashes(self) -> dict[str, str]:
        """The SHA-256 of each recorded data file by its key in ``data.json``, such as "test.piqa"."""
        return _hashes(read_object(self.data_file)) if self.data_file.is_file() else {}

    def check_data(self, manifest: Mapping[str, Any]) -> None:
        """Check that the data files of a task have not changed since the run was started.

        Other rows are drawn from changed files, so a run could be scored on rows that it was trained on. Nothing is
        checked if no file was recorded.

        Raises:
            UserError: a file has changed, is missing or is new.
        """
        recorded = self.data_hashes()
        found = _hashes(manifest)
        for split in {**recorded, **found} if recorded else {}:
            if recorded.get(split) != found.get(split):
                was, now = (hashes[split][:16] + "…" if split in hashes else "none" for hashes in (recorded, found))
                raise UserError(
                    f"task.data: the {split!r} file changed since {str(self.path)!r} was started (SHA-256 {now} now, "
                    f"{was} in data.json). Restore the file or start a new run."
                )

    def check_processes(self) -> None:
        """Check that the run is resumed by as many processes as it was started with.

        Each process has its own random numbers and its part of a checkpoint.

        Raises:
            UserError: the numbers differ.
        """
        recorded = read_object(self.environment_file) if self.environment_file.is_file() else {}
        if (was := recorded.get("processes", 1)) != (now := processes.count()):
            raise UserError(
                f"--resume: {str(self.path)!r} was started with {was} {'process' if was == 1 else 'processes'} and "
                f"cannot be resumed with {now}; start {was}, or start a new run."
            )

    def recorded_base(self) -> dict[str, str]:
        """What :meth:`check_base` returned at the start, from ``environment.json``; empty if there is no such file."""
        recorded = read_object(self.environment_file).get("base_model", {}) if self.environment_file.is_file() else {}
        if not isinstance(recorded, dict) or not all(isinstance(value, str) for value in recorded.values()):
            raise UserError(
                f"{str(self.environment_file)!r}: base_model={recorded!r} should hold name, dtype and fingerprint; "
                "restore or remove the file."
            )
        return recorded

    def check_base(self, model: torch.nn.Module) -> dict[str, str]:
        """Return name, dtype and fingerprint of the base model, and how it is quantized.

        The fingerprint of a quantized base is computed from its files, so it also tells whether the base before
        quantization is the same.

        Raises:
            UserError: the run was started on another base model or in another dtype.
        """
        spec, dtype = self.recipe.model, next(model.parameters()).dtype
        base = {"name": spec.name, "dtype": str(dtype).removeprefix("torch.")}
        if spec.quantization is None:
            base |= {"fingerprint": models.fingerprint(self.body(model))}
        else:
            stored = models.stored_fingerprint(spec.name, spec.revision, dtype)
            base |= {"quantization": spec.quantization, "fingerprint": stored}
        recorded = self.recorded_base()
        for key in ("dtype", "fingerprint"):
            if (was := recorded.get(key, base[key])) != base[key]:
                raise UserError(
                    f"--resume: {str(self.path)!r} was started on {base['name']!r} with {key} {was}, which is "
                    f"{base[key]} now. Resume with the same model and kind of machine, or start a new run."
                )
        return base

    def write_environment(self, base: dict[str, str], command: list[str]) -> None:
        """Record versions, hardware, seed, the base model from :meth:`check_base`, and the command line."""
        write_json(
            self.environment_file,
            {
                "command": command,
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                **environment(),
                "processes": processes.count(),
                "effective_batch_size": self.recipe.training.effective_batch_size,
                "seed": self.recipe.training.seed,
                "base_model": base,
            },
        )


def _hashes(manifest: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The SHA-256 of each file in a manifest by its key, such as "train" or "test.piqa"."""
    found: dict[str, str] = {}
    for key, entry in manifest.items():
        if isinstance(entry, Mapping):
            found |= {prefix + key: entry["sha256"]} if entry.get("sha256") else _hashes(entry, f"{prefix}{key}.")
    return found


def _new_folder(path: Path) -> Path:
    """Create the folder ``path``, with a number appended if it exists."""
    names = chain([path.name], (f"{path.name}-{i}" for i in count(2)))
    with disk_errors(path):
        while True:
            with suppress(FileExistsError):
                new = path.with_name(next(names))
                new.mkdir(parents=True)
                return new


def resumable(source: str, overrides: list[str] | None, output: Path | None, *, trust_remote_code: bool = False) -> Run:
    """The unfinished run to resume.

    Args:
        source: a run folder, or a recipe.
        overrides: overrides of the recipe's keys.
        output: the run folder, if ``source`` is a recipe (default: the newest unfinished run of it in ``runs/``).
        trust_remote_code: run code that comes with the base model. A recipe that is given can allow it too.

    Raises:
        UserError: there is no such run, it is finished, or it was started with another recipe.
    """
    if os.path.isfile(Path(source) / "recipe.yaml"):
        run = Run(Path(source))
        given = load_recipe(str(run.recipe_file), overrides, recorded=True)
        if output is not None:
            raise UserError(f"--output={str(output)!r} has no effect when a run folder is resumed; leave it out.")
    else:
        given = load_recipe(source, overrides)
        trust_remote_code |= given.model.trust_remote_code
        run = Run(output) if output is not None else Run.latest_unfinished(given)
    if not run.recipe_file.is_file():
        raise UserError(f"--resume: {str(run.path)!r} is not a run folder; start one without --resume.")
    if run.finished:
        run.remove_stale_lock()
        raise _finished(run, given)
    if (changed := difference(run.recipe, given)) is not None:
        raise UserError(
            f"--resume: {changed} differs from the recipe of {str(run.path)!r}; "
            "resume with the same recipe, or start a new run."
        )
    run.trust_remote_code = trust_remote_code
    return run


def _finished(run: Run, given: Recipe) -> UserError:
    """The error for a finished run that should be resumed, for more steps or by mistake."""
    if (changed := difference(run.recipe, given)) is None:
        return UserError(f"--resume: {str(run.path)!r} is finished; score it with: pera evaluate {quoted(run.path)}")
    return UserError(
        f"--resume: {str(run.path)!r} is finished, so {changed} cannot change; to train further, use "
        f"pera merge {quoted(run.path)} --output MERGED and start a run with model.name=MERGED."
    )
