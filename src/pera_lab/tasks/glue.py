"""GLUE (Wang et al., arXiv 1804.07461) for encoders: sentences or pairs of them, and a class or a real number."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pera.errors import UserError, missing_extra, nearest
from pera_lab.tasks.base import ClassificationTask, Labelled
from pera_lab.tasks.sources import (
    HUB,
    BadRow,
    Rows,
    divide,
    field,
    folder_of,
    read_file,
    read_hub,
    split_file,
    take,
)

REPOSITORY = "nyu-mll/glue"
CHOOSING = 1000
"""Rows of a validation set of more than twice as many that choose the checkpoint; smaller sets are halved."""


class _Glue(NamedTuple):
    fields: tuple[str, ...]
    names: tuple[str, ...]
    metrics: tuple[str, ...]
    """The metric that counts first."""
    validation: str = "validation"


GLUE = {
    "sst2": _Glue(("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": _Glue(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "cola": _Glue(("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy")),
    "qnli": _Glue(("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",)),
    "rte": _Glue(("sentence1", "sentence2"), ("entailment", "not_entailment"), ("accuracy",)),
    "stsb": _Glue(("sentence1", "sentence2"), (), ("pearson", "spearman")),
    "mnli": _Glue(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",), "validation_matched"
    ),
    "qqp": _Glue(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
}


class GlueTask(ClassificationTask):
    """One task of GLUE. The test sets have no public labels, so the validation set is divided: some rows choose the
    checkpoint, the rest are the test rows.

    A validation set of more than 2,000 rows gives 1,000 to choose by, a smaller one half, drawn by ``seed``.

    Args:
        name: a key of :data:`GLUE`.
        data: "hub" (the data set nyu-mll/glue) or a folder with ``<name>/train.jsonl`` and ``<name>/validation.jsonl``,
            in the fields of that data set.
        train_size: training rows to use at most, drawn by ``seed``.
        test_size: test rows to use at most.
        choose_size: rows to choose by, in the place of the rule above; 0 makes all validation rows test rows.
        seed: divides the validation set.

    Raises:
        UserError: unknown name, missing split, broken row.
    """

    def __init__(
        self,
        name: str,
        *,
        data: str = HUB,
        train_size: int | None = None,
        test_size: int | None = None,
        choose_size: int | None = None,
        seed: int = 42,
    ) -> None:
        if name not in GLUE:
            raise UserError(f"task.name={name!r} is not a task of GLUE; {nearest(name, GLUE)}")
        self.name = name
        self._spec = GLUE[name]
        self.names = self._spec.names
        self.labels = len(self.names) or 1
        self.metric = self._spec.metrics[0]
        train, validation = self._source(data, "train"), self._source(data, self._spec.validation)
        rows, held = train.convert(self._row), validation.convert(self._row)
        size = choose_size if choose_size is not None else CHOOSING if len(held) > 2 * CHOOSING else len(held) // 2
        if size >= len(held):
            raise UserError(f"task.choose_size={size} leaves no test row: {validation.source} has {len(held)} rows.")
        self.validation, test = divide(held, size, seed)
        self.train, self.test = take(rows, train_size, seed), take(test, test_size, seed)
        self.manifest = {
            "train": train.record(len(self.train)),
            "validation": validation.record(len(self.validation)),
            "test": validation.record(len(self.test)),
        }

    def measure(self, gold: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
        return {metric: METRICS[metric](gold, predicted) for metric in self._spec.metrics}

    def _source(self, data: str, split: str) -> Rows:
        if data == HUB:
            return read_hub(REPOSITORY, self.name, split)
        return read_file(split_file(folder_of(data) / self.name, [split, split.partition("_")[0]]))

    def _row(self, row: dict[str, Any]) -> Labelled:
        texts = tuple(field(row, name) for name in self._spec.fields)
        if not self.names:
            label = field(row, "label", (int, float), "a number from 0 to 5")
            if not 0 <= label <= 5:
                raise BadRow(f"field 'label'={label!r} should be a number from 0 to 5.")
            return Labelled(texts, float(label))
        known = f"one of {', '.join(f'{i} ({name})' for i, name in enumerate(self.names))}"
        label = field(row, "label", int, known)
        if not 0 <= label < len(self.names):
            raise BadRow(f"field 'label'={label!r} should be {known}.")
        return Labelled(texts, label)


def _scikit(function: str) -> Callable[[Sequence[float], Sequence[float]], float]:
    def metric(gold: Sequence[float], predicted: Sequence[float]) -> float:
        try:
            from sklearn import metrics
        except ImportError as error:
            raise missing_extra("scikit-learn", "lab") from error
        return float(getattr(metrics, function)(gold, predicted))

    return metric


def _scipy(function: str) -> Callable[[Sequence[float], Sequence[float]], float]:
    def metric(gold: Sequence[float], predicted: Sequence[float]) -> float:
        try:
            from scipy import stats
        except ImportError as error:
            raise missing_extra("scipy", "lab") from error
        if len(set(gold)) < 2 or len(set(predicted)) < 2:  # the correlation with a constant is not defined
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(getattr(stats, function)(gold, predicted).statistic)

    return metric


METRICS = {
    "accuracy": _scikit("accuracy_score"),
    "f1": _scikit("f1_score"),
    "matthews": _scikit("matthews_corrcoef"),
    "pearson": _scipy("pearsonr"),
    "spearman": _scipy("spearmanr"),
}
