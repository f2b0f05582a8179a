"""What every task gives: examples to train on, held-out examples, and a score for an answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


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
