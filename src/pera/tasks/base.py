"""What every task gives: examples to train on, held-out examples, and a score for an answer."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pera.errors import UserError


@dataclass(frozen=True)
class Example:
    """One problem: what the user says, what the model should answer, and what its scorer needs to know."""

    prompt: str
    answer: str
    data: dict[str, Any] = field(default_factory=dict, compare=False)


class Task(Protocol):
    """A task as training and evaluation see it."""

    name: str
    train: list[Example]
    test: list[Example]

    def score(self, example: Example, output: str) -> float:
        """Between 0 (wrong) and 1 (right)."""
        ...


T = TypeVar("T", bound=Task)


def divided(task: T, *, share: float = 1.0, held_out: int = 0) -> T:
    """The task with other examples: ``held_out`` rows of its training set in the place of its test rows, so that
    settings can be chosen without a look at those, and ``share`` of the other rows to train on.

    Which rows they are depends on the task alone, and a smaller share is part of a larger one.

    Raises:
        UserError: too few training rows.
    """
    rows = random.Random(0).sample(range(len(task.train)), len(task.train))
    if held_out >= len(rows):
        raise UserError(f"task.held_out={held_out} leaves nothing of the {len(rows)} training rows of {task.name}.")
    chosen = copy.copy(task)
    rest = rows[held_out:]
    kept = rest[: max(1, round(share * len(rest)))]
    chosen.train = [task.train[i] for i in sorted(kept)]
    if held_out:
        chosen.test = [task.train[i] for i in sorted(rows[:held_out])]
    return chosen
