"""Trains the adapter of a recipe into a run folder."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from pera.errors import UserError, one_line
from pera.optim import parameter_groups
from pera_lab import checkpoints, engines, methods, models, placement, processes, quantization
from pera_lab.adapters import Adapter
from pera_lab.card import write_card
from pera_lab.diagnose import RatioCallback
from pera_lab.environment import command_line, device, out_of_memory
from pera_lab.files import atomic_folder, disk_errors, json_line, write_atomic, write_json
from pera_lab.inference import takes_packing
from pera_lab.opening import locate_run, open_model
from pera_lab.progress import ProgressBar
from pera_lab.recipe import Recipe, TrainingSection
from pera_lab.runs import Run
from pera_lab.tasks import Splits
from pera_lab.tasks.cache import encode_stored, lengths
from pera_lab.tasks.encoding import Encoded, PackingCollator, check_lengths
from pera_lab.tasks.examples import StoredExamples
from pera_lab.trainer import LengthOrder, OnlineLoss, RunTrainer


class LossNotFinite(UserError):
    """The training diverged."""


class TrainingSummary(NamedTuple):
    """What a training took since it was last resumed: seconds, tokens (including padding), peak memory in bytes."""

    seconds: float
    tokens: int
    peak_memory: int | None
    final_loss: float | None
    left_out: int
    shortened: int = 0
    """Training texts that were truncated to ``max_length``."""
    steps: int = 0


def train(recipe: Recipe, run: Run, *, resume: bool = False, console: Console | None = None) -> TrainingSummary:
    """Train the adapter of a recipe, and save it with metrics and environment in the run folder.

    Several processes share each batch (:class:`RunTrainer`). The main process writes the folder.

    Args:
        recipe: the recipe.
        run: the folder, made by :meth:`Run.create`.
        resume: resume from the last complete checkpoint, or from the start if there is none.
        console: where to show progress; None shows nothing.

    Raises:
        UserError: the model, a target module or the task is not available, the data or the base model of a resumed run
            or the number of processes changed, another command trains the run, or the disk fails.
        LossNotFinite: the loss is not finite.
    """
    with processes.main_enters(run.in_use()):
        with processes.together():
            prepared = _prepare(recipe, run, resume, console)
        summary = _train(run, prepared)
        processes.barrier()  # the folder is complete
    return summary


def check_packages(recipe: Recipe) -> None:
    """Raise UserError if a package is missing that a training needs, before any data or weights are loaded."""
    if recipe.model.quantization is not None:
        quantization.check_installed(recipe.model.quantization)
    for name in recipe.training.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):  # type: ignore[no-untyped-call]
                callback()  # as the Trainer does
        except (RuntimeError, ImportError, ValueError) as error:
            raise UserError(f"training.report_to={name!r} cannot be used: {one_line(error)}") from error


class _Prepared(NamedTuple):
    """What a training needs."""

    trainer: Trainer
    adapted: PeftModel
    encoded: Encoded
    progress: _Progress
    checkpoint: Path | None
    """The checkpoint that the training is resumed from."""
    ended: Path | None
    """The checkpoint with the weights to save, if the training ended before the adapter was saved."""


def _prepare(recipe: Recipe, run: Run, resume: bool, console: Console | None) -> _Prepared:
    """Make every check. The folder does not change."""
    spec, task = recipe.training, recipe.task
    check_packages(recipe)
    engines.check(spec.batch_size, recipe.model.quantization)
    placement.check_trainable(recipe.model.attn_implementation)
    if resume:
        run.check_processes()
    splits = recipe.build_splits()
    run.check_data(splits.manifest)
    set_seed(spec.seed)  # loading the model initializes the classification head
    model, tokenizer = open_model(locate_run(run, base=True), recipe.model.dtype, task.labels)
    limit = min(spec.max_length, models.longest_input(model, tokenizer))
    encoded = _encode(recipe, splits, tokenizer, limit, console)
    validation = task.encode(tokenizer, splits.validation, limit)
    task.check(tokenizer, splits.test)
    models.check_tokens(model, tokenizer, chain(_token_ids(encoded), _token_ids(validation)))
    _check_validation(spec, splits, validation)
    if not spec.packing:
        _check_batch(model, "training.batch_size", spec.batch_size, encoded)
    if spec.eval_steps:
        _check_batch(model, "evaluation.batch_size", recipe.evaluation.batch_size, validation)
    engines.check_units(model)
    base = run.check_base(model) if processes.loads_base() else {}
    notes = [*splits.notes, *task.tokenizer_notes(tokenizer, splits)]
    if recipe.model.quantization is not None and device().type == "cpu":
        notes.append(
            f"model.quantization={recipe.model.quantization} saves memory, but this machine has no GPU, and on a CPU "
            "each step takes longer than without it"
        )

    set_seed(spec.seed)
    try:
        config = methods.resolve_targets(model, recipe.peft_config())
        adapted = get_peft_model(model, config)
    except methods.REFUSALS as error:
        raise methods.refusal(recipe.method, error) from error
    except RuntimeError as error:  # PEFT does not check for weights that are packed
        if recipe.model.quantization is None or out_of_memory(error):
            raise
        raise UserError(
            f"model.quantization={recipe.model.quantization!r}: PEFT cannot use {recipe.method} on a quantized base "
            f"model ({one_line(error)}); give another method, such as pera or lora, or leave quantization out."
        ) from error

    if spec.packing and processes.loads_base() and not takes_packing(adapted):
        raise UserError(
            f"training.packing=true: {type(model).__name__} with {recipe.method['name']} does not keep the examples in "
            "a row apart; leave it out."
        )

    for module in adapted.modules():  # accelerate tells parameters apart by their addresses
        if any(p.requires_grad and p.is_meta for p in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)

    arguments = _arguments(recipe, run)
    optimizer = _optimizer(spec, arguments, adapted)
    checkpoint = run.last_checkpoint() if resume else None
    if checkpoint is not None:
        checkpoints.check(checkpoint, adapted)
    kept = checkpoints.best(checkpoint) if checkpoint is not None and spec.keep == "best" else checkpoint
    if kept is not None:
        checkpoints.check_weights(kept, adapted)
    order = LengthOrder(lengths(encoded.rows), spec.effective_batch_size, spec.seed) if spec.group_by_length else None

    def begin() -> None:
        run.remove_incomplete_checkpoints()
        run.write_environment(base, command_line())
        write_json(run.data_file, {**splits.manifest, "notes": notes})
        progress.keep_metrics()

    collator = task.collator(tokenizer, model)
    online = OnlineLoss()
    progress = _Progress(run, console, notes, checkpoint, begin, online)
    trainer = RunTrainer(
        order,
        online,
        collator,
        model=adapted,
        args=arguments,
        train_dataset=encoded.rows,
        eval_dataset=validation.rows if spec.eval_steps else None,
        compute_metrics=task.compute_metrics,
        data_collator=PackingCollator(model) if spec.packing else collator,
        callbacks=[RatioCallback(), progress],
        optimizer_cls_and_kwargs=optimizer,
    )
    ended = checkpoint is not None and checkpoints.ended(checkpoint)
    if checkpoint is not None and not ended:
        checkpoints.check_optimizer(checkpoint, trainer.create_optimizer(), adapted)
    trainer.remove_callback(PrinterCallback)
    if processes.count() > 1:
        set_seed((spec.seed + processes.index()) % 2**32)  # otherwise every process drops out the same entries
    return _Prepared(trainer, adapted, encoded, progress, checkpoint, kept if ended else None)


def _train(run: Run, prepared: _Prepared) -> TrainingSummary:
    """Train, and save the adapter."""
    trainer, adapted, encoded, progress, checkpoint, ended = prepared
    start = time.perf_counter()
    if ended is not None:
        progress.begin()
        set_peft_model_state_dict(adapted, load_file(ended / SAFETENSORS_WEIGHTS_NAME))
    else:
        with progress, disk_errors(run.path):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - start
    tokens = trainer.state.num_input_tokens_seen - progress.tokens_before
    losses = [line["loss"] for line in run.metrics()]
    final_loss = losses[-1] if losses else None
    steps = trainer.state.global_step - progress.steps_before
    summary = TrainingSummary(seconds, tokens, peak_memory(), final_loss, encoded.left_out, encoded.shortened, steps)
    # Under FSDP and ZeRO-3, each process holds a part of every weight.
    divided = trainer.is_deepspeed_enabled or processes.fsdp()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if divided else None
    if processes.is_main():
        write_json(run.cost_file, summary._asdict())
        with atomic_folder(run.adapter.path) as folder:
            adapted.save_pretrained(str(folder), state_dict=weights)
            write_card(folder, "adapter", locate_run(run)._replace(adapter=Adapter(folder)))
    return summary


def peak_memory() -> int | None:
    """Peak memory of this process in bytes: GPU memory if there is a GPU, else resident memory; None if unknown."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


