"""Which trials a study needs, in what order, and how long they are expected to take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from pera_lab.study.spec import Cell, Study, Trial

Status = Literal["finished", "diverged", "failed"]


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: the content of ``outcome.json``."""

    status: Status
    error: str = ""
    loss: float | None = None
    """Mean loss on the rows that are scored."""
    seconds: float | None = None
    """Training time. After an interruption, the time since then, scaled to the whole training."""
    parameters: int | None = None
    """Trained parameters without a classification head. For full fine-tuning, all parameters."""
    wall_seconds: float = 0.0
    """Time from the start of the run, or from its last resumption, to the end of scoring."""


Outcomes = Mapping[str, Outcome]
"""The outcomes of trials that have ended, by name of trial."""


def known_trials(study: Study, outcomes: Outcomes) -> list[Trial]:
    """The trials that are known so far, the most informative first.

    A comparison needs a tuned learning rate for every method and one seed in every setting. Further seeds come later.
    Within a setting, trials that choose a rate come first, and rates in the middle of the grid come before rates at its
    edges.
    """
    rounds: dict[int, list[Trial]] = {}
    by_setting: dict[tuple[object, ...], list[Cell]] = {}
    for cell in study.cells():
        by_setting.setdefault(cell.setting, []).append(cell)
    for cells in by_setting.values():
        choosing = [trial for cell in cells for trial in choose_trials(study, cell, outcomes)]
        middle = math.log(median(study.choose.learning_rate))
        choosing.sort(key=lambda trial: abs(math.log(trial.learning_rate) - middle))
        rounds.setdefault(0, []).extend(choosing)
        for cell in cells:
            for i, trial in enumerate(report_trials(study, cell, outcomes)):
                rounds.setdefault(i, []).append(trial)
    return [trial for i in sorted(rounds) for trial in rounds[i]]


def choose_trials(study: Study, cell: Cell, outcomes: Outcomes) -> list[Trial]:
    """The trials that choose a cell's learning rate, including those beyond an edge of the grid."""
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


def report_trials(study: Study, cell: Cell, outcomes: Outcomes) -> list[Trial]:
    """The reported trials of a cell. There are none until its rate is chosen, and none if every rate failed."""
    trials = choose_trials(study, cell, outcomes)
    if any(trial.name not in outcomes for trial in trials):
        return []
    best = best_rate(study, cell, outcomes, sorted({trial.learning_rate for trial in trials}))
    return [] if best is None else [Trial(study, cell, "report", best, seed) for seed in study.report_seeds(cell)]


def rate_losses(study: Study, cell: Cell, outcomes: Outcomes, rates: list[float]) -> dict[float, float]:
    """Mean held-out loss of learning rates over the choosing seeds.

    Args:
        study: the study.
        cell: the cell whose rates they are.
        outcomes: what has ended.
        rates: the learning rates.

    Returns:
        The loss by rate. It is infinite if a run diverged, and NaN if a run failed or has not ended.
    """

    def loss(rate: float, seed: int) -> float:
        outcome = outcomes.get(Trial(study, cell, "choose", rate, seed).name)
        if outcome is None or outcome.status == "failed":
            return math.nan
        return math.inf if outcome.status == "diverged" or outcome.loss is None else outcome.loss

    return {rate: fmean(loss(rate, seed) for seed in study.choose.seeds) for rate in rates}


def best_rate(study: Study, cell: Cell, outcomes: Outcomes, rates: list[float]) -> float | None:
    """The learning rate with the smallest held-out loss; see :func:`rate_losses` for the arguments.

    Returns:
        The smaller rate if two are equal, None if no run finished.
    """
    losses = {rate: x for rate, x in rate_losses(study, cell, outcomes, rates).items() if math.isfinite(x)}
    return min(sorted(losses), key=losses.__getitem__) if losses else None


class Expectation:
    """The expected duration of a trial: the median of the most similar trials that have finished."""

    def __init__(self, study: Study, outcomes: Outcomes) -> None:
        self._study, self._outcomes = study, outcomes
        self._seconds: dict[tuple[str, ...], list[float]] = {}
        for trial in known_trials(study, outcomes):
            outcome = outcomes.get(trial.name)
            if outcome is not None and outcome.status == "finished":
                for kind in self._kinds(trial):
                    self._seconds.setdefault(kind, []).append(outcome.wall_seconds)

    def __call__(self, trial: Trial) -> float | None:
        """Seconds, or None if no trial has finished."""
        found = (self._seconds.get(kind) for kind in self._kinds(trial))
        return next((median(seconds) for seconds in found if seconds), None)

    def remaining(self) -> list[float | None]:
        """The expected seconds of each remaining run, including runs whose learning rate is not chosen yet."""
        known = [trial for trial in known_trials(self._study, self._outcomes) if trial.name not in self._outcomes]
        return [self(trial) for trial in [*known, *self.later()]]

    def later(self) -> list[Trial]:
        """The reported trials whose learning rate is not chosen yet, at any rate."""
        study, rate = self._study, self._study.choose.learning_rate[0]
        return [
            Trial(study, cell, "report", rate, seed) for cell in self.undecided() for seed in study.report_seeds(cell)
        ]

    def undecided(self) -> list[Cell]:
        """The cells whose learning rate is not chosen yet."""
        study, outcomes = self._study, self._outcomes
        return [
            cell
            for cell in study.cells()
            if any(trial.name not in outcomes for trial in choose_trials(study, cell, outcomes))
        ]

    @staticmethod
    def _kinds(trial: Trial) -> list[tuple[str, ...]]:
        """What a trial has in common with others, the closest likeness first."""
        task, method, phase = trial.cell.task.label, trial.cell.method.label, trial.phase
        return [(task, method, phase), (task, "", phase), (task, "", ""), ("", method, phase), ("", "", "")]
