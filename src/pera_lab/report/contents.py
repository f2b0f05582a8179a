"""The parts of a run folder that a report shows. A missing part is a sentence and the command that makes it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from pera.errors import UserError, one_line
from pera.tuner import PeraConfig
from pera_lab.convert.verify import Agreement
from pera_lab.diagnose import Effects, Fullness, Layer, diagnose_adapter, place_layers
from pera_lab.evaluation import read_predictions
from pera_lab.files import checked, number_or_nan, read_as
from pera_lab.runs import Run
from pera_lab.scorers import Prediction, Score
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
"""The command that makes each part of a run folder."""


@dataclass(frozen=True)
class Missing:
    """A part that is not there, with the reason and the command that makes it."""

    reason: str
    command: str = ""


@dataclass(frozen=True)
class Change:
    """The answers of both models to one problem."""

    base: Prediction
    tuned: Prediction

    @property
    def transition(self) -> str:
        """One of "newly right", "newly wrong", "still right" and "still wrong"."""
        word = "newly" if self.base.correct != self.tuned.correct else "still"
        return f"{word} {'right' if self.tuned.correct else 'wrong'}"


@dataclass(frozen=True)
class Metrics:
    """The lines that training logged."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    def series(self, key: str) -> list[float]:
        """Return one value per line; NaN where it is missing."""
        return [number_or_nan(line.get(key)) for line in self.lines]

    @property
    def steps(self) -> list[int]:
        """The step of each line."""
        return [line["step"] for line in self.lines]

    @property
    def last_loss(self) -> float | None:
        """The last loss, or None."""
        return self.series("loss")[-1] if self.lines else None

    @property
    def ratios(self) -> list[tuple[int, dict[str, float]]]:
        """Step and high-order ratio by kind of module, for the lines that have them."""
        return self._by_kind("high_order_ratio")

    @property
    def anchor_ratios(self) -> list[tuple[int, dict[str, float]]]:
        """Step and ratio of the anchors by kind of module, for the lines that have them."""
        return self._by_kind("anchor_ratio")

    def _by_kind(self, key: str) -> list[tuple[int, dict[str, float]]]:
        recorded = [(line["step"], line.get(key)) for line in self.lines]
        return [(s, {str(k): number_or_nan(v) for k, v in r.items()}) for s, r in recorded if isinstance(r, dict) and r]