_LONG = 1_000_000


def _encode(
    recipe: Recipe, splits: Splits, tokenizer: PreTrainedTokenizerBase, max_length: int, console: Console | None
) -> Encoded:
    task = recipe.task
    if isinstance(splits.train, StoredExamples):
        encoded = encode_stored(task, tokenizer, splits.train, max_length, console)
    else:
        encoded = task.encode(tokenizer, splits.train, max_length)
    if not encoded.rows:
        short = (example for example in splits.train if len(example.prompt) <= _LONG)
        tried = (row for example in short for row in task.encode(tokenizer, [example]).rows)
        shortest = min((len(row["input_ids"]) for row in tried), default=None)
        reason = f"the shortest has {shortest} tokens" if shortest else f"all have more than {_LONG:,} characters"
        raise UserError(f"training.max_length={max_length} leaves no example: {reason}.")
    return encoded


def _token_ids(encoded: Encoded) -> Iterable[Sequence[int]]:
    """Token ids among which is the largest."""
    return (row["input_ids"] for row in encoded.rows) if encoded.largest is None else [[encoded.largest]]


def _check_validation(spec: TrainingSection, splits: Splits, validation: Encoded) -> None:
    if spec.eval_steps is None or validation.rows:
        return
    reason = "they are all longer than training.max_length" if splits.validation else "the task has none"
    raise UserError(f"training.eval_steps={spec.eval_steps!r} needs validation rows, and {reason}.")


