"""The results of a study so far: learning rates, scores with their examples, costs and the effect of the terms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from pera.errors import UserError
from pera.tuner import PeraConfig
from pera_lab.diagnose import Effects, LayerDiagnosis, diagnose_adapter
from pera_lab.evaluation import read_predictions
from pera_lab.files import checked, number_or_nan, read_as
from pera_lab.intervals import mean
from pera_lab.memory import Memory
from pera_lab.runs import Run
from pera_lab.scorers import Prediction, Score
from pera_lab.study.folder import StudyFolder
from pera_lab.study.interaction import Interaction
from pera_lab.study.plan import Outcome, choose_trials, rate_losses, report_trials
from pera_lab.study.spec import Cell, StudyTask, Trial
from pera_lab.study.statistics import (
    Difference,
    Mean,
    adjusted,
    average,
    compare,
    describe,
    equivalent_rank,
    mcnemar,
    over_seeds,
    pearson,
)
from pera_lab.training import TrainingSummary

if TYPE_CHECKING:
    from pera_lab.study.statistics import Array

Setting = tuple[int | None, str | None, float]
"""Rank, placement and share of the data. Methods are compared within a setting, over all tasks."""

_METRICS: dict[str, Callable[..., Any]] = {"matthews": pearson, "pearson": pearson}
"""Metrics that are not a mean over examples. Matthews' correlation is Pearson's for classes encoded as 0 and 1."""


@dataclass(frozen=True)
class Scored:
    """One reported run: its score and its answer to each example."""

    trial: Trial
    run: Run
    value: float
    metric: str
    low: float
    """95 % interval of the score."""
    high: float
    majority: float | None
    """The score of the most frequent training answer, if that is a baseline of the task."""
    expected: Array
    predicted: Array
    """Predicted values. For a metric that is a mean, 1 for a right answer; ``expected`` is then 1 everywhere."""
    weights: Array
    """One weight per example, 1 on average. They are equal, except for a mix: its members have equal total weight."""
    basis: dict[str, Any]
    """What must be equal in runs that are compared, if it was recorded: rows, data files, base model. Where each seed
    draws its own rows, only runs of one seed are compared."""
    memory: Memory | None
    """What is stored of the facts, for a task that recalls its training rows."""


@dataclass(frozen=True)
class Comparison:
    """A method against the reference in one setting, over the tasks that both were scored on."""

    method: str
    setting: Setting
    gains: dict[str, Difference]
    """By task."""
    gain: Difference
    """Their mean."""
    p: float
    """Adjusted for all comparisons of the study; NaN if there are too few seeds."""

    @property
    def verdict(self) -> str:
        """As in :meth:`Difference.verdict`."""
        return self.gain.verdict(self.p)

    def record(self) -> dict[str, Any]:
        """The comparison as a JSON object."""
        r, placement, share = self.setting
        place = {"method": self.method, "r": r, "placement": placement, "train_share": share}
        interval = {"gain": self.gain.mean, "low": self.gain.low, "high": self.gain.high}
        counts = {"seeds": self.gain.seeds, "examples": self.gain.examples, "tasks": list(self.gains)}
        return {**place, **interval, "p": self.gain.p, "adjusted_p": self.p, **counts, "verdict": self.verdict}


class Results:
    """The finished runs of a study, read once."""

    def __init__(self, folder: StudyFolder) -> None:
        self.folder = folder
        self.study = folder.study
        self.outcomes: dict[str, Outcome] = folder.outcomes(self.study)
        self.cells = self.study.cells()

    @cached_property
    def settings(self) -> list[Setting]:
        """The settings in which methods are compared.

        A method without a rank belongs to every setting with its share of the data. If there is none, it has its own.
        """
        ranked = list(dict.fromkeys(cell.setting[1:] for cell in self.cells if cell.r is not None))
        shares = {setting[2] for setting in ranked}
        return ranked + list(dict.fromkeys(c.setting[1:] for c in self.cells if c.train_share not in shares))

    def cells_of(self, setting: Setting) -> list[Cell]:
        """The cells of a setting, including methods without a rank."""
        return [c for c in self.cells if c.setting[1:] == setting or (c.r is None and c.train_share == setting[2])]

    def by_task(self) -> list[tuple[Setting, StudyTask, list[Cell]]]:
        """The groups of cells that are compared with one another, each with its setting and task."""
        return [
            (setting, task, [cell for cell in self.cells_of(setting) if cell.task == task])
            for setting in self.settings
            for task in self.study.grid.task
        ]

    def rates(self, cell: Cell) -> dict[float, float]:
        """Held-out loss by learning rate; infinite if training diverged, NaN if it failed or has not ended."""
        trials = choose_trials(self.study, cell, self.outcomes)
        rates = sorted({trial.learning_rate for trial in trials})
        return rate_losses(self.study, cell, self.outcomes, rates)

    def chosen_rate(self, cell: Cell) -> float | None:
        """The chosen learning rate, or None if it is not known yet."""
        trials = report_trials(self.study, cell, self.outcomes)
        return trials[0].learning_rate if trials else None

    def at_grid_edge(self, cell: Cell) -> bool:
        """Whether the chosen rate is the smallest or largest rate that did not fail. A better one may lie beyond."""
        tried = [rate for rate, loss in self.rates(cell).items() if not math.isnan(loss)]
        return self.chosen_rate(cell) in (tried[:1] + tried[-1:])

    def scored(self, cell: Cell) -> list[Scored]:
        """The scored runs of a cell, in the order of the seeds."""
        if cell not in self._scored:
            trials = report_trials(self.study, cell, self.outcomes)
            ended = [t for t in trials if t.name in self.outcomes and self.outcomes[t.name].status == "finished"]
            self._scored[cell] = [x for trial in ended if (x := _scored(trial, self.folder.run(trial))) is not None]
        return self._scored[cell]

    @cached_property
    def _scored(self) -> dict[Cell, list[Scored]]:
        return {}

    def unsuccessful(self) -> list[tuple[str, Outcome]]:
        """The runs that failed or diverged, by name."""
        return [(name, outcome) for name, outcome in self.outcomes.items() if outcome.status != "finished"]

    def mean(self, cell: Cell) -> Mean:
        """The score of a cell over its seeds."""
        return describe([scored.value for scored in self.scored(cell)])

    def num_diverged(self, cell: Cell) -> int:
        """The number of reported runs that diverged."""
        trials = report_trials(self.study, cell, self.outcomes)
        return sum(t.name in self.outcomes and self.outcomes[t.name].status == "diverged" for t in trials)

    def is_complete(self, cell: Cell) -> bool:
        """Whether all reported runs of a cell were scored."""
        return self.mean(cell).n == len(self.study.report.seeds)

    def difference(self, cell: Cell, setting: Setting) -> Difference | None:
        """The gain of a cell over the reference method in a setting, over the seeds that both have.

        Returns:
            None if there is nothing to compare, or if a run of either diverged, because only lucky seeds would remain.

        Raises:
            UserError: two runs were scored on different rows, or have different data or base models.
        """
        pairs = self._pairs(cell, setting)
        if not pairs:
            return None
        if cell.task.recalls:
            return over_seeds([float((a.predicted - b.predicted).mean()) for a, b in pairs], len(pairs[0][0].expected))
        metric = _METRICS.get(pairs[0][0].metric)
        a, b = (np.stack([pair[i].weights * pair[i].predicted for pair in pairs]) for i in (0, 1))
        return compare(a, b, pairs[0][0].expected if metric else None, metric)

    def by_example(self, cell: Cell, setting: Setting) -> dict[tuple[int, int], tuple[int, int, float]]:
        """McNemar's test against the reference for each pair of runs, by their seeds.

        It is empty for a metric that does not count right answers.
        """
        pairs = [(a, b) for a, b in self._pairs(cell, setting) if a.metric not in _METRICS]
        return {(a.trial.seed, b.trial.seed): mcnemar(a.predicted, b.predicted) for a, b in pairs}

    def memories(self, cell: Cell) -> list[Memory]:
        """What the scored runs of a cell have stored, in the order of the seeds; empty if bits are not counted."""
        return [s.memory for s in self.scored(cell) if s.memory is not None and s.memory.bits is not None]

    def equivalent_ranks(self, cell: Cell) -> list[float]:
        """The rank at which the reference method stores as many bits, divided by the cell's own rank, for each seed.

        The values are ±∞ beyond the measured ranks. There are none if a run of either method diverged.
        """
        curve = [
            c
            for c in self.cells
            if c.method.label == self.study.reference and c.task == cell.task and c.placement == cell.placement
            and c.train_share == cell.train_share and c.r is not None
        ]  # fmt: skip
        if cell.r is None or any(map(self.num_diverged, [cell, *curve])):
            return []
        bits = {c: {s.trial.seed: s.memory.bits for s in self.scored(c) if s.memory} for c in [cell, *curve]}
        return [
            equivalent_rank(points, own) / cell.r
            for seed, own in bits[cell].items()
            if own is not None and (points := [(c.r, x) for c in curve if c.r and (x := bits[c].get(seed)) is not None])
        ]

    def at_baseline(self, cell: Cell) -> list[Scored]:
        """The runs of a cell that are not shown to do better than the most frequent training answer."""
        return [s for s in self.scored(cell) if s.majority is not None and s.low <= s.majority]

    def seeds_disagree(self, cell: Cell) -> bool:
        """Whether the 95 % intervals of two runs of a cell do not overlap, so that seeds matter more than examples."""
        scored = self.scored(cell)
        return len(scored) > 1 and max(s.low for s in scored) > min(s.high for s in scored)

    def gains(self, method: str, setting: Setting) -> dict[str, Difference]:
        """The gain of a method over the reference, by task.

        It is limited to the tasks that have enough seeds, unless no task has.
        """
        cells = [cell for cell in self.cells_of(setting) if cell.method.label == method]
        found = {c.task.label: d for c in cells if (d := self.difference(c, setting)) is not None}
        return {task: d for task, d in found.items() if not math.isnan(d.p)} or found

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Every method in every setting against the reference: most tasks first, then the largest gain."""
        found = {
            (setting, method.label): gains
            for setting in self.settings
            for method in self.study.grid.method
            if (gains := self.gains(method.label, setting))
        }
        means = {key: average(list(gains.values())) for key, gains in found.items()}
        p = self.adjusted(means)
        compared = [Comparison(method, s, found[s, method], gain, p[s, method]) for (s, method), gain in means.items()]
        return sorted(compared, key=lambda c: (self.settings.index(c.setting), -c.gain.tasks, -c.gain.mean))

    def adjusted(self, differences: dict[Any, Difference]) -> dict[Any, float]:
        """The p-values of a family of comparisons, adjusted for their number."""
        return dict(zip(differences, adjusted([d.p for d in differences.values()]), strict=True))

    def costs(self, cell: Cell) -> tuple[int | None, float | None, int | None]:
        """Parameters as in :class:`Outcome`, median training time in seconds, and peak memory in bytes."""
        runs = [scored.run for scored in self.scored(cell)]
        outcomes = [self.outcomes[scored.trial.name] for scored in self.scored(cell)]
        seconds = [outcome.seconds for outcome in outcomes if outcome.seconds is not None]
        memory = [m for run in runs if (m := read_as(run.cost_file, TrainingSummary).peak_memory) is not None]
        parameters = outcomes[0].parameters if outcomes else None
        return parameters, median(seconds) if seconds else None, max(memory) if memory else None

    def effects(self, cell: Cell) -> list[Effects]:
        """The effect of the high-order terms in the scored runs of a PERA cell."""
        return [read_as(s.run.effect_file, Effects) for s in self.scored(cell) if s.run.effect_file.is_file()]

    def interaction(self, cell: Cell) -> list[list[float]] | None:
        """Interaction strengths of the first scored run of a cell, or None if they were not measured."""
        files = [s.run.interaction_file for s in self.scored(cell)[:1] if s.run.interaction_file.is_file()]
        return read_as(files[0], Interaction).strength if files else None

    def layers(self, cell: Cell) -> dict[str, LayerDiagnosis]:
        """The layers of the first scored run of a PERA cell.

        It is empty for other methods and if the adapter was deleted.
        """
        scored = self.scored(cell)
        is_pera = bool(scored) and isinstance(scored[0].trial.recipe().peft_config(), PeraConfig)
        return diagnose_adapter(scored[0].run.adapter) if is_pera and scored[0].run.finished else {}

    def loss_curve(self, cell: Cell) -> tuple[list[int], list[float]]:
        """Mean training loss over the seeds at each logged step."""
        curves = [scored.run.metrics() for scored in self.scored(cell)]
        steps = [line["step"] for line in curves[0]] if curves else []
        shared = [{line["step"]: number_or_nan(line.get("loss")) for line in curve} for curve in curves]
        return steps, [mean(curve.get(step, math.nan) for curve in shared) for step in steps]

    def reference(self, cell: Cell, setting: Setting) -> Cell | None:
        """The cell of the reference method that ``cell`` is compared with in a setting."""
        label = self.study.reference
        return next((c for c in self.cells_of(setting) if c.method.label == label and c.task == cell.task), None)

    def _pairs(self, cell: Cell, setting: Setting) -> list[tuple[Scored, Scored]]:
        """Scored runs of a cell and of the reference, paired by their place in the lists of seeds.

        It is empty if a run of either diverged.
        """
        reference = self.reference(cell, setting)
        if reference is None or reference == cell or self.num_diverged(cell) or self.num_diverged(reference):
            return []

        def by_place(cell: Cell) -> dict[int, Scored]:
            seeds = self.study.report_seeds(cell)
            return {seeds.index(scored.trial.seed): scored for scored in self.scored(cell)}

        x, y = by_place(cell), by_place(reference)
        pairs = [(x[i], y[i]) for i in sorted(x.keys() & y.keys())]
        compared = pairs if cell.task.recalls else combinations(chain.from_iterable(pairs), 2)
        for a, b in compared:
            if unlike := [key for key in a.basis if key in b.basis and a.basis[key] != b.basis[key]]:
                raise UserError(
                    f"study: {str(a.run.path)!r} and {str(b.run.path)!r} cannot be compared, because they differ in "
                    f"the {unlike[0]}; run one of them again."
                )
        return pairs


