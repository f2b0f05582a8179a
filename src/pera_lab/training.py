"""Trains the adapter of a recipe into a run folder."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from pera.errors import UserError, one_line
from pera.optim import parameter_groups
from pera.tuner.layers import of_torchao
from pera_lab import checkpoints, engines, methods, models, placement, processes, quantization
from pera_lab.adapters import Adapter
from pera_lab.card import write_card
from pera_lab.diagnose import RatioCallback
from pera_lab.environment import command_line, device, fast_dtype, out_of_memory
from pera_lab.files import atomic_folder, disk_errors, write_json
from pera_lab.inference import takes_packing
from pera_lab.monitor import Interrupted, Monitor, Signals, peak_memory
from pera_lab.opening import locate_run, open_model
from pera_lab.progress import say, stage
from pera_lab.recipe import Recipe, TrainingSection
from pera_lab.runs import Run
from pera_lab.tasks import Splits
from pera_lab.tasks.cache import encode_stored, lengths
from pera_lab.tasks.encoding import Encoded, PackingCollator, check_lengths
from pera_lab.tasks.examples import StoredExamples
from pera_lab.trainer import LengthOrder, OnlineLoss, RunTrainer


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
    kept: int | None = None
    """Step of the best checkpoint, whose weights the adapter has; None for the weights of the last step."""


def train(
    recipe: Recipe,
    run: Run,
    *,
    resume: bool = False,
    save_on_signal: bool = False,
    before: Callable[[PeftModel, PreTrainedTokenizerBase, Splits], None] | None = None,
) -> TrainingSummary:
    """Train the adapter of a recipe, and save it with metrics and environment in the run folder.

    Several processes share each batch (:class:`RunTrainer`). The main process writes the folder.

    Args:
        recipe: the recipe.
        run: the folder, made by :meth:`Run.create`.
        resume: resume from the last complete checkpoint, or from the start if there is none.
        save_on_signal: whether Ctrl-C and SIGTERM end the training after the current step, with a checkpoint.
        before: called with the model, its tokenizer and the examples before the first step, after every check.

    Raises:
        UserError: the model, a target module or the task is not available, the data or the base model of a resumed run
            or the number of processes changed, another command trains the run, or the disk fails.
        LossNotFinite: the loss is not finite.
        Interrupted: a signal ended the training.
    """
    with processes.main_enters(run.in_use()):
        with processes.together():
            prepared = _prepare(recipe, run, resume, Signals() if save_on_signal else None)
        if resume and prepared.checkpoint is None:
            say("no checkpoint was saved; training starts at the first step")
        if before is not None:
            before(prepared.adapted, prepared.tokenizer, prepared.splits)
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
    tokenizer: PreTrainedTokenizerBase
    splits: Splits
    encoded: Encoded
    monitor: Monitor
    signals: Signals | None
    checkpoint: Path | None
    """The checkpoint that the training is resumed from."""
    ended: Path | None
    """The checkpoint with the weights to save, if the training ended before the adapter was saved."""


def _prepare(recipe: Recipe, run: Run, resume: bool, signals: Signals | None) -> _Prepared:
    """Make every check. The folder does not change."""
    spec, task = recipe.training, recipe.task
    check_packages(recipe)
    engines.check(spec.batch_size, recipe.model.quantization)
    placement.check_trainable(recipe.model.attn_implementation)
    if resume:
        run.check_processes()
    with stage("reading the data"):
        splits = recipe.build_splits()
    run.check_data(splits.manifest)
    set_seed(spec.seed)  # loading the model initializes the classification head
    model, tokenizer = open_model(locate_run(run, base=True), recipe.model.dtype, task.labels)
    limit = min(spec.max_length, models.longest_input(model, tokenizer))
    encoded = _encode(recipe, splits, tokenizer, limit)
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
    if recipe.model.dtype in ("bfloat16", "float16") and device().type == "cpu" and fast_dtype() is torch.float32:
        notes.append(
            f"model.dtype={recipe.model.dtype} saves memory, but this processor only emulates it, and each step takes "
            "about ten times as long as in float32, the default here"
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
    if any(weight.requires_grad and of_torchao(weight) for weight in adapted.parameters()):
        named = getattr(config, "modules_to_save", None)
        raise UserError(
            f"model.quantization={recipe.model.quantization!r}: method.modules_to_save={named} names quantized layers, "
            "whose weights cannot be trained; leave them out."
        )

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
        monitor.keep_metrics()

    collator = task.collator(tokenizer, model)
    online = OnlineLoss()
    monitor = Monitor(run, notes, checkpoint, begin, online, signals)
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
        callbacks=[RatioCallback(), monitor],
        optimizer_cls_and_kwargs=optimizer,
    )
    ended = checkpoint is not None and checkpoints.ended(checkpoint)
    if checkpoint is not None and not ended:
        checkpoints.check_optimizer(checkpoint, trainer.create_optimizer(), adapted)
    trainer.remove_callback(PrinterCallback)
    if processes.count() > 1:
        set_seed((spec.seed + processes.index()) % 2**32)  # otherwise every process drops out the same entries
    kept = kept if ended else None
    return _Prepared(trainer, adapted, tokenizer, splits, encoded, monitor, signals, checkpoint, kept)


def _train(run: Run, prepared: _Prepared) -> TrainingSummary:
    """Train, and save the adapter. A signal is held back until everything is saved."""
    with nullcontext() if prepared.signals is None else prepared.signals as signals:
        summary = _train_and_save(run, prepared)
        if signals is not None and (number := signals.agreed()):
            raise Interrupted(f"interrupted after the last step; the adapter is saved in {run.adapter.path}", number)
    return summary


def _train_and_save(run: Run, prepared: _Prepared) -> TrainingSummary:
    trainer, adapted, _, _, encoded, monitor, _, checkpoint, ended = prepared
    start = time.perf_counter()
    if ended is not None:
        say("the training had ended; its adapter is saved now")
        monitor.begin()
        set_peft_model_state_dict(adapted, load_file(ended / SAFETENSORS_WEIGHTS_NAME))
    else:
        with monitor, disk_errors(run.path):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state, kept = trainer.state, None
    if run.recipe.training.keep == "best":
        kept = state.best_global_step if ended is None else checkpoints.step_of(ended)
    if monitor.stopped_by:
        command = f"pera train {shlex.quote(str(run.path))} --resume"
        again = f" in {processes.count()} processes" if processes.count() > 1 else ""
        raise Interrupted(
            f"stopped after step {state.global_step} of {state.max_steps}; resume{again} with: {command}",
            monitor.stopped_by,
        )
    seconds = time.perf_counter() - start
    losses = [line["loss"] for line in run.metrics()]
    summary = TrainingSummary(
        seconds,
        state.num_input_tokens_seen - monitor.tokens_before,
        peak_memory(),
        losses[-1] if losses else None,
        encoded.left_out,
        encoded.shortened,
        state.global_step - monitor.steps_before,
        kept,
    )
    # Under FSDP and ZeRO-3, each process holds a part of every weight.
    divided = trainer.is_deepspeed_enabled or processes.fsdp()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if divided else None
    if processes.is_main():
        write_json(run.cost_file, summary._asdict())
        with atomic_folder(run.adapter.path) as folder:
            adapted.save_pretrained(str(folder), state_dict=weights)
            write_card(folder, "adapter", locate_run(run)._replace(adapter=Adapter(folder)))
    return summary


_LONG = 1_000_000


def _encode(recipe: Recipe, splits: Splits, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    task = recipe.task
    if isinstance(splits.train, StoredExamples):
        encoded = encode_stored(task, tokenizer, splits.train, max_length)
    else:
        with stage("tokenizing"):
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