def _check_batch(model: PreTrainedModel, key: str, size: int, encoded: Encoded) -> None:
    """Raise UserError before training if it would put rows into one batch that the model cannot read together."""
    if size == 1:
        return
    numbers = lengths(encoded.rows)
    try:
        check_lengths(model, [encoded.rows[numbers.index(length)] for length in (min(numbers), max(numbers))])
    except UserError as error:
        raise UserError(f"{key}={size}: {error} Give 1.") from error


def _arguments(recipe: Recipe, run: Run) -> TrainingArguments:
    spec, task = recipe.training, recipe.task
    options: dict[str, Any] = {_checkpointing_option(): spec.gradient_checkpointing}
    if spec.eval_steps is not None:
        by_epoch = spec.eval_steps == "epoch"
        options |= {"eval_strategy": "epoch" if by_epoch else "steps"}
        options |= {"eval_steps": None if by_epoch else spec.eval_steps}
        options |= {"per_device_eval_batch_size": recipe.evaluation.batch_size}
        options |= {"prediction_loss_only": task.compute_metrics is None}
    if spec.keep == "best":
        options |= {"save_strategy": options["eval_strategy"], "save_steps": options["eval_steps"] or spec.save_steps}
        metric, greater_is_better = task.best_checkpoint
        options |= {"load_best_model_at_end": True}
        options |= {"metric_for_best_model": metric, "greater_is_better": greater_is_better}
    else:
        options |= {"save_strategy": "steps", "save_steps": spec.save_steps}
    arguments = TrainingArguments(
        **options,
        output_dir=str(run.checkpoints),
        run_name=run.path.name,
        learning_rate=spec.learning_rate,
        max_steps=spec.max_steps or -1,
        num_train_epochs=spec.epochs or 1.0,
        per_device_train_batch_size=spec.batch_size // processes.count(),
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
        warmup_steps=spec.warmup_steps or spec.warmup_ratio,  # below 1 it means a share
        lr_scheduler_type=spec.lr_scheduler,
        weight_decay=0.0 if isinstance(spec.weight_decay, dict) else spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        seed=spec.seed,
        data_seed=spec.seed,
        logging_steps=spec.logging_steps,
        logging_nan_inf_filter=False,
        save_total_limit=2,
        report_to=spec.report_to or "none",
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        ddp_backend=processes.backend(),
    )
    # One process uses one GPU: DataParallel would multiply the batch size and split what describes whole batches.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _optimizer(
    spec: TrainingSection, arguments: TrainingArguments, model: torch.nn.Module
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """The Trainer's optimizer class and options with the recipe's parameter groups; None for a recipe without groups.

    The first group is A, because the Trainer logs the learning rate of the first group.
    """
    if not spec.lr_ratio and not isinstance(spec.weight_decay, dict):
        return None
    try:
        groups = parameter_groups(model, spec.learning_rate, lr_ratio=spec.lr_ratio, weight_decay=spec.weight_decay)
    except UserError as error:
        raise UserError(f"training: {error}") from error
    optimizer, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return optimizer, {**options, "params": groups}


