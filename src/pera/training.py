"""A recipe becomes a run folder."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from pera import methods, models
from pera.card import write_card
from pera.diagnose import RatioCallback
from pera.errors import UserError
from pera.files import atomic_folder, disk_errors, write_atomic, write_json
from pera.optim import parameter_groups
from pera.recipe import Recipe, TrainingSection
from pera.runs import COMPLETE, Run, command_line, open_model
from pera.tasks.base import Example
from pera.tasks.prompts import AnswerCollator, encode_example


class LossNotFinite(UserError):
    """The training has diverged."""


class TrainingSummary(NamedTuple):
    """What a training took, since it was last resumed: seconds, tokens (padding included), peak memory in bytes."""

    seconds: float
    tokens: int
    peak_memory: int | None
    final_loss: float | None
    left_out: int
    steps: int


def train(recipe: Recipe, run: Run, *, resume: bool = False, console: Console | None = None) -> TrainingSummary:
    """Train the adapter of ``recipe`` and leave it, with metrics and environment, in the run folder.

    Args:
        recipe: what to do.
        run: the folder, made by :meth:`Run.create`.
        resume: go on from the last complete checkpoint; from the start if there is none.
        console: where progress is shown; None shows nothing.

    Raises:
        LossNotFinite: the loss is not finite.
        UserError: the model, a target module or the task cannot be had; the disk refuses.
    """
    spec = recipe.training
    task = recipe.build_task()
    model, tokenizer = open_model(run.location._replace(adapter=None), recipe.model.dtype)
    examples, left_out = _encode(tokenizer, task.train, spec.max_length)
    run.write_environment(model, command_line())

    set_seed(spec.seed)
    try:
        config = methods.fit_to(model, recipe.peft_config())
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"method: {' '.join(str(error).split())}") from error

    arguments = _arguments(recipe, run)
    optimizer = _optimizer(spec, arguments, adapted)
    checkpoint = run.last_checkpoint() if resume else None
    progress = _Progress(run, console, since=checkpoint)
    try:
        trainer = Trainer(
            model=adapted,
            args=arguments,
            train_dataset=examples,
            data_collator=AnswerCollator(tokenizer, model),
            callbacks=[RatioCallback(), progress],
            optimizer_cls_and_kwargs=optimizer,
        )
    except (RuntimeError, ImportError, ValueError) as error:  # a tracker that is unknown or not installed
        raise UserError(f"training.report_to={spec.report_to}: {' '.join(str(error).split())}") from error
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    if checkpoint is not None and _ended(checkpoint):  # only the saving of the adapter was missed
        set_peft_model_state_dict(adapted, load_file(checkpoint / SAFETENSORS_WEIGHTS_NAME))
    else:
        if console is not None:
            console.print(f"run folder {run.path}", soft_wrap=True)
        with progress, disk_errors(run.path):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - start
    tokens = trainer.state.num_input_tokens_seen - progress.tokens_before
    losses = [line["loss"] for line in run.metrics()]
    steps = trainer.state.global_step - progress.steps_before
    summary = TrainingSummary(seconds, tokens, peak_memory(), losses[-1] if losses else None, left_out, steps)
    write_json(run.cost_file, summary._asdict())
    with atomic_folder(run.adapter) as folder:
        adapted.save_pretrained(str(folder))
        write_card(folder, "adapter", run.location._replace(adapter=folder))
    return summary


def peak_memory() -> int | None:
    """Peak memory of this process in bytes: on the accelerator if there is one, else resident; None if unknown."""
    if models.device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _encode(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], max_length: int
) -> tuple[list[dict[str, Any]], int]:
    encoded = [encode_example(tokenizer, example) for example in examples]
    fitting = [e for e in encoded if len(e["input_ids"]) <= max_length]
    if not fitting:
        shortest = min(len(e["input_ids"]) for e in encoded)
        raise UserError(f"training.max_length={max_length} leaves no example: the shortest has {shortest} tokens.")
    return fitting, len(encoded) - len(fitting)


def _arguments(recipe: Recipe, run: Run) -> TrainingArguments:
    spec = recipe.training
    options: dict[str, Any] = {_checkpointing_option(): spec.gradient_checkpointing}
    return TrainingArguments(
        **options,
        output_dir=str(run.checkpoints),
        run_name=run.path.name,
        learning_rate=spec.learning_rate,
        max_steps=spec.max_steps or -1,
        num_train_epochs=spec.epochs or 1.0,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
        warmup_steps=spec.warmup_steps,
        lr_scheduler_type=spec.lr_scheduler,
        weight_decay=0.0 if isinstance(spec.weight_decay, dict) else spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        seed=spec.seed,
        data_seed=spec.seed,
        logging_steps=spec.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=spec.save_steps,
        save_total_limit=2,
        report_to=spec.report_to or "none",
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )


def _optimizer(
    spec: TrainingSection, arguments: TrainingArguments, model: torch.nn.Module
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """The Trainer's optimizer with the recipe's groups, the first of them A, whose rate is the one that is logged;
    None, for a recipe without groups, leaves everything to the Trainer."""
    if not spec.lr_ratio and not isinstance(spec.weight_decay, dict):
        return None
    try:
        groups = parameter_groups(model, spec.learning_rate, lr_ratio=spec.lr_ratio, weight_decay=spec.weight_decay)
    except UserError as error:
        raise UserError(f"training: {error}") from error
    optimizer, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return optimizer, {**options, "params": groups}


def _ended(checkpoint: Path) -> bool:
    """Whether a checkpoint is that of the last step."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return bool(state.global_step >= state.max_steps)


def _checkpointing_option() -> str:
    """transformers renames ``gradient_checkpointing`` to ``activation_checkpointing`` on the way to version 6."""
    names = {f.name for f in fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


class _Progress(TrainerCallback):
    """Shows a progress bar, writes ``metrics.jsonl``, marks complete checkpoints, stops when the loss is lost."""

    def __init__(self, run: Run, console: Console | None, since: Path | None) -> None:
        self._run = run
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console or Console(quiet=True),
            disable=console is None,
        )
        self._task = self._bar.add_task("", total=None, note="")
        kept = int(since.name.rpartition("-")[2]) if since else 0
        lines = [line for line in run.metrics() if line["step"] <= kept]
        write_atomic(run.metrics_file, "".join(json.dumps(line) + "\n" for line in lines))
        self._start = 0.0
        self.tokens_before = self.steps_before = 0

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._start, self.tokens_before = time.perf_counter(), state.num_input_tokens_seen
        self.steps_before = state.global_step
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)
        if state.global_step == state.max_steps:  # whatever logging_steps is, the last loss is seen
            control.should_log = True

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        seconds, tokens = time.perf_counter() - self._start, state.num_input_tokens_seen - self.tokens_before
        line = {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": round(tokens / seconds, 1),
        }
        if "high_order_ratio" in logs:
            line["high_order_ratio"] = logs["high_order_ratio"]
        with self._run.metrics_file.open("a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
        memory = peak_memory()
        note = f"loss {logs['loss']:.4f} · {tokens / seconds:,.0f} tokens/s"
        self._bar.update(self._task, note=note + (f" · {memory / 2**30:.1f} GB" if memory else ""))
        if not torch.isfinite(torch.tensor(float(logs["loss"]))):
            raise LossNotFinite(
                f"training.learning_rate={args.learning_rate:g}: the loss is not finite at step {state.global_step}; "
                "lower the rate."
            )

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()
