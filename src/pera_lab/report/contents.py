"""What a report finds in a run folder. Whatever is not there is a sentence, and the command that makes it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from pera.errors import UserError
from pera.tuner import PeraConfig
from pera_lab.convert.verify import Agreement
from pera_lab.diagnose import Effects, Layer, diagnose_adapter, place_layers
from pera_lab.evaluation import Prediction, Score, read_predictions
from pera_lab.files import checked, read_as
from pera_lab.runs import Run
from pera_lab.training import TrainingSummary

T = TypeVar("T")

COMMANDS = {
    "adapter": "pera train {run} --resume",
    "scores of the base model": "pera evaluate {run} --base",
    "scores of the adapter": "pera evaluate {run}",
    "effect": "pera inspect {run} --effect",
    "merged": "pera merge {run} --output {run}/merged",
    "lora": "pera export {run} --to lora --output {run}/lora",
}
"""What makes each part of a run folder."""


@dataclass(frozen=True)
class Missing:
    """A part that is not there: why, and the command that makes it."""

    reason: str
    command: str = ""


@dataclass(frozen=True)
class ScoreOf(Score):
    """A score and how the answers were judged."""

    scorer: str = ""


@dataclass(frozen=True)
class Change:
    """One problem, answered by both models."""

    base: Prediction
    tuned: Prediction

    @property
    def transition(self) -> str:
        """Newly right, newly wrong, still right or still wrong."""
        word = "newly" if self.base.correct != self.tuned.correct else "still"
        return f"{word} {'right' if self.tuned.correct else 'wrong'}"


@dataclass(frozen=True)
class Metrics:
    """The logged lines of a training."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    def series(self, key: str) -> list[float]:
        """One value for each line; NaN where it is missing."""
        return [number_or_nan(line.get(key)) for line in self.lines]

    @property
    def steps(self) -> list[int]:
        """The step of each line."""
        return [line["step"] for line in self.lines]

    @property
    def last_loss(self) -> float | None:
        """The last loss, if there is one."""
        return self.series("loss")[-1] if self.lines else None

    @property
    def ratios(self) -> list[tuple[int, dict[str, float]]]:
        """Step and high-order ratio by kind of module, where they were recorded."""
        recorded = [(line["step"], line.get("high_order_ratio")) for line in self.lines]
        return [(s, {str(k): number_or_nan(v) for k, v in r.items()}) for s, r in recorded if isinstance(r, dict) and r]


