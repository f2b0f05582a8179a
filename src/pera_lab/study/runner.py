"""A study becomes a folder of runs: by one worker or several, in order of information, killed and continued at will."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from threading import Thread
from typing import Literal

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pera.errors import PeraError, UserError
from pera.tuner import PeraConfig
from pera_lab.diagnose import run_effects
from pera_lab.diagnose.effect import run_loss
from pera_lab.evaluation import evaluate_run
from pera_lab.files import disk_errors, write_atomic, write_json
from pera_lab.recipe import difference
from pera_lab.runs import HEAD, Run, read_as, trained_sizes
from pera_lab.study.interaction import run_interaction
from pera_lab.study.spec import Cell, Phase, Study, Trial, load_study
from pera_lab.training import LossNotFinite, TrainingSummary, train

Status = Literal["finished", "diverged", "failed"]

EXPLODED = 2.0
"""A training whose last logged loss is more than so many times its first has diverged."""

EFFECT_EXAMPLES = 128
"""So many held-out examples, at most, show what the high-order terms do; in float32, nine passes or so over them."""


@dataclass(frozen=True)
class Outcome:
    """How a run of a study ended."""

    status: Status
    error: str = ""
    loss: float | None = None
    """Mean loss on the rows that are scored."""
    seconds: float | None = None
    """Of training; if it was interrupted, of the part after that, scaled to the whole."""
    parameters: int | None = None
    """Trained, without a classification head; of full fine-tuning, all."""
    wall_seconds: float = 0.0
    """From the start of the run, or of its last continuation, to the end of its scoring."""


class StudyFolder:
    """The folder of a study: ``study.yaml``, the run folders in ``runs/``, the workers' locks in ``locks/``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study_file = path / "study.yaml"
        self.runs = path / "runs"
        self.locks = path / "locks"

    @property
    def study(self) -> Study:
        """The study that was last run in the folder."""
        if not self.study_file.is_file():
            raise UserError(f"{str(self.path)!r} is not the folder of a study; start one with: pera study run STUDY")
        return load_study(str(self.study_file))

    def run(self, trial: Trial) -> Run:
        """The run folder of a trial, whether it exists or not."""
        return Run(self.runs / trial.name)

    def outcome(self, trial: Trial) -> Outcome | None:
        """How a trial ended; None if it has not."""
        file = self.runs / trial.name / "outcome.json"
        return read_as(file, Outcome) if file.is_file() else None

    def prepare(self, study: Study, *, retry: bool = False) -> None:
        """Make the folder, or check that the runs in it are those of ``study``.

        Args:
            study: what is to be run.
            retry: forget the runs that failed.

        Raises:
            UserError: a run in the folder was made with other settings, or the disk refuses.
        """
        for trial in self._made(study):
            run, outcome = self.run(trial), self.outcome(trial)
            if retry and outcome is not None and outcome.status == "failed":
                shutil.rmtree(run.path)
            elif run.recipe_file.is_file() and (changed := difference(run.recipe, trial.recipe())) is not None:
                failed = outcome is not None and outcome.status == "failed"
                forget = ", forget what failed with --retry," if failed else ","
                raise UserError(
                    f"study: {changed} differs from the one that {str(run.path)!r} was made with; "
                    f"undo the change{forget} or give another folder with --output."
                )
        with disk_errors(self.path):
            for folder in (self.runs, self.locks):
                folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.study_file, study.to_yaml())

    def _made(self, study: Study) -> list[Trial]:
        """The trials that have a run folder, those included whose turn has not come in ``study``."""
        cells, found = {cell.label: cell for cell in study.cells()}, []
        for folder in sorted(self.runs.glob("*")):
            parts = re.fullmatch(r"(.+)-(choose|report)-lr([\d.]+(?:e[+-]?\d+)?)-seed(\d+)", folder.name)
            if parts is not None and (cell := cells.get(parts[1])) is not None:
                phase: Phase = "choose" if parts[2] == "choose" else "report"
                found.append(Trial(study, cell, phase, float(parts[3]), int(parts[4])))
        return found

    def outcomes(self, study: Study) -> dict[str, Outcome]:
        """The outcomes of the trials that have ended, by name."""
        found: dict[str, Outcome] = {}
        while True:  # the ends of some trials make others
            known = len(found)
            for trial in all_trials(study, found):
                if trial.name not in found and (outcome := self.outcome(trial)) is not None:
                    found[trial.name] = outcome
            if len(found) == known:
                return found

    def left(self, study: Study) -> list[Trial]:
        """The trials that are known by now and have not ended, in their order."""
        outcomes = self.outcomes(study)
        return [trial for trial in all_trials(study, outcomes) if trial.name not in outcomes]


