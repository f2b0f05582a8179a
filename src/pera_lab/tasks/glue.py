"""GLUE (Wang et al., arXiv 1804.07461) for encoders: a sentence or a pair, and a class or a real number."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from pera.errors import UserError
from pera_lab.tasks.base import ClassificationTask
from pera_lab.tasks.examples import LabelledText, Splits
from pera_lab.tasks.sources import (
    HUB,
    BadRow,
    DataPath,
    Rows,
    divide,
    field,
    folder_of,
    read_file,
    read_hub,
    short,
    split_file,
    take,
)

REPOSITORY = "nyu-mll/glue"
CHOOSING = 1000
"""Rows that choose the checkpoint if the validation set has more than twice as many; else half of the set."""


class _Glue(NamedTuple):
    fields: tuple[str, ...]
    names: tuple[str, ...]
    metrics: tuple[str, ...]
    """The main metric first."""
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
    checkpoint, and the others are the test rows."""

    task_names = tuple(GLUE)

    name: str
    """A key of :data:`GLUE`."""
    data: DataPath = HUB
    """"hub" (the data set nyu-mll/glue), or a folder with ``<name>/train.jsonl`` and ``<name>/validation.jsonl`` in the
    fields of that data set."""
    train_size: int | None = Field(None, ge=1)
    """Training rows to draw; all by default."""
    test_size: int | None = Field(None, ge=1)
    """Test rows to draw; all by default."""
    choose_size: int | None = Field(None, ge=0)
    """Validation rows that choose the checkpoint: by default 1,000 of more than 2,000, else half. 0 makes all of them
    test rows."""
    seed: int = Field(42, ge=0)
    """Seed of the division of the validation set, and of the draws."""

    @property
    def classes(self) -> tuple[str, ...]:
        return GLUE[self.name].names

    @property
    def metric(self) -> str:
        return GLUE[self.name].metrics[0]

    def build(self) -> Splits:
        """Read the training set, and divide the validation set.

        Raises:
            UserError: a split is missing, or a row is broken.
        """
        train, validation = self._source("train"), self._source(GLUE[self.name].validation)
        rows, held = train.convert(self._row), validation.convert(self._row)
        default = CHOOSING if len(held) > 2 * CHOOSING else len(held) // 2
        size = default if self.choose_size is None else self.choose_size
        if size >= len(held):
            raise UserError(
                f"task.choose_size={size} leaves no test rows: {validation.source} has {len(held)} rows; give fewer."
            )
        choosing, test = divide(held, size, self.seed)
        rows, test = take(rows, self.train_size, self.seed), take(test, self.test_size, self.seed)
        manifest = {
            "train": train.record(len(rows)),
            "validation": validation.record(len(choosing)),
            "test": validation.record(len(test)),
        }
        return Splits(rows, test, choosing, manifest=manifest)

    def measure(self, gold: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
        return {metric: METRICS[metric](gold, predicted) for metric in GLUE[self.name].metrics}

    def question(self, row: dict[str, Any]) -> LabelledText:
        return LabelledText(tuple(field(row, name) for name in GLUE[self.name].fields), 0)

    def _source(self, split: str) -> Rows:
        if self.data == HUB:
            return read_hub(REPOSITORY, self.name, split)
        return read_file(split_file(folder_of(self.data) / self.name, [split, split.partition("_")[0]]))

    def _row(self, row: dict[str, Any]) -> LabelledText:
        texts = self.question(row).texts
        if not self.classes:
            score = _number(field(row, "label", (int, float, str), "a number from 0 to 5"))
            if score is None or not 0 <= score <= 5:
                raise BadRow(f"field 'label'={short(row['label'])} should be a number from 0 to 5.")
            return LabelledText(texts, score)
        known = f"one of {', '.join(f'{i} ({name})' for i, name in enumerate(self.classes))}"
        label = _number(field(row, "label", (int, str), known))
        if label is None or label not in range(len(self.classes)):
            raise BadRow(f"field 'label'={short(row['label'])} should be {known}.")
        return LabelledText(texts, int(label))


def _number(value: float | str) -> float | None:
    """A label as a number; the fields of a CSV file are texts. None if the text is no number."""
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _scikit(function: str) -> Callable[[Sequence[float], Sequence[float]], float]:
    def metric(gold: Sequence[float], predicted: Sequence[float]) -> float:
        from sklearn import metrics

        return float(getattr(metrics, function)(gold, predicted))

    return metric


def _scipy(function: str) -> Callable[[Sequence[float], Sequence[float]], float]:
    def metric(gold: Sequence[float], predicted: Sequence[float]) -> float:
        from scipy import stats

        if len(set(gold)) < 2 or len(set(predicted)) < 2:  # the correlation with a constant is undefined
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
