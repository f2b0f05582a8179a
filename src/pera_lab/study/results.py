"""What a study has found so far: rates that were tried, scores with their examples, costs, and what the terms do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np

from pera.errors import UserError
from pera.tuner import PeraConfig
from pera_lab.diagnose import Effects, LayerDiagnosis, diagnose_adapter
from pera_lab.evaluation import read_predictions
from pera_lab.runs import Run, checked, read_as
from pera_lab.scorers import Score
from pera_lab.study.interaction import Interaction
from pera_lab.study.runner import Outcome, StudyFolder, choose_trials, rate_losses, report_trials
from pera_lab.study.spec import Cell, StudyTask, Trial
from pera_lab.study.statistics import (
    Difference,
    Mean,
    adjusted,
    compare,
    describe,
    mcnemar,
    pearson,
)
from pera_lab.training import TrainingSummary

if TYPE_CHECKING:
    from pera_lab.study.statistics import Array

Setting = tuple[int | None, str | None, float]
"""Rank, placement and share of the data: what is equal where methods are compared over tasks."""

_METRICS: dict[str, Callable[..., Any]] = {"matthews": pearson, "pearson": pearson}
"""Metrics that are no mean over examples. Matthews' correlation is Pearson's of the two classes as 0 and 1."""


@dataclass(frozen=True)
class Scored:
    """One run that was reported: its metric and what it said of each example."""

    trial: Trial
    run: Run
    value: float
    metric: str
    expected: Array
    predicted: Array
    """For a metric that is a mean, 1 where the answer is right and ``expected`` is 1 throughout."""
    weights: Array
    """Of the examples, 1 on average: equal, but for a mix, of which each member weighs the same."""
    basis: dict[str, Any]
    """What must be equal in runs that are compared, as far as recorded: rows, files of data, base model."""


class Results:
    """The runs of a study that have ended, read once."""

    def __init__(self, folder: StudyFolder) -> None:
        self.folder = folder
        self.study = folder.study
        self.outcomes: dict[str, Outcome] = folder.outcomes(self.study)
        self.cells = self.study.cells()

    @cached_property
    def settings(self) -> list[Setting]:
        """The settings in which methods are compared. A method without a rank stands in all of its share of the data,
        and in one of its own where there is no other."""
        ranked = list(dict.fromkeys(cell.setting[1:] for cell in self.cells if cell.r is not None))
        shares = {setting[2] for setting in ranked}
        return ranked + list(dict.fromkeys(c.setting[1:] for c in self.cells if c.train_share not in shares))

    def cells_of(self, setting: Setting) -> list[Cell]:
        """The cells of a setting; a method without a rank belongs to all of one share of the data."""
        return [c for c in self.cells if c.setting[1:] == setting or (c.r is None and c.train_share == setting[2])]

    def by_task(self) -> list[tuple[Setting, StudyTask, list[Cell]]]:
        """The cells of each task in each setting, which are compared with one another."""
        return [
            (setting, task, [cell for cell in self.cells_of(setting) if cell.task == task])
            for setting in self.settings
            for task in self.study.grid.task
        ]

    def rates(self, cell: Cell) -> dict[float, float]:
        """Held-out loss by learning rate; infinite where training diverged, NaN where it failed or is to do."""
        trials = choose_trials(self.study, cell, self.outcomes)
        rates = sorted({trial.learning_rate for trial in trials})
        return rate_losses(self.study, cell, self.outcomes, rates)

    def chosen(self, cell: Cell) -> float | None:
        """The rate that was chosen, None if that is not yet known."""
        trials = report_trials(self.study, cell, self.outcomes)
        return trials[0].learning_rate if trials else None

    def at_an_edge(self, cell: Cell) -> bool:
        """Whether the chosen rate is the smallest or largest that was tried and did not fail, so that a better one may
        lie beyond."""
        tried = [rate for rate, loss in self.rates(cell).items() if not math.isnan(loss)]
        return self.chosen(cell) in (tried[:1] + tried[-1:])

    def scored(self, cell: Cell) -> list[Scored]:
        """The reported runs of a cell that were scored, in the order of the seeds."""
        if cell not in self._scored:
            trials = report_trials(self.study, cell, self.outcomes)
            ended = [t for t in trials if t.name in self.outcomes and self.outcomes[t.name].status == "finished"]
            self._scored[cell] = [x for trial in ended if (x := _scored(trial, self.folder.run(trial))) is not None]
        return self._scored[cell]

    @cached_property
    def _scored(self) -> dict[Cell, list[Scored]]:
        return {}

    def lost(self) -> list[tuple[str, Outcome]]:
        """Runs that failed or diverged."""
        return [(name, outcome) for name, outcome in self.outcomes.items() if outcome.status != "finished"]

    def mean(self, cell: Cell) -> Mean:
        """Score of a cell over its seeds."""
        return describe([scored.value for scored in self.scored(cell)])

    def diverged(self, cell: Cell) -> int:
        """How many of its reported runs diverged."""
        trials = report_trials(self.study, cell, self.outcomes)
        return sum(t.name in self.outcomes and self.outcomes[t.name].status == "diverged" for t in trials)

    def complete(self, cell: Cell) -> bool:
        """Whether all its reported runs were scored."""
        return self.mean(cell).n == len(self.study.report.seeds)

    def difference(self, cell: Cell, setting: Setting) -> Difference | None:
        """What a cell gains over the reference method in a setting, over the seeds that both have. None if there is
        nothing to compare, or a run of either diverged: what is left would be the lucky seeds.

        Raises:
            UserError: two runs were scored on different rows, or differ in their data or base models.
        """
        pairs = self._pairs(cell, setting)
        if not pairs:
            return None
        metric = _METRICS.get(pairs[0][0].metric)
        a, b = (np.stack([pair[i].weights * pair[i].predicted for pair in pairs]) for i in (0, 1))
        return compare(a, b, pairs[0][0].expected if metric else None, metric)

    def by_example(self, cell: Cell, setting: Setting) -> dict[tuple[int, int], tuple[int, int, float]]:
        """McNemar's test against the reference for each pair of runs, by their seeds, where answers are right or
        wrong."""
        pairs = [(a, b) for a, b in self._pairs(cell, setting) if a.metric not in _METRICS]
        return {(a.trial.seed, b.trial.seed): mcnemar(a.predicted, b.predicted) for a, b in pairs}

    def gains(self, method: str, setting: Setting) -> dict[str, Difference]:
        """The gain of a method over the reference by task: on the tasks where seeds suffice, else on all that both
        have."""
        cells = [cell for cell in self.cells_of(setting) if cell.method.label == method]
        found = {c.task.label: d for c in cells if (d := self.difference(c, setting)) is not None}
        return {task: d for task, d in found.items() if not math.isnan(d.p)} or found

    def adjusted(self, differences: dict[Any, Difference]) -> dict[Any, float]:
        """The p of a family of comparisons, adjusted for their number."""
        return dict(zip(differences, adjusted([d.p for d in differences.values()]), strict=True))

    def costs(self, cell: Cell) -> tuple[int | None, float | None, int | None]:
        """Parameters as in :class:`Outcome`, median seconds of training, and peak memory in bytes."""
        runs = [scored.run for scored in self.scored(cell)]
        outcomes = [self.outcomes[scored.trial.name] for scored in self.scored(cell)]
        seconds = [outcome.seconds for outcome in outcomes if outcome.seconds is not None]
        memory = [m for run in runs if (m := read_as(run.cost_file, TrainingSummary).peak_memory) is not None]
        parameters = outcomes[0].parameters if outcomes else None
        return parameters, median(seconds) if seconds else None, max(memory) if memory else None

    def effects(self, cell: Cell) -> list[Effects]:
        """What the high-order terms do in the reported runs of a PERA cell."""
        return [read_as(s.run.effect_file, Effects) for s in self.scored(cell) if s.run.effect_file.is_file()]

    def interaction(self, cell: Cell) -> list[list[float]] | None:
        """Interaction strengths of the first reported run of a cell."""
        files = [s.run.interaction_file for s in self.scored(cell)[:1] if s.run.interaction_file.is_file()]
        return read_as(files[0], Interaction).strength if files else None

    def layers(self, cell: Cell) -> dict[str, LayerDiagnosis]:
        """The layers of the first reported run of a PERA cell; empty for other methods, and where the adapter was
        deleted."""
        scored = self.scored(cell)
        is_pera = bool(scored) and isinstance(scored[0].trial.recipe().peft_config(), PeraConfig)
        return diagnose_adapter(scored[0].run.adapter) if is_pera and scored[0].run.adapter.is_dir() else {}

    def loss_curve(self, cell: Cell) -> tuple[list[int], list[float]]:
        """Mean training loss over the seeds at each logged step."""
        curves = [scored.run.metrics() for scored in self.scored(cell)]
        steps = [line["step"] for line in curves[0]] if curves else []
        shared = [{line["step"]: line.get("loss", math.nan) for line in curve} for curve in curves]
        return steps, [fmean(curve.get(step, math.nan) for curve in shared) for step in steps]

    def reference(self, cell: Cell, setting: Setting) -> Cell | None:
        """The cell of the reference method in a setting, which ``cell`` belongs to."""
        label = self.study.reference
        return next((c for c in self.cells_of(setting) if c.method.label == label and c.task == cell.task), None)

    def _pairs(self, cell: Cell, setting: Setting) -> list[tuple[Scored, Scored]]:
        """Runs of a cell and of the reference that have an equal place in the lists of seeds, as far as both were
        scored; none where one diverged."""
        reference = self.reference(cell, setting)
        if reference is None or reference == cell or self.diverged(cell) or self.diverged(reference):
            return []

        def by_place(cell: Cell) -> dict[int, Scored]:
            seeds = cell.method.seeds or self.study.report.seeds
            return {seeds.index(scored.trial.seed): scored for scored in self.scored(cell)}

        x, y = by_place(cell), by_place(reference)
        pairs = [(x[i], y[i]) for i in sorted(x.keys() & y.keys())]
        for a, b in combinations(chain.from_iterable(pairs), 2):
            if unlike := [key for key in a.basis if key in b.basis and a.basis[key] != b.basis[key]]:
                raise UserError(
                    f"study: {str(a.run.path)!r} and {str(b.run.path)!r} differ in the {unlike[0]}, so they cannot be "
                    "compared; one of them has to be run again."
                )
        return pairs


def _scored(trial: Trial, run: Run) -> Scored | None:
    content, file = run.scores().get("adapter"), run.predictions / "adapter.jsonl"
    if content is None or not file.is_file():
        return None
    score = checked(content, Score, repr(str(run.scores_file)))
    rows = read_predictions(file)
    if len(rows) != score.n:
        raise UserError(
            f"{str(file)!r} has {len(rows)} answers, and scores.json counts {score.n}; restore one of them."
        )
    metric = score.metric
    if metric == "pearson":
        pairs = [(float(row.expected), float(row.answer or row.output)) for row in rows]
    elif metric in _METRICS:  # two classes: what was predicted is right, or the other one
        classes = sorted({row.expected for row in rows})
        pairs = [
            (float(classes.index(row.expected)), float(row.correct == (row.expected == classes[-1]))) for row in rows
        ]
    else:
        pairs = [(1.0, float(bool(row.correct))) for row in rows]
    expected, predicted = (np.array(column) for column in zip(*pairs, strict=True))
    members = Counter(row.group for row in rows if metric == "mean accuracy")
    weights = [len(rows) / (len(members) * members[row.group]) if members else 1.0 for row in rows]
    base = run.recorded_base()
    basis = {
        "rows that were scored": [row.expected for row in rows],
        **{f"file of {split!r} in data.json": digest for split, digest in run.data_hashes().items()},
        **{f"{key} of the base model": base[key] for key in ("dtype", "fingerprint") if key in base},
    }
    return Scored(trial, run, score.value, metric, expected, predicted, np.array(weights), basis)