class Contents:
    """A run folder, read part by part; each part is the thing itself or a :class:`Missing`.

    Raises:
        UserError: the recipe, the one part that must be there, cannot be read.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.recipe = run.recipe
        self.name = run.path.resolve().name

    @cached_property
    def metrics(self) -> Metrics | Missing:
        """The logged training."""
        try:
            lines = self.run.metrics()
        except (OSError, ValueError) as error:
            return Missing(f"metrics.jsonl cannot be read: {_line(error)}.")
        steps = [x for x in lines if isinstance(x, dict) and isinstance(x.get("step"), int)]
        if not steps:
            return self._missing("Nothing was logged in metrics.jsonl.", "" if self.trained else "adapter")
        return Metrics(steps)

    @cached_property
    def is_pera(self) -> bool:
        """Whether the recipe asks for PERA."""
        return isinstance(self.recipe.peft_config(), PeraConfig)

    @property
    def trained(self) -> bool:
        """Whether training has ended."""
        return self.run.finished

    @cached_property
    def scores(self) -> dict[str, ScoreOf | Missing]:
        """The scores of "base" and "adapter"."""
        file = self.run.scores_file
        content = self._read(file, dict[str, Any], "") if file.is_file() else {}
        scores: dict[str, ScoreOf | Missing] = {}
        for which, what in {"base": "base model", "adapter": "adapter"}.items():
            command = f"scores of the {what}"
            if isinstance(content, Missing):
                scores[which] = self._missing(content.reason, command)
            elif which == "base" and self.recipe.task_type != "CAUSAL_LM":
                scores[which] = Missing("The base model has no trained head, so there is no score of it.")
            elif which not in content:
                scores[which] = self._missing(f"The {what} has not been scored.", command)
            else:
                name = f"{str(file)!r} ({which})"
                scores[which] = self._found(partial(checked, content[which], ScoreOf, name), command)
        return scores

    def score(self, which: str) -> ScoreOf | None:
        """The score of "base" or "adapter", if there is one."""
        found = self.scores[which]
        return found if isinstance(found, ScoreOf) else None

    @cached_property
    def predictions(self) -> dict[str, list[Prediction] | Missing]:
        """The answers of "base" and "adapter"."""
        return {which: self._predictions(which) for which in ("base", "adapter")}

    @cached_property
    def changes(self) -> list[Change] | Missing:
        """The problems that both models answered."""
        base, tuned = self.predictions["base"], self.predictions["adapter"]
        if isinstance(base, Missing):
            return base
        if isinstance(tuned, Missing):
            return tuned
        known = {(p.prompt, p.expected): p for p in base}
        changes = [Change(known[p.prompt, p.expected], p) for p in tuned if (p.prompt, p.expected) in known]
        return changes or self._missing("The two models answered different problems.", "scores of the base model")

    @cached_property
    def layers(self) -> list[Layer] | Missing:
        """The adapted layers, diagnosed from their factors."""
        if not self.trained:
            return self._missing("Training has not ended, so there is no adapter yet.", "adapter")
        try:
            return place_layers(diagnose_adapter(self.run.adapter))
        except UserError as error:
            return Missing(str(error))

    @cached_property
    def parameters(self) -> int | None:
        """Number of trained values in the adapter's weights file, those of a head included."""
        try:
            return sum(self.run.adapter.sizes.values())
        except UserError:
            return None

    @cached_property
    def effects(self) -> Effects | Missing:
        """What the high-order terms do."""
        file = self.run.effect_file
        if not self.is_pera:
            return Missing("The adapter is not a PERA adapter; it has no high-order terms.")
        if not self.trained:
            return self._missing("Training has not ended, so nothing can be taken out of the adapter yet.", "adapter")
        if not file.is_file():
            return self._missing("The effect of the high-order terms has not been measured.", "effect")
        return self._read(file, Effects, "effect")

    @cached_property
    def cost(self) -> TrainingSummary | Missing:
        """What the training took."""
        file = self.run.cost_file
        if not self.trained:
            return self._missing("Training has not ended; its cost is recorded when it does.", "adapter")
        if not file.is_file():
            return Missing("There is no cost.json, so the cost of this training is not known; pera train records it.")
        return self._read(file, TrainingSummary, "")

    @cached_property
    def verifications(self) -> dict[str, Agreement | Missing]:
        """How far the merged model, the LoRA and other forms of the adapter agree with it, by folder."""
        found: dict[str, Agreement | Missing] = {
            "merged": self._missing("The adapter has not been merged into its base model here.", "merged"),
        }
        if self.is_pera:
            found["lora"] = self._missing("The adapter has not been exported as a LoRA here.", "lora")
        for file in sorted(self.run.path.glob("*/verification.json")):
            found[file.parent.name] = self._read(file, Agreement, file.parent.name)
        return found

    @cached_property
    def environment(self) -> dict[str, Any] | Missing:
        """Versions, hardware, seed and base model."""
        file = self.run.environment_file
        if not file.is_file():
            return Missing("There is no environment.json; pera train writes it when it starts.")
        found = self._read(file, dict[str, Any], "")
        if not isinstance(found, Missing) and isinstance(found.get("command"), list):
            return {**found, "command": shlex.join(map(str, found["command"]))}
        return found

    def _predictions(self, which: str) -> list[Prediction] | Missing:
        what = "base model" if which == "base" else "adapter"
        file, command = self.run.predictions / f"{which}.jsonl", f"scores of the {what}"
        if not file.is_file():
            return self._missing(f"The answers of the {what} are not there.", command)
        return self._found(partial(read_predictions, file), command)

    def _read(self, file: Path, kind: type[T], command: str) -> T | Missing:
        return self._found(partial(read_as, file, kind), command)

    def _found(self, read: Callable[[], T], command: str) -> T | Missing:
        try:
            return read()
        except UserError as error:
            return self._missing(str(error), command)

    def _missing(self, reason: str, makes: str) -> Missing:
        if makes and not self.trained:  # nothing can be made of a run before its training has ended
            makes = "adapter"
        return Missing(reason, COMMANDS.get(makes, "").format(run=shlex.quote(str(self.run.path))))


def number_or_nan(value: Any) -> float:
    """The value if it is a number, else NaN."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
