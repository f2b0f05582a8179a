"""What a training shows and records: its progress, its losses and its checkpoints; and how a signal ends it."""

from __future__ import annotations

import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import copy_context
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pera.errors import PeraError, UserError
from pera_lab import checkpoints, processes
from pera_lab.environment import device
from pera_lab.files import json_line, write_atomic
from pera_lab.progress import ProgressBar, about, say
from pera_lab.runs import Run
from pera_lab.trainer import OnlineLoss

DIVERGED = 2.0
"""A training has diverged if its last logged loss exceeds its first by this factor."""

JUDGED = 6
"""The least number of logged losses that tell whether a training has learned."""


class LossNotFinite(UserError):
    """The training diverged."""


class Interrupted(PeraError):
    """A signal ended a training whose progress is saved. The exit code is 128 plus the number of the signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Signals:
    """Holds back the first Ctrl-C or SIGTERM, so that a training can save its progress. A second one acts at once.

    Use it as a context manager. Outside of the main thread, and for signals that are ignored, it does nothing.
    """

    REPEATED = 5.0
    """Seconds in which further signals count as the first: torchrun repeats what a terminal sends to all processes."""

    def __init__(self) -> None:
        self._received, self._when = 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def agreed(self) -> int:
        """The number of the signal that any process received, or 0. Every process has to call this."""
        return max(processes.gathered(self._received))

    def _receive(self, number: int, _: FrameType | None) -> None:
        if not self._received:
            self._received, self._when = number, time.monotonic()
            text = "stopping after this step, with a checkpoint; Ctrl-C again stops at once"
            # a thread, because the signal may have interrupted a line that is being printed
            threading.Thread(target=copy_context().run, args=(say, text)).start()
        elif processes.count() == 1 or time.monotonic() - self._when > self.REPEATED:
            self.__exit__()
            signal.raise_signal(number)


class Monitor(TrainerCallback):
    """Shows notes and progress, writes ``metrics.jsonl`` and ``validation.jsonl``, and marks complete checkpoints.

    It stops at a loss that is not finite, and at a signal.

    Args:
        run: the run.
        notes: warnings to show when the training has started.
        since: the checkpoint that the training is resumed from.
        records: called when everything of the checkpoint was loaded.
        online: the losses of the first epoch.
        signals: the signals that end the training with a checkpoint; None leaves them alone.
    """

    def __init__(
        self,
        run: Run,
        notes: list[str],
        since: Path | None,
        records: Callable[[], None],
        online: OnlineLoss,
        signals: Signals | None,
    ) -> None:
        self._run, self._notes, self._since, self._online, self._signals = run, notes, since, online, signals
        self._write_records = records
        self._bar = ProgressBar("training step", share=1)
        self._announced = False
        self._start = 0.0
        self.tokens_before = self.steps_before = 0
        self.stopped_by = 0
        """The number of the signal that ended the training before its last step, or 0."""

    def __enter__(self) -> Monitor:
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
        if self._since is not None:
            say(f"resuming after step {state.global_step} of {state.max_steps}")
        self._start, self.tokens_before = time.perf_counter(), state.num_input_tokens_seen
        self.steps_before = state.global_step
        self._bar.update(state.global_step, state.max_steps)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step > self.steps_before:
            self._announce(state)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        spec, last = self._run.recipe.training, state.global_step == state.max_steps
        if spec.keep == "best" and state.global_step % spec.save_steps == 0:
            control.should_save = True  # the Trainer saves with each evaluation only
        number = 0 if self._signals is None else self._signals.agreed()
        if number and not last:
            self.stopped_by = number
            control.should_save = control.should_training_stop = True
        if number or last:
            control.should_log = True  # whatever logging_steps is
        if not control.should_log:
            self._bar.update(state.global_step)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stopped_by and state.epoch != round(state.epoch or 0):  # the end has not been reached
            control.should_evaluate = control.should_save = False

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
        note = f"loss {logs['loss']:.4f} · rate {logs['learning_rate']:.1e} · {tokens / seconds:,.0f} tokens/s"
        self._bar.update(state.global_step, note=note + (f" · {memory / 2**30:.1f} GB" if memory else ""))
        if not torch.isfinite(torch.tensor(float(logs["loss"]))):
            raise _diverged(args, "loss is", state)
        trained = (p for p in kwargs["model"].parameters() if p.requires_grad)
        if state.global_step == state.max_steps and not all(p.isfinite().all() for p in trained):
            raise _diverged(args, "weights are", state)
        self._announce(state)
        self._bar.line()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stopped_by:
            return
        if self._run.recipe.training.keep == "best" and state.best_global_step is not None:
            say(f"kept the checkpoint of step {state.best_global_step}, the best on the validation rows")
        if (hint := rate_hint(args.learning_rate, [line["loss"] for line in self._run.metrics()])) is not None:
            say(hint, warning=True)

    def _announce(self, state: TrainerState) -> None:
        """Print the notes, the run folder and an estimate, once. A refusal and a first loss that is not finite come
        before."""
        if self._announced:
            return
        self._announced = True
        for note in self._notes:
            say(note, warning=True)
        recipe = self._run.recipe
        what = f"{recipe.method['name']} on {recipe.model.name}, task {recipe.task.name}"
        if processes.count() > 1:
            what += f", {processes.count()} processes, effective batch size {recipe.training.effective_batch_size}"
        say(f"run folder {self._run.path}: {what}")
        steps = state.max_steps - self.steps_before
        which = "remaining " if self.steps_before else ""
        if (seconds := self._bar.seconds(steps)) is not None:
            say(f"about {about(seconds)} for {steps} {which}steps")

    def _validated(self, state: TrainerState, logs: dict[str, Any]) -> None:
        speed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
        values = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_") and k not in speed}
        _append(self._run.validation_file, {"step": state.global_step, "epoch": state.epoch, **values})
        shown = (f"{key} {value:.4g}" for key, value in values.items() if isinstance(value, float))
        say(f"validation at step {state.global_step}: {', '.join(shown)}")

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


def rose(losses: Sequence[float]) -> bool:
    """Whether a training has diverged, according to its logged losses."""
    return bool(losses) and losses[-1] > DIVERGED * losses[0]


def rate_hint(rate: float, losses: Sequence[float]) -> str | None:
    """A sentence about a learning rate whose training has diverged or has not changed the loss; None for another.

    Args:
        rate: the learning rate.
        losses: the logged losses, in their order.
    """
    if rose(losses):
        return (
            f"training.learning_rate={rate:g}: the loss rose from {losses[0]:.4g} to {losses[-1]:.4g}; lower the "
            "learning rate."
        )
    if len(losses) >= JUDGED and not _moved(losses):
        return (
            f"training.learning_rate={rate:g}: the loss went from {losses[0]:.4g} to {losses[-1]:.4g}, which is within "
            "its noise; raise the learning rate, or train longer."
        )
    return None


def _moved(losses: Sequence[float]) -> bool:
    """Whether losses have a trend, or the first stands out from the second half.

    The noise is estimated from neighbours, so that neither a trend nor a fall in the first steps counts as noise.
    """
    steps = range(len(losses))
    r = 0.0 if min(losses) == max(losses) else statistics.correlation(steps, losses)
    if r * r * (len(losses) - 2) > 4 * (1 - r * r):  # |t| > 2 for the slope
        return True
    noise: float = statistics.fmean((b - a) ** 2 / 2 for a, b in pairwise(losses)) ** 0.5
    return abs(losses[0] - statistics.fmean(losses[len(losses) // 2 :])) > 2 * noise


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
