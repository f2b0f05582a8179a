"""What every task gives: examples to train on, held-out examples, and how an answer is judged."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from pera.errors import UserError
from pera_lab.tasks.prompts import CHAT, Frame


@dataclass(frozen=True)
class Example:
    """One problem: what the user says, what the model should answer, and what its scorer needs to know."""

    prompt: str
    answer: str
    data: dict[str, Any] = field(default_factory=dict, compare=False)
    group: str = ""
    """The member of a mix that it belongs to; scores are by group."""
    options: tuple[str, ...] = ()
    """The answers there are, for a likelihood scorer; empty if the answer is free text."""
    messages: tuple[dict[str, str], ...] = ()
    """The conversation before the answer, where it is more than one prompt; ``prompt`` is then its last message."""


@dataclass(frozen=True)
class Labelled:
    """One or two texts and their label: the number of a class, or a real number."""

    texts: tuple[str, ...]
    label: float

    @property
    def prompt(self) -> str:
        """The texts, line by line."""
        return "\n".join(self.texts)


class Verdict(NamedTuple):
    """What was found in an output, None if nothing that the task knows, and whether it is right."""

    answer: str | None
    correct: bool


class Task:
    """A task as training and evaluation see it. One of :class:`GenerationTask` and :class:`ClassificationTask`."""

    name: str
    train: list[Any]
    test: list[Any]
    validation: Sequence[Any] = ()
    """Rows by whose loss, or metric, the best checkpoint is chosen."""
    labels: int | None = None
    """Outputs of a classification head, 1 for a regression; None for a causal language model."""
    metric: str = "accuracy"
    """The metric that counts."""
    members: tuple[str, ...] = ()
    """The groups of a mix, whether there are data for them or not."""
    missing: Sequence[str] = ()
    """A sentence on each part of the data that there is not."""
    manifest: Mapping[str, Any] = {}
    """Where the examples came from: files or hub sets, and how many rows of each are used."""

    @property
    def notes(self) -> list[str]:
        """What a person should know about the data: what is missing, and test rows that occur in training."""
        seen = set(map(_question, self.train))
        rows, doubled = _groups(self.test), _groups([row for row in self.test if _question(row) in seen])
        return [
            *self.missing,
            *(
                f"{group or self.name}: {count} of {rows[group]} test rows also occur in the training data."
                for group, count in doubled.items()
            ),
        ]

    def majority(self) -> float | None:
        """The value of the metric for the commonest training answer, or the mean label, given to every test row; None
        if that is not known."""
        raise NotImplementedError


class GenerationTask(Task):
    """A task for causal language models: :class:`Example` in, text out."""

    frame: Frame = CHAT
    prefix: str = ""
    """The beginning that all answers share; a likelihood scorer ranks the options as its continuations."""

    def score(self, example: Example, output: str) -> float:
        """Between 0 (wrong) and 1 (right)."""
        raise NotImplementedError

    def judge(self, example: Example, output: str) -> Verdict:
        """What ``output`` says and whether it is right; here, whether it gets full marks."""
        return Verdict(output, self.score(example, output) >= 1.0)

    def majority(self) -> float | None:
        """Accuracy, averaged over the groups, of the commonest training answer of each group; None for free text."""
        if not all(example.options for example in self.test):
            return None
        answers: dict[str, Counter[str]] = {}
        for example in self.train:
            answers.setdefault(example.group, Counter())[example.answer] += 1
        tested: dict[str, list[bool]] = {}
        for example in self.test:
            if example.group not in answers:  # trained on a mixed file, which does not say whose its rows are
                return None
            commonest = answers[example.group].most_common(1)[0][0]
            tested.setdefault(example.group, []).append(commonest == example.answer)
        return sum(sum(right) / len(right) for right in tested.values()) / len(tested)


class ClassificationTask(Task):
    """A task for encoders with a head: :class:`Labelled` in, a class or a number out."""

    labels: int
    names: tuple[str, ...] = ()
    """Names of the classes; empty for a regression."""

    def measure(self, gold: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
        """All metrics of the task, the one that counts first."""
        raise NotImplementedError

    def majority(self) -> float:
        gold = [row.label for row in self.train]
        constant = Counter(gold).most_common(1)[0][0] if self.names else sum(gold) / len(gold)
        return self.measure([row.label for row in self.test], [constant] * len(self.test))[self.metric]


T = TypeVar("T", bound=Task)


def divided(task: T, *, share: float = 1.0, held_out: int = 0) -> T:
    """The task with other examples: ``held_out`` rows of its training set in the place of its test rows, so that
    settings can be chosen without a look at those, and ``share`` of the other rows to train on.

    Which rows they are depends on the task alone, and a smaller share is part of a larger one. The manifest counts the
    rows that are left as used.

    Raises:
        UserError: too few training rows.
    """
    if share == 1 and not held_out:
        return task
    rows = random.Random(0).sample(range(len(task.train)), len(task.train))
    if held_out >= len(rows):
        raise UserError(f"training.held_out={held_out} leaves nothing of the {len(rows)} rows of {task.name}.")
    chosen = copy.copy(task)
    rest = rows[held_out:]
    kept = rest[: max(1, round(share * len(rest)))]
    chosen.train = [task.train[i] for i in sorted(kept)]
    gone = {"train": _groups(task.train) - _groups(chosen.train), "test": _groups(task.test if held_out else [])}
    manifest = {key: _less(record, gone[key]) if key in gone else record for key, record in task.manifest.items()}
    if held_out:
        chosen.test = [task.train[i] for i in sorted(rows[:held_out])]
        manifest["held_out"] = {"rows": held_out, "of": "train"}
    chosen.manifest = manifest
    return chosen


def _question(row: Any) -> str:
    """What the model reads of an example, but for the frame."""
    return repr((row.prompt, getattr(row, "messages", ())))


def _groups(rows: Sequence[Any]) -> Counter[str]:
    return Counter(getattr(row, "group", "") for row in rows)


def _less(records: Mapping[str, Any], gone: Counter[str]) -> dict[str, Any]:
    """A record of a manifest, or those of the members of a mix, without the rows of each group that are gone."""
    if "used" in records:
        return {**records, "used": records["used"] - gone.total()}
    alone = len(records) == 1  # a mixed file does not say whose its rows are
    return {name: _less(record, gone if alone else Counter({name: gone[name]})) for name, record in records.items()}


class Asked(GenerationTask):
    """Questions without known answers, put to the model in a frame."""

    def __init__(self, examples: list[Example], frame: Frame) -> None:
        self.test, self.frame = examples, frame

    def judge(self, example: Example, output: str) -> Verdict:
        return Verdict(output, False)


class AskedLabels(ClassificationTask):
    """Texts without known labels."""

    def __init__(self, rows: list[Labelled], names: tuple[str, ...]) -> None:
        self.test, self.names, self.labels = rows, names, len(names) or 1
