"""Runs a study with one worker or several. It can be killed and resumed at any time."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from peft.utils.constants import DUMMY_TARGET_MODULES
from rich.console import Console
from rich.progress import TimeElapsedColumn

from pera.errors import PeraError, UserError, one_line
from pera.tuner import PeraConfig
from pera_lab.adapters import HEAD
from pera_lab.diagnose import run_effects
from pera_lab.diagnose.effect import run_loss
from pera_lab.evaluation import evaluate_run
from pera_lab.files import InUse, read_as, write_json
from pera_lab.progress import ProgressBar
from pera_lab.runs import Run
from pera_lab.study.folder import StudyFolder
from pera_lab.study.interaction import run_interaction
from pera_lab.study.plan import Expectation, Outcome, known_trials
from pera_lab.study.spec import Study, Trial
from pera_lab.training import LossNotFinite, TrainingSummary, train

DIVERGED = 2.0
"""A training has diverged if its last logged loss exceeds its first by this factor."""

EFFECT_EXAMPLES = 128
"""The most held-out examples that the effect of the high-order terms is measured on: about nine float32 passes."""


def run_study(
    study: Study,
    folder: StudyFolder,
    *,
    workers: int = 1,
    budget: float | None = None,
    retry: bool = False,
    console: Console | None = None,
) -> dict[str, Outcome]:
    """Run the remaining trials of a study. Trials that have ended are not touched.

    Args:
        study: the study.
        folder: its folder. Runs in it are resumed.
        workers: number of processes. The same command can add processes at any time.
        budget: hours. No run is started that is expected to end later.
        retry: repeat the runs that failed.
        console: shows the progress.

    Returns:
        The outcomes by name of trial.

    Raises:
        UserError: as :meth:`StudyFolder.prepare`; the data of a task are missing; or a worker was killed.
    """
    _check_data(study)
    folder.prepare(study, retry=retry)
    deadline = math.inf if budget is None else time.time() + 3600 * budget
    if workers == 1:
        with _Bar(study, folder, console) as bar:
            work(study, folder, deadline, bar)
        return folder.outcomes(study)
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    processes = [context.Process(target=_worker, args=(folder.path, deadline, threads)) for _ in range(workers)]
    try:
        for process in processes:
            process.start()
        with _Bar(study, folder, console) as bar:
            while any(process.is_alive() for process in processes):
                bar.show("")
                time.sleep(0.5)
    finally:
        for process in processes:  # alive only after an interruption
            if process.is_alive():
                process.terminate()
                process.join()
    if codes := [process.exitcode for process in processes if process.exitcode]:
        raise UserError(
            f"study: {len(codes)} of {workers} workers stopped (exit code {codes[0]}); run the same command again."
        )
    return folder.outcomes(study)


def _check_data(study: Study) -> None:
    """Raise UserError if a task lacks data or has too few rows, before every run fails for this reason."""
    for cell in {(cell.task.label, cell.train_share): cell for cell in study.cells()}.values():
        Trial(study, cell, "choose", study.choose.learning_rate[0], 0).recipe().build_splits()


def work(study: Study, folder: StudyFolder, deadline: float, bar: _Bar | None = None) -> None:
    """Run one trial after another.

    Args:
        study: the study.
        folder: its folder.
        deadline: in seconds since the epoch. No trial is started that is expected to end later.
        bar: shows the running trial.
    """
    while True:
        outcomes = folder.outcomes(study)
        expected = Expectation(study, outcomes)
        remaining = [trial for trial in known_trials(study, outcomes) if trial.name not in outcomes]
        affordable = [trial for trial in remaining if time.time() + (expected(trial) or 0) < deadline]
        for trial in affordable:
            try:
                with folder.in_use(trial):
                    if folder.outcome(trial) is None:
                        if bar is not None:
                            bar.show(trial.name)
                        _perform(trial, folder)
            except InUse:  # another worker runs it
                continue
            break
        else:
            if not affordable:
                return
            time.sleep(0.5)  # the trials that others run may make further trials known


def _perform(trial: Trial, folder: StudyFolder) -> None:
    """Start or resume one trial, score it, and write its outcome."""
    run, start = folder.run(trial), time.perf_counter()
    try:
        outcome = _run(trial, run)
    except InUse:  # by another command
        raise
    except LossNotFinite as error:
        outcome = Outcome("diverged", str(error))
    except Exception as error:  # one failed run must not stop the others
        kind = "" if isinstance(error, PeraError) else f"{type(error).__name__}: "
        outcome = Outcome("failed", f"{kind}{one_line(error)}")
    run.path.mkdir(parents=True, exist_ok=True)
    outcome = replace(outcome, wall_seconds=round(time.perf_counter() - start, 2))
    write_json(run.path / "outcome.json", asdict(outcome))
    shutil.rmtree(run.checkpoints, ignore_errors=True)


def _run(trial: Trial, run: Run) -> Outcome:
    recipe = trial.recipe()
    run.trust_remote_code = recipe.model.trust_remote_code  # the user's study decides, not the run folder
    if not run.recipe_file.is_file():
        shutil.rmtree(run.path, ignore_errors=True)  # killed before the recipe was written
        run = Run.create(recipe, run.path)
    if run.finished:
        run.remove_stale_lock()
    else:
        train(recipe, run, resume=True)
    if trial.phase == "report":
        _report(trial, run)
    outcome = Outcome("finished", "", run_loss(run), _training_seconds(run), num_parameters(run))
    losses = [line["loss"] for line in run.metrics()]
    if losses and losses[-1] > DIVERGED * losses[0]:
        error = f"the training loss rose from {losses[0]:.4g} to {losses[-1]:.4g}"
        return replace(outcome, status="diverged", error=error)
    return outcome


def _report(trial: Trial, run: Run) -> None:
    """Score a reported run and measure the effect of its terms, as far as this was not done before."""
    if "adapter" not in run.scores():
        evaluate_run(run)
    if isinstance(trial.recipe().peft_config(), PeraConfig) and not run.effect_file.is_file():
        run_effects(run, examples=EFFECT_EXAMPLES, ranks=False)
    if trial.seed == trial.study.report_seeds(trial.cell)[0] and not run.interaction_file.is_file():
        run_interaction(run)


def _training_seconds(run: Run) -> float | None:
    """Seconds of the whole training, extrapolated from the time since it was last resumed."""
    cost, metrics = read_as(run.cost_file, TrainingSummary), run.metrics()
    return cost.seconds * metrics[-1]["step"] / cost.steps if metrics and cost.steps else None


def num_parameters(run: Run) -> int:
    """Trained parameters without a classification head, which all methods share. For full fine-tuning, all of them."""
    is_full = getattr(run.adapter.config, "target_modules", None) == DUMMY_TARGET_MODULES
    return sum(n for key, n in run.adapter.sizes.items() if is_full or not HEAD.search(key))


def _worker(path: Path, deadline: float, threads: int) -> None:
    Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    folder = StudyFolder(path)
    work(folder.study, folder, deadline)


def _exit_with_parent() -> None:
    """Exit when the parent process dies. The interrupted run can be resumed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Bar:
    """A progress bar: the runs that have ended, and an estimate of the remaining time."""

    def __init__(self, study: Study, folder: StudyFolder, console: Console | None) -> None:
        self._study, self._folder = study, folder
        self._bar = ProgressBar("study", console, TimeElapsedColumn())

    def __enter__(self) -> _Bar:
        self._bar.__enter__()
        self.show("")
        return self

    def __exit__(self, *error: Any) -> None:
        self.show("")
        self._bar.__exit__(*error)

    def show(self, running: str) -> None:
        """Update the bar. ``running`` is the name of the running trial."""
        if self._bar.hidden:
            return
        outcomes = self._folder.outcomes(self._study)
        remaining = Expectation(self._study, outcomes).remaining()
        known = [seconds for seconds in remaining if seconds is not None]
        note = f"remaining: about {sum(known) / 3600:.1f} h" if known else ""
        failed = sum(outcome.status == "failed" for outcome in outcomes.values())
        note = " · ".join(filter(None, (running, note, f"{failed} failed" if failed else "")))
        self._bar.update(len(outcomes), len(outcomes) + len(remaining), note)
