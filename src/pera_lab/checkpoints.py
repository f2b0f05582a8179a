"""The checkpoints that the Trainer writes. Each file is checked before a training resumes from it."""

from __future__ import annotations

import json
import pickle
import random
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from accelerate.utils.constants import OPTIMIZER_NAME as FSDP_OPTIMIZER_NAME
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from pydantic import BaseModel
from safetensors import safe_open
from torch import nn
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals

from pera.errors import UserError
from pera_lab import processes
from pera_lab.environment import out_of_memory

COMPLETE = "complete"
"""Empty file that marks a completely saved checkpoint."""


def _random_states() -> str:
    """The file with the states of this process's random number generators."""
    return "rng_state.pth" if processes.count() == 1 else f"rng_state_{processes.index()}.pth"


_DIVIDED_WEIGHTS = f"{FSDP_MODEL_NAME}.bin"
"""The trained weights as FSDP loads them."""


def _optimizer() -> str:
    """The file with the state of the optimizer."""
    return f"{FSDP_OPTIMIZER_NAME}.bin" if processes.fsdp() else OPTIMIZER_NAME


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was saved at."""
    return int(checkpoint.name.rpartition("-")[2])


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, the last first."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and p.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the last first."""
    return [checkpoint for checkpoint in saved(folder) if (checkpoint / COMPLETE).is_file()]


def ended(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved at the last step."""
    state = _state(checkpoint)
    return state.global_step >= state.max_steps


def best(checkpoint: Path) -> Path | None:
    """The best checkpoint according to the state of the last one, or None if none was validated."""
    step = _state(checkpoint).best_global_step
    return None if step is None else checkpoint.with_name(f"checkpoint-{step}")


def check(checkpoint: Path, model: nn.Module) -> None:
    """Check every file that a training would be resumed from. Pickles that need code are not loaded.

    Args:
        checkpoint: a complete checkpoint.
        model: the PEFT model that is trained.

    Raises:
        UserError: a file is missing or truncated, has other content than the Trainer writes, or needs code to load, as
            files of DeepSpeed do. FSDP and other engines cannot load each other's checkpoints.
    """
    if (checkpoint / "latest").is_file():
        raise UserError(
            f"--resume: {str(checkpoint)!r} was written by DeepSpeed, which runs code in its files; start a new run."
        )
    if (checkpoint / _DIVIDED_WEIGHTS).is_file() != processes.fsdp():
        was, now = ("without", "with") if processes.fsdp() else ("with", "without")
        raise UserError(
            f"--resume: {str(checkpoint)!r} was written {was} FSDP and cannot be resumed {now} it; start the processes "
            f"{was} FSDP, or start a new run."
        )
    with reading(checkpoint / TRAINER_STATE_NAME):
        state = _state(checkpoint)
        TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step != step_of(checkpoint):
            raise ValueError(f"it is of step {state.global_step}")
    check_weights(checkpoint, model)
    if ended(checkpoint):  # the weights are all that is needed
        needed = sorted(file.name for file in checkpoint.iterdir() if file.suffix in (".pt", ".pth"))
    else:
        needed = [_optimizer(), SCHEDULER_NAME, _random_states(), *([_DIVIDED_WEIGHTS] if processes.fsdp() else [])]
    for name in needed:
        with reading(checkpoint / name):
            content = _load(checkpoint / name)
            if name == _random_states():
                _check_random(content)
            if name == _DIVIDED_WEIGHTS:
                trained = {key: p.shape for key, p in model.named_parameters() if p.requires_grad}
                if trained != {key: weight.shape for key, weight in content.items()}:
                    raise ValueError("it is of other parameters")
            if name == SCHEDULER_NAME and content["last_epoch"] != step_of(checkpoint):
                raise ValueError(f"it is of step {content['last_epoch']}")


def check_weights(checkpoint: Path, model: nn.Module) -> None:
    """Check that the weights of a checkpoint have the names and shapes of the trained ones.

    Raises:
        UserError: they have not, or the file is missing or truncated.
    """
    file = checkpoint / SAFETENSORS_WEIGHTS_NAME
    expected = {key: list(weight.shape) for key, weight in get_peft_model_state_dict(model).items()}
    with reading(file), safe_open(file, framework="pt") as f:
        found = {key: f.get_slice(key).get_shape() for key in f.keys()}  # noqa: SIM118
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                raise ValueError(f"{key} has shape {found.get(key)}, not {expected.get(key)}")


def check_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Check that the saved state of the optimizer belongs to the parameters that are trained.

    Args:
        checkpoint: a complete checkpoint.
        optimizer: the optimizer, before the model is divided over processes.
        model: the PEFT model that is trained. FSDP's file names its parameters.

    Raises:
        UserError: the groups or the shapes differ.
    """
    with reading(checkpoint / _optimizer()):
        saved = _load(checkpoint / _optimizer())
        groups, found = optimizer.param_groups, saved["param_groups"]
        if [len(group["params"]) for group in found] != [len(group["params"]) for group in groups]:
            raise ValueError("it is of other parameters")
        parameters = [parameter for group in groups for parameter in group["params"]]
        keys = [key for group in found for key in group["params"]]
        if processes.fsdp():
            names = {parameter: name for name, parameter in model.named_parameters()}
            if keys != [names[parameter] for parameter in parameters]:
                raise ValueError("it is of other parameters")
        for key, parameter in zip(keys, parameters, strict=True):
            for name, moment in saved["state"].get(key, {}).items():
                if not isinstance(moment, torch.Tensor) or (moment.ndim and moment.shape != parameter.shape):
                    raise ValueError(f"{name} of a parameter of shape {list(parameter.shape)} does not fit it")


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what the libraries raise on a broken file of a checkpoint into one :class:`UserError`."""
    try:
        if not file.is_file():  # reading a pipe could wait for ever
            raise FileNotFoundError
        yield
    except UserError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        checkpoint = file.parent
        older = [other for other in complete(checkpoint.parent) if step_of(other) < step_of(checkpoint)]
        before = repr(str(older[0])) if older else "the start"
        raise UserError(
            f"--resume: {str(file)!r} is broken ({_reason(error)}); delete {str(checkpoint)!r} to resume from {before}."
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is missing"
    if isinstance(error, pickle.UnpicklingError):
        return "torch refuses to load it; it is corrupt or holds code"
    lacks = "it lacks " if isinstance(error, KeyError) else ""
    return lacks + (textwrap.shorten(str(error), 120, placeholder=" …").rstrip(".") or type(error).__name__)


class _State(BaseModel, strict=True):
    """What is used of the Trainer's state."""

    global_step: int
    max_steps: int
    epoch: float
    num_input_tokens_seen: int
    log_history: list[dict[str, Any]]
    stateful_callbacks: dict[str, Any]
    best_global_step: int | None = None
    best_metric: float | None = None


def _state(checkpoint: Path) -> _State:
    with reading(checkpoint / TRAINER_STATE_NAME):
        content = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        try:
            return _State.model_validate(content)
        except ValueError as error:
            raise ValueError("it is not a state of the Trainer") from error


def _load(file: Path) -> dict[str, Any]:
    """The content of a file of torch, with tensors that are read when they are used."""
    if not is_zipfile(file):
        raise ValueError("it is truncated")
    with safe_globals():  # type: ignore[no-untyped-call]
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    return content


def _check_random(states: dict[str, Any]) -> None:
    """Raise an error if a state cannot be set. The generators keep theirs."""
    random.Random().setstate(states["python"])
    np.random.RandomState().set_state(states["numpy"])
    torch.Generator().set_state(states["cpu"])