def all_trials(study: Study, outcomes: Mapping[str, Outcome]) -> list[Trial]:
    """The trials that are known by now, the most informative first.

    A comparison needs a tuned rate for every method and one seed, in every setting; further seeds come after that. In a
    setting, rates in the middle of the grid come before those at its edges, and rates before what is reported.
    """
    rounds: dict[int, list[Trial]] = {}
    by_setting: dict[tuple[object, ...], list[Cell]] = {}
    for cell in study.cells():
        by_setting.setdefault(cell.setting, []).append(cell)
    for cells in by_setting.values():
        chosen = [trial for cell in cells for trial in choose_trials(study, cell, outcomes)]
        middle = math.log(median(study.choose.learning_rate))
        chosen.sort(key=lambda trial: abs(math.log(trial.learning_rate) - middle))
        rounds.setdefault(0, []).extend(chosen)
        for cell in cells:
            for i, trial in enumerate(report_trials(study, cell, outcomes)):
                rounds.setdefault(i, []).append(trial)
    return [trial for i in sorted(rounds) for trial in rounds[i]]


def choose_trials(study: Study, cell: Cell, outcomes: Mapping[str, Outcome]) -> list[Trial]:
    """The trials that choose a cell's rate, those beyond an edge of the grid included."""
    rates = sorted(set(cell.method.learning_rate or study.choose.learning_rate))

    def trials(rates: list[float]) -> list[Trial]:
        return [Trial(study, cell, "choose", rate, seed) for rate in rates for seed in study.choose.seeds]

    for _ in range(study.choose.extend if len(rates) > 1 else 0):
        if any(trial.name not in outcomes for trial in trials(rates)):
            break
        best = best_rate(study, cell, outcomes, rates)
        if best == rates[0]:
            rates.insert(0, float(f"{rates[0] ** 2 / rates[1]:.2g}"))
        elif best == rates[-1]:
            rates.append(float(f"{rates[-1] ** 2 / rates[-2]:.2g}"))
    return trials(rates)


def report_trials(study: Study, cell: Cell, outcomes: Mapping[str, Outcome]) -> list[Trial]:
    """The trials of a cell that are reported; none while its rate is not chosen, or if no rate worked."""
    trials = choose_trials(study, cell, outcomes)
    if any(trial.name not in outcomes for trial in trials):
        return []
    best = best_rate(study, cell, outcomes, sorted({trial.learning_rate for trial in trials}))
    seeds = cell.method.seeds or study.report.seeds
    return [] if best is None else [Trial(study, cell, "report", best, seed) for seed in seeds]


def rate_losses(study: Study, cell: Cell, outcomes: Mapping[str, Outcome], rates: list[float]) -> dict[float, float]:
    """Mean held-out loss of each rate over the seeds; infinite where a run diverged, NaN where one failed or has not
    ended."""

    def loss(rate: float, seed: int) -> float:
        outcome = outcomes.get(Trial(study, cell, "choose", rate, seed).name)
        if outcome is None or outcome.status == "failed":
            return math.nan
        return math.inf if outcome.status == "diverged" or outcome.loss is None else outcome.loss

    return {rate: fmean(loss(rate, seed) for seed in study.choose.seeds) for rate in rates}


def best_rate(study: Study, cell: Cell, outcomes: Mapping[str, Outcome], rates: list[float]) -> float | None:
    """The rate of the smallest held-out loss, the smaller one of equals; None if no run came to an end."""
    losses = {rate: x for rate, x in rate_losses(study, cell, outcomes, rates).items() if math.isfinite(x)}
    return min(sorted(losses), key=losses.__getitem__) if losses else None


