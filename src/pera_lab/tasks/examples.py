"""Examples, the splits they come in, and subsamples of them."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from pera.errors import UserError


@dataclass(frozen=True)
class Example:
    """One problem for a language model: the prompt, and the answer it should write."""

    prompt: str
    answer: str
    data: dict[str, Any] = field(default_factory=dict, compare=False)
    """What the task needs to judge an answer, for example the whole row."""
    group: str = ""
    """Member of a mix. Each member gets a score of its own."""
    options: tuple[str, ...] = ()
    """Possible answers, which the likelihood scorer ranks. Empty if the answer is free text."""
    messages: tuple[dict[str, Any], ...] = ()
    """The conversation up to the answer, if it is longer than one prompt. ``prompt`` is its last message."""
    reply: dict[str, Any] = field(default_factory=dict, hash=False)
    """The assistant's message, if it is more than the text ``answer``, such as a tool call."""
    tools: tuple[dict[str, Any], ...] = ()
    """The functions that the model can call."""
    place: str = field(default="", compare=False)
    """Source and line of the example, for messages."""

    @property
    def characters(self) -> int:
        """Length of prompt, conversation and answer."""
        return len(self.prompt) + len(self.answer) + sum(len(message["content"]) for message in self.messages[:-1])


@dataclass(frozen=True)
class LabelledText:
    """One text or a pair of texts, with a label: the index of a class, or a real number."""

    texts: tuple[str, ...]
    label: float

    @property
    def prompt(self) -> str:
        """The texts, one per line."""
        return "\n".join(self.texts)


class StoredExamples(Sequence[Any]):
    """Examples that are made when they are used, from rows on the disk. In memory is one number for each of them.

    Args:
        make: returns the example of a row, given the number of the row from 0.
        rows: the rows that the examples are made from.
        identity: tells the content of the rows from other content.
    """

    def __init__(self, make: Callable[[int], Any], rows: Iterable[int], identity: str) -> None:
        self._make, self.rows, self.identity = make, array("q", rows), identity

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """The example at an index, or the list of examples in a slice."""
        if isinstance(index, slice):
            return [self._make(row) for row in self.rows[index]]
        return self._make(self.rows[index])

    def select(self, positions: Iterable[int]) -> StoredExamples:
        """The examples at some positions."""
        return StoredExamples(self._make, (self.rows[i] for i in positions), self.identity)


def select(rows: Sequence[Any], positions: Iterable[int]) -> Any:
    """The rows at some positions: a list, or again stored examples."""
    return rows.select(positions) if isinstance(rows, StoredExamples) else [rows[i] for i in positions]


class Verdict(NamedTuple):
    """The answer found in an output (None if there is none), and whether it is right."""

    answer: str | None
    correct: bool


@dataclass(frozen=True)
class Splits:
    """The examples of a task."""

    train: Sequence[Any]
    test: Sequence[Any]
    """Held-out examples, which are scored."""
    validation: Sequence[Any] = ()
    """Examples that choose the best checkpoint."""
    missing: Sequence[str] = ()
    """One sentence for each part of the data that was not found."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """Where the examples came from: files or Hub data sets, and how many rows of each are used."""
    unused: Sequence[str] = ()
    """Columns of the rows that nothing uses."""
    recalled: bool = False
    """Whether the test rows are the training rows on purpose, because the task measures what is remembered."""

    @property
    def notes(self) -> list[str]:
        """Warnings for the user: missing parts, unused columns, and test rows that also occur in the training data."""
        asked = set() if self.recalled else set(map(_question, self.test))
        seen = {question for question in map(_question, self.train if asked else ()) if question in asked}
        rows = _groups(self.test)
        repeated = _groups([row for row in self.test if _question(row) in seen])
        return [
            *self.missing,
            *([f"columns that are not used: {', '.join(self.unused)}."] if self.unused else []),
            *(
                f"{group and f'{group}: '}{count} of {rows[group]} test rows also occur in the training data."
                for group, count in repeated.items()
            ),
        ]


def subsample(splits: Splits, *, share: float = 1.0, held_out: int = 0) -> Splits:
    """Splits with fewer training rows, and with test rows taken from the training rows.

    The choice of rows depends on the splits alone. A smaller share is a subset of a larger one. In the manifest, "used"
    counts the remaining rows. If the test rows are the training rows, they stay so.

    Args:
        splits: the splits of a task.
        share: share of the training rows to keep, after the held-out rows are taken off.
        held_out: number of training rows that replace the test rows. Settings can then be chosen without looking at the
            test rows.

    Raises:
        UserError: no training rows are left, or rows are held out of a task that recalls its training rows.
    """
    if share == 1 and not held_out:
        return splits
    if held_out and splits.recalled:
        raise UserError(
            f"training.held_out={held_out}: the facts that are trained are tested, so none can be held out; leave it "
            "out."
        )
    rows = random.Random(0).sample(range(len(splits.train)), len(splits.train))
    if held_out >= len(rows):
        raise UserError(f"training.held_out={held_out} leaves none of the {len(rows)} training rows; give fewer.")
    rest = rows[held_out:]
    kept = rest[: max(1, round(share * len(rest)))]
    train = select(splits.train, sorted(kept))
    removed = {"train": _groups(splits.train) - _groups(train), "test": _groups(splits.test if held_out else [])}
    manifest = {
        key: _subtract(record, removed[key]) if key in removed else record for key, record in splits.manifest.items()
    }
    test = train if splits.recalled else splits.test
    if held_out:
        test = select(splits.train, sorted(rows[:held_out]))
        manifest["held_out"] = {"rows": held_out, "of": "train"}
    return replace(splits, train=train, test=test, manifest=manifest)


def _question(row: Any) -> str:
    """What the model reads of an example, without the frame."""
    return repr((row.prompt, getattr(row, "messages", ())))


def _groups(rows: Sequence[Any]) -> Counter[str]:
    return Counter(getattr(row, "group", "") for row in rows)


def _subtract(records: Mapping[str, Any], removed: Counter[str]) -> dict[str, Any]:
    """A record of a manifest, or the records of the members of a mix, without the removed rows of each group."""
    if "used" in records:
        return {**records, "used": records["used"] - removed.total()}
    alone = len(records) == 1  # a mixed file does not say which member a row belongs to
    return {
        name: _subtract(record, removed if alone else Counter({name: removed[name]}))
        for name, record in records.items()
    }