def _checkpointing_option() -> str:
    """Name of the option in this version of transformers, which renames ``gradient_checkpointing`` before version 6."""
    names = {f.name for f in fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


class _Progress(TrainerCallback):
    """Shows notes and a progress bar, writes ``metrics.jsonl``, marks complete checkpoints, and stops at a loss that is
    not finite. ``begin`` is called when everything of the checkpoint was loaded."""

    def __init__(
        self,
        run: Run,
        console: Console | None,
        notes: list[str],
        since: Path | None,
        begin: Callable[[], None],
        online: OnlineLoss,
    ) -> None:
        self._console, self._notes = console, notes
        self._run, self._since, self._write_records, self._online = run, since, begin, online
        self._bar = ProgressBar("training", console)
        self._announced = False
        self._start = 0.0
        self.tokens_before = self.steps_before = 0

    def __enter__(self) -> _Progress:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def begin(self) -> None:
        """Write the records of the run."""
        if processes.is_main():
            self._write_records()

    def keep_metrics(self) -> None:
        """Remove the lines that were logged after the checkpoint."""
        kept = checkpoints.step_of(self._since) if self._since else 0
        for file, lines in (
            (self._run.metrics_file, self._run.metrics()),
            (self._run.validation_file, self._run.validation()),
        ):
            if file == self._run.metrics_file or lines:
                write_atomic(file, "".join(json_line(line) for line in lines if line["step"] <= kept))

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        interval = self._run.recipe.training.eval_steps
        if isinstance(interval, int) and interval > state.max_steps:
            raise UserError(
                f"training.eval_steps={interval} has no effect, because the training has {state.max_steps} steps; "
                "give fewer, or 'epoch'."
            )
        if self._since is not None and (kept := checkpoints.best(self._since)) is not None:
            state.best_model_checkpoint = str(kept)  # the folder may have moved since
        self.begin()
        self._start, self.tokens_before = time.perf_counter(), state.num_input_tokens_seen
        self.steps_before = state.global_step
        self._bar.update(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.update(state.global_step)
        if state.global_step == self.steps_before + 2:
            self._announce()
        if state.global_step == state.max_steps:
            control.should_log = True  # whatever logging_steps is

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "eval_loss" in logs:
            self._validated(state, logs)
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
            **self._online.take(),
        }
        line |= {key: logs[key] for key in ("high_order_ratio", "anchor_ratio") if key in logs}
        _append(self._run.metrics_file, line)
        memory = peak_memory()
        note = f"loss {logs['loss']:.4f} · {tokens / seconds:,.0f} tokens/s"
        self._bar.update(note=note + (f" · {memory / 2**30:.1f} GB" if memory else ""))
        if not torch.isfinite(torch.tensor(float(logs["loss"]))):
            raise _diverged(args, "loss is", state)
        trained = (p for p in kwargs["model"].parameters() if p.requires_grad)
        if state.global_step == state.max_steps and not all(p.isfinite().all() for p in trained):
            raise _diverged(args, "weights are", state)
        self._announce()

    def _announce(self) -> None:
        """Print the notes and the run folder, once. A refusal and a first loss that is not finite come before."""
        if self._console is None or self._announced:
            return
        self._announced = True
        for note in self._notes:
            if self._console.quiet:
                warnings.warn(note, stacklevel=1)  # which the command prints at its end
                continue
            self._console.print("warning:", style="yellow", end=" ")
            self._console.print(note, soft_wrap=True)
        recipe = self._run.recipe
        what = f"{recipe.method['name']} on {recipe.model.name}, task {recipe.task.name}"
        if processes.count() > 1:
            what += f", {processes.count()} processes, effective batch size {recipe.training.effective_batch_size}"
        self._console.print(f"run folder {self._run.path}: {what}", soft_wrap=True)

    def _validated(self, state: TrainerState, logs: dict[str, Any]) -> None:
        speed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
        values = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_") and k not in speed}
        _append(self._run.validation_file, {"step": state.global_step, "epoch": state.epoch, **values})

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        processes.barrier()  # each process writes a part
        if processes.is_main():
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / checkpoints.COMPLETE).touch()


def _append(file: Path, line: dict[str, Any]) -> None:
    if processes.is_main():
        with file.open("a", encoding="utf-8") as f:
            f.write(json_line(line))


def _diverged(args: TrainingArguments, what: str, state: TrainerState) -> LossNotFinite:
    return LossNotFinite(
        f"training.learning_rate={args.learning_rate:g}: the {what} not finite at step {state.global_step}; "
        "lower the learning rate."
    )