class Contents:
    """A run folder. Each part is read on first use and is either its content or a :class:`Missing`.

    Raises:
        UserError: the recipe, the only required part, cannot be read.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.recipe = run.recipe
        self.name = run.path.resolve().name

    @cached_property
    def metrics(self) -> Metrics | Missing:
        """The lines that training logged."""
        try:
            lines = self.run.metrics()
        except (OSError, ValueError) as error:
            return Missing(f"metrics.jsonl cannot be read: {one_line(error).rstrip('.')}.")
        if not lines:
            return self._missing("metrics.jsonl has no logged steps.", "" if self.trained else "adapter")
        return Metrics(lines)

    @cached_property
    def validation(self) -> Metrics | Missing | None:
        """The losses and metrics on the validation rows; None if there are none."""
        try:
            lines = self.run.validation()
        except (OSError, ValueError) as error:
            return Missing(f"validation.jsonl cannot be read: {one_line(error).rstrip('.')}.")
        return Metrics(lines) if lines else None

    @cached_property
    def is_pera(self) -> bool:
        """Whether the method of the recipe is PERA."""
        return isinstance(self.recipe.peft_config(), PeraConfig)

    @property
    def trained(self) -> bool:
        """Whether training has finished."""
        return self.run.finished

    @cached_property
    def scores(self) -> dict[str, Score | Missing]:
        """The scores of "base" and "adapter"."""
        file = self.run.scores_file
        content = self._read(file, dict[str, Any], "") if file.is_file() else {}
        scores: dict[str, Score | Missing] = {}
        for which, what in {"base": "base model", "adapter": "adapter"}.items():
            command = f"scores of the {what}"
            if isinstance(content, Missing):
                scores[which] = self._missing(content.reason, command)
            elif which == "base" and (reason := self.recipe.task.base_refusal):
                scores[which] = Missing(reason)
            elif which not in content:
                scores[which] = self._missing(f"The {what} has not been scored.", command)
            else:
                name = f"{str(file)!r} ({which})"
                scores[which] = self._found(partial(checked, content[which], Score, name), command)
        return scores

    def score(self, which: str) -> Score | None:
        """Return the score of "base" or "adapter", or None."""
        found = self.scores[which]
        return found if isinstance(found, Score) else None

    @cached_property
    def predictions(self) -> dict[str, list[Prediction] | Missing]:
        """The answers of "base" and "adapter"."""
        return {which: self._predictions(which) for which in ("base", "adapter")}

    @cached_property
    def changes(self) -> list[Change] | Missing:
        """The problems that both models have answered."""
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
        """The diagnosis of each adapted layer, from its factors."""
        if not self.trained:
            return self._missing("Training has not finished, so there is no adapter yet.", "adapter")
        try:
            return place_layers(diagnose_adapter(self.run.adapter))
        except UserError as error:
            return Missing(str(error))

    @cached_property
    def parameters(self) -> int | None:
        """Number of trained values in the weights file of the adapter, including a classification head."""
        try:
            return sum(self.run.adapter.sizes.values())
        except UserError:
            return None

    @cached_property
    def effects(self) -> Effects | Missing:
        """The effect of the high-order terms on the loss."""
        if not self.is_pera:
            return Missing("The adapter is not a PERA adapter, so it has no high-order terms.")
        return self._measured("The effect of the high-order terms has not been measured.")

    @cached_property
    def fullness(self) -> Fullness | Missing:
        """The rank that the adapter needs and the bits that it learned."""
        if self.trained and isinstance(self.layers, Missing):
            return self.layers
        reason = "The loss at lower ranks has not been measured."
        found = self._measured(reason)
        return found if isinstance(found, Missing) else found.fullness or self._missing(reason, "effect")

    def _measured(self, reason: str) -> Effects | Missing:
        if not self.trained:
            return self._missing("Training has not finished, so there is no adapter to measure yet.", "adapter")
        if not self.run.effect_file.is_file():
            return self._missing(reason, "effect")
        return self._read(self.run.effect_file, Effects, "effect")

    @cached_property
    def cost(self) -> TrainingSummary | Missing:
        """Time, tokens and memory of the training."""
        file = self.run.cost_file
        if not self.trained:
            return self._missing("Training has not finished; its cost is recorded at the end.", "adapter")
        if not file.is_file():
            return Missing("There is no cost.json, so the cost of this training is unknown; pera train writes it.")
        return self._read(file, TrainingSummary, "")

    @cached_property
    def verifications(self) -> dict[str, Agreement | Missing]:
        """How well the merged model, the LoRA and other exports agree with the adapter, by folder."""
        found: dict[str, Agreement | Missing] = {
            "merged": self._missing("The adapter has not been merged into its base model.", "merged"),
        }
        if self.is_pera:
            found["lora"] = self._missing("The adapter has not been exported as a LoRA.", "lora")
        for file in sorted(self.run.path.glob("*/verification.json")):
            found[file.parent.name] = self._read(file, Agreement, file.parent.name)
        return found

    @cached_property
    def environment(self) -> dict[str, Any] | Missing:
        """Versions, hardware, seed and base model."""
        file = self.run.environment_file
        if not file.is_file():
            return Missing("There is no environment.json; pera train writes it at the start.")
        found = self._read(file, dict[str, Any], "")
        if not isinstance(found, Missing) and isinstance(found.get("command"), list):
            return {**found, "command": shlex.join(map(str, found["command"]))}
        return found

    def _predictions(self, which: str) -> list[Prediction] | Missing:
        what = "base model" if which == "base" else "adapter"
        file, command = self.run.predictions / f"{which}.jsonl", f"scores of the {what}"
        if not file.is_file():
            return self._missing(f"There are no answers of the {what}.", command)
        return self._found(partial(read_predictions, file), command)

    def _read(self, file: Path, kind: type[T], command: str) -> T | Missing:
        return self._found(partial(read_as, file, kind), command)

    def _found(self, read: Callable[[], T], command: str) -> T | Missing:
        try:
            return read()
        except UserError as error:
            return self._missing(str(error), command)

    def _missing(self, reason: str, makes: str) -> Missing:
        if makes and not self.trained:  # every other part needs a trained adapter
            makes = "adapter"
        return Missing(reason, COMMANDS.get(makes, "").format(run=shlex.quote(str(self.run.path))))