def run_study(
    study: Study,
    folder: StudyFolder,
    *,
    workers: int = 1,
    budget: float | None = None,
    retry: bool = False,
    console: Console | None = None,
) -> dict[str, Outcome]:
    """Run what is left of a study; what has ended stays as it is.

    Args:
        study: what to run.
        folder: where; the runs in it are gone on with.
        workers: processes. Further ones can be started at any time by the same command.
        budget: hours after which no run is started; nor is one that is not expected to end by then.
        retry: run again what failed.
        console: where progress is shown; None shows nothing.

    Returns:
        The outcomes by name of trial.

    Raises:
        UserError: as :meth:`StudyFolder.prepare`, a task has no data as it is said, or a worker was killed.
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
        for process in processes:  # only after an interruption are there any
            if process.is_alive():
                process.terminate()
                process.join()
    if codes := [process.exitcode for process in processes if process.exitcode]:
        raise UserError(f"study: {len(codes)} of {workers} workers ended early (exit code {codes[0]}); start it again.")
    return folder.outcomes(study)


def _check_data(study: Study) -> None:
    """Raise UserError where the data of a task cannot be had, or has too few rows to choose by, before all runs fail of
    it."""
    for cell in {(cell.task.label, cell.train_share): cell for cell in study.cells()}.values():
        Trial(study, cell, "choose", study.choose.learning_rate[0], 0).recipe().build_splits()


def work(study: Study, folder: StudyFolder, deadline: float, bar: _Bar | None = None) -> None:
    """Run trial after trial until none is left, or none that is expected to end before ``deadline``."""
    while True:
        outcomes = folder.outcomes(study)
        left = [trial for trial in all_trials(study, outcomes) if trial.name not in outcomes]
        expected = Expectation(study, outcomes)
        affordable = [trial for trial in left if time.time() + (expected(trial) or 0) < deadline]
        for trial in affordable:
            lock = FileLock(folder.locks / f"{trial.name}.lock")
            try:
                with lock.acquire(blocking=False):
                    if folder.outcome(trial) is None:
                        if bar is not None:
                            bar.show(trial.name)
                        _perform(trial, folder)
            except Timeout:  # another worker has it
                continue
            break
        else:
            if not affordable:
                return
            time.sleep(0.5)  # what others run now may make further trials


class Expectation:
    """What a trial is expected to take, from the trials that were the most like it."""

    def __init__(self, study: Study, outcomes: Mapping[str, Outcome]) -> None:
        self._seconds: dict[tuple[str, ...], list[float]] = {}
        for trial in all_trials(study, outcomes):
            outcome = outcomes.get(trial.name)
            if outcome is not None and outcome.status == "finished":
                for likeness in self._likenesses(trial):
                    self._seconds.setdefault(likeness, []).append(outcome.wall_seconds)

    def __call__(self, trial: Trial) -> float | None:
        """Seconds; None if no trial has ended."""
        found = (self._seconds.get(likeness) for likeness in self._likenesses(trial))
        return next((median(seconds) for seconds in found if seconds), None)

    @staticmethod
    def _likenesses(trial: Trial) -> list[tuple[str, ...]]:
        task, method, phase = trial.cell.task.label, trial.cell.method.label, trial.phase
        return [(task, method, phase), (task, "", phase), (task, "", ""), ("", method, phase), ("", "", "")]

    def left(self, study: Study, outcomes: Mapping[str, Outcome]) -> list[float | None]:
        """Of each run that is left, those included whose rate is not chosen yet."""
        trials = [trial for trial in all_trials(study, outcomes) if trial.name not in outcomes]
        for cell in study.cells():
            if any(trial.name not in outcomes for trial in choose_trials(study, cell, outcomes)):
                seeds = cell.method.seeds or study.report.seeds
                trials += [Trial(study, cell, "report", study.choose.learning_rate[0], seed) for seed in seeds]
        return [self(trial) for trial in trials]


def _perform(trial: Trial, folder: StudyFolder) -> None:
    """Train and score one trial, or go on with it, and leave its outcome, whatever it is."""
    run, start = folder.run(trial), time.perf_counter()
    try:
        outcome = _run(trial, run)
    except LossNotFinite as error:
        outcome = Outcome("diverged", str(error))
    except Exception as error:  # one run that fails is no reason to lose the others
        kind = "" if isinstance(error, PeraError) else f"{type(error).__name__}: "
        outcome = Outcome("failed", f"{kind}{' '.join(str(error).split())}")
    run.path.mkdir(parents=True, exist_ok=True)
    outcome = replace(outcome, wall_seconds=round(time.perf_counter() - start, 2))
    write_json(run.path / "outcome.json", asdict(outcome))
    shutil.rmtree(run.checkpoints, ignore_errors=True)


def _run(trial: Trial, run: Run) -> Outcome:
    recipe = trial.recipe()
    if not run.recipe_file.is_file():
        shutil.rmtree(run.path, ignore_errors=True)  # killed before the recipe was written
        run = Run.create(recipe, run.path)
    if not run.adapter.is_dir():
        train(recipe, run, resume=True)
    losses = [line["loss"] for line in run.metrics()]
    reported = trial.phase == "report"
    if reported and "adapter" not in run.scores():
        evaluate_run(run)
    if reported and isinstance(recipe.peft_config(), PeraConfig) and not run.effect_file.is_file():
        run_effects(run, examples=EFFECT_EXAMPLES)
    first = (trial.cell.method.seeds or trial.study.report.seeds)[0]
    if reported and trial.seed == first and not run.interaction_file.is_file():
        run_interaction(run)
    outcome = Outcome("finished", "", run_loss(run), _training_seconds(run), _parameters(run))
    if losses and losses[-1] > EXPLODED * losses[0]:
        error = f"the training loss rose from {losses[0]:.4g} to {losses[-1]:.4g}"
        return replace(outcome, status="diverged", error=error)
    return outcome


def _training_seconds(run: Run) -> float | None:
    """Seconds of the whole training, from those since it was last resumed."""
    cost, metrics = read_as(run.cost_file, TrainingSummary), run.metrics()
    return cost.seconds * metrics[-1]["step"] / cost.steps if metrics and cost.steps else None


def _parameters(run: Run) -> int:
    """Trained parameters without a classification head, which all methods share; for full fine-tuning, all."""
    sizes = trained_sizes(run.adapter)
    if any(f".{kind}_" in key for key in sizes for kind in ("pera", "lora", "hira", "delora")):
        sizes = {key: n for key, n in sizes.items() if not HEAD.search(key)}
    return sum(sizes.values())


def _worker(path: Path, deadline: float, threads: int) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    folder = StudyFolder(path)
    work(folder.study, folder, deadline)


def _end_with_parent() -> None:
    """End this worker in the middle of its run, which can be gone on with, when the process that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Bar:
    """Progress of a study on a console: runs that have ended, and an estimate of the time for the rest."""

    def __init__(self, study: Study, folder: StudyFolder, console: Console | None) -> None:
        self._study, self._folder = study, folder
        self._progress = Progress(
            TextColumn("study"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console or Console(quiet=True),
            disable=console is None,
        )
        self._task = self._progress.add_task("", total=None, note="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        self.show("")
        return self

    def __exit__(self, *_: object) -> None:
        self.show("")
        self._progress.stop()

    def show(self, running: str) -> None:
        """Say what has ended, what is running, and how long the rest will take."""
        if self._progress.disable:
            return
        outcomes = self._folder.outcomes(self._study)
        left = Expectation(self._study, outcomes).left(self._study, outcomes)
        known = [seconds for seconds in left if seconds is not None]
        note = f"about {sum(known) / 3600:.1f} h of runs left" if known else ""
        bad = sum(outcome.status == "failed" for outcome in outcomes.values())
        parts = (running, note, f"{bad} failed" if bad else "")
        total = len(outcomes) + len(left)
        note = " · ".join(filter(None, parts))
        self._progress.update(self._task, total=total, completed=len(outcomes), note=note)