def _scored(trial: Trial, run: Run) -> Scored | None:
    """The scores and answers of a run, or None if it has none."""
    content, file = run.scores().get("adapter"), run.predictions / "adapter.jsonl"
    if content is None or not file.is_file():
        return None
    score = checked(content, Score, repr(str(run.scores_file)))
    rows = read_predictions(file)
    if len(rows) != score.n:
        raise UserError(
            f"{str(file)!r} has {len(rows)} answers, but scores.json counts {score.n}; restore one of the files."
        )
    expected, predicted = _values(rows, score.metric)
    members = Counter(row.group for row in rows if score.metric == "mean accuracy")
    weights = [len(rows) / (len(members) * members[row.group]) if members else 1.0 for row in rows]
    base = run.recorded_base()
    basis = {
        "rows that were scored": [row.expected for row in rows],
        **{f"file of {split!r} in data.json": digest for split, digest in run.data_hashes().items()},
        **{f"{key} of the base model": base[key] for key in ("dtype", "fingerprint") if key in base},
    }
    interval = (score.low, score.high, score.majority)
    answers = (expected, predicted, np.array(weights))
    return Scored(trial, run, score.value, score.metric, *interval, *answers, basis, score.memory)


def _values(rows: list[Prediction], metric: str) -> tuple[Array, Array]:
    """Expected and predicted values of examples; see :class:`Scored`."""
    if metric == "pearson":
        pairs = [(float(row.expected), float(row.answer or row.output)) for row in rows]
    elif metric in _METRICS:  # with two classes, a wrong prediction is the other class
        classes = sorted({row.expected for row in rows})
        pairs = [
            (float(classes.index(row.expected)), float(row.correct == (row.expected == classes[-1]))) for row in rows
        ]
    else:
        pairs = [(1.0, float(bool(row.correct))) for row in rows]
    expected, predicted = zip(*pairs, strict=True)
    return np.array(expected), np.array(predicted)
