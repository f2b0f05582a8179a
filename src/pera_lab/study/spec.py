"""The one description of a study: methods, ranks, rates, tasks and seeds, and the runs that they stand for."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from pera.errors import UserError, nearest
from pera_lab import methods
from pera_lab.recipe import Recipe, apply_override, load_recipe, parse, read_yaml
from pera_lab.sections import Section

Phase = Literal["choose", "report"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

_TRAINING = ("lr_ratio", "weight_decay")  # what a method of a study may set beside its own options
_COMMON = ("target_modules", "dropout", "modules_to_save")  # what of the base recipe's method all methods take

_OWN = {
    "name": "a run is named by its place in the study; leave it out",
    "method": "give options to a method, in grid.method",
    "task.name": "name tasks in grid.task",
    "training.learning_rate": "rates stand in choose.learning_rate",
    "training.seed": "seeds stand in choose.seeds and report.seeds",
    "training.train_share": "shares of the data stand in grid.train_share",
    "training.held_out": "the number of rows stands in choose.rows",
}
"""What a study sets in its recipes by itself, and where it is said."""


def _check_settings(key: str, settings: dict[str, Any]) -> None:
    """Raise ValueError for settings that the study would override, or that would override it."""
    if isinstance(settings.get("task"), str):
        raise ValueError(f"{key}.task={settings['task']!r} is the study's own to set: {_OWN['task.name']}")
    for name, _ in _flat(settings):
        for own, where in _OWN.items():
            if name == own or name.startswith(f"{own}."):
                raise ValueError(f"{key}.{name} is the study's own to set: {where}")


def _check_differ(key: str, seeds: list[int]) -> None:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{key}={seeds} should differ")


def _check_label(key: str, label: Any) -> None:
    if not re.fullmatch(r"[\w.+-]+", str(label)):
        raise ValueError(f"{key}={label!r} names folders; use letters, digits and . _ + - only")


class _Named(Section):
    """A value of the grid. Its name alone stands for it, where nothing else is said."""

    model_config = ConfigDict(extra="allow")

    name: str
    label: str = ""
    """Names it in run folders and tables; by default its name. Give one where a name occurs twice."""

    @model_validator(mode="before")
    @classmethod
    def _label(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            value = {"label": value["name"], **value}
            _check_label("label", value["label"])
        return value

    @property
    def more(self) -> dict[str, Any]:
        """Keys beyond those of this class."""
        return dict(self.model_extra or {})


class StudyTask(_Named):
    """A task; further keys are sections of the recipe that differ for it, such as ``training: {epochs: 3}``."""


class StudyMethod(_Named):
    """A method; further keys are its options, or ``lr_ratio`` and ``weight_decay`` of its parameters' groups."""

    learning_rate: list[Annotated[float, Field(gt=0)]] = Field([])
    """Rates to choose from for this method; by default those of ``choose``."""
    seeds: list[Seed] = Field([])
    """Seeds to report with, paired in order with the others'; by default those of ``report``. LoRA against LoRA with
    other seeds shows what the study takes for a difference where there is none."""

    @property
    def has_rank(self) -> bool:
        """Whether ranks and placements apply to the method."""
        return methods.find_method(self.name).has_rank


def _named_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, dict)) else value


class Grid(Section):
    """What is compared; all combinations."""

    method: Annotated[list[StudyMethod], BeforeValidator(_named_list), Field(min_length=1)]
    task: Annotated[list[StudyTask], BeforeValidator(_named_list), Field(min_length=1)]
    r: list[Annotated[int, Field(ge=1)]] = Field([8])
    placement: dict[str, list[str] | str] = Field({})
    """Target modules by the name of the placement; by default those of the base recipe."""
    train_share: list[Annotated[float, Field(gt=0, le=1)]] = Field([1.0])

    @model_validator(mode="after")
    def _labels_differ(self) -> Grid:
        for key, items in (("method", self.method), ("task", self.task)):
            labels = [item.label for item in items]
            for label in labels:
                if labels.count(label) > 1:
                    raise ValueError(f"{key} {label!r} occurs twice; give each a label of its own")
        for placement in self.placement:
            _check_label("placement", placement)
        return self


class Choose(Section):
    """How the learning rate of each method is chosen: by the loss on training rows that are held out."""

    learning_rate: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)
    seeds: list[Seed] = Field([1], min_length=1)
    rows: int = Field(500, ge=1)
    """Training rows held out; not trained on in this phase."""
    extend: int = Field(0, ge=0)
    """So many further rates are tried where the best lies at an edge, in the ratio of the last two."""


class Reporting(Section):
    """What is trained with the chosen rate, on all training rows, and scored on the test rows."""

    seeds: list[Seed] = Field([42, 43, 44], min_length=1)

    @model_validator(mode="after")
    def _seeds_differ(self) -> Reporting:
        _check_differ("seeds", self.seeds)
        return self


class Study(Section):
    """A study, completely described. :func:`load_study` reads one."""

    name: str
    base: str
    """A recipe: a file, or the name of one that ships with pera."""
    settings: dict[str, Any] = Field({})
    """What differs from that recipe, for every run."""
    grid: Grid
    choose: Choose
    report: Reporting = Reporting()
    against: str = ""
    """Label of the method that the others are compared with; by default the first."""

    @model_validator(mode="after")
    def _check(self) -> Study:
        labels = [method.label for method in self.grid.method]
        if self.against and self.against not in labels:
            raise ValueError(f"against={self.against!r} is no method of the grid; {nearest(self.against, labels)}")
        seeds = len(self.report.seeds)
        for method in self.grid.method:
            if method.seeds and len(method.seeds) != seeds:
                raise ValueError(f"grid.method {method.label}: seeds={method.seeds} should be {seeds}, as in report")
            _check_differ(f"grid.method {method.label}: seeds", method.seeds)
            if "r" in method.more:
                raise ValueError(f"grid.method {method.label}.r is the study's own to set: ranks stand in grid.r")
            if self.grid.placement and "target_modules" in method.more:
                raise ValueError(f"grid.method {method.label}.target_modules: placements stand in grid.placement")
        _check_differ("choose.seeds", self.choose.seeds)
        if self.choose.extend and len(set(self.choose.learning_rate)) < 2:
            raise ValueError(
                f"choose.extend={self.choose.extend} goes on in the ratio of two rates, and choose.learning_rate has "
                "one; give two, or extend: 0"
            )
        _check_settings("settings", self.settings)
        for task in self.grid.task:
            _check_settings(f"grid.task {task.label}", task.more)
        for cell in self.cells():
            Trial(self, cell, "report", 1e-3, 0).recipe()
        return self

    @property
    def reference(self) -> str:
        """Label of the method that the others are compared with."""
        return self.against or self.grid.method[0].label

    def cells(self) -> list[Cell]:
        """All combinations but for rate and seed, by setting; a method without a rank stands once for all ranks and
        placements.

        Raises:
            ValueError: two different ones have one name.
        """
        cells = [
            Cell(task, method, r if method.has_rank else None, placement if method.has_rank else None, share)
            for task in self.grid.task
            for placement in self.grid.placement or [None]
            for r in self.grid.r
            for share in self.grid.train_share
            for method in self.grid.method
        ]
        named: dict[str, Cell] = {}
        for cell in cells:
            if (other := named.setdefault(cell.label, cell)) != cell:
                a, b = (f"task {c.task.label!r} with method {c.method.label!r}" for c in (other, cell))
                raise ValueError(f"grid: {a} and {b} have one name, {cell.label!r}; give one another label")
        return list(named.values())

    def to_yaml(self) -> str:
        """The study with every default filled in."""
        content = self.model_dump(mode="json")
        text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        return text


@dataclass(frozen=True)
class Cell:
    """One method in one setting: what a learning rate is chosen for."""

    task: StudyTask
    method: StudyMethod
    r: int | None
    placement: str | None
    train_share: float

    def __hash__(self) -> int:  # the options of a method may hold lists
        return hash(self.label)

    @property
    def setting(self) -> tuple[str, int | None, str | None, float]:
        """Task, rank, placement and share of the data: what is equal where methods are compared."""
        return self.task.label, self.r, self.placement, self.train_share

    @property
    def label(self) -> str:
        """Task, method and setting, as in the names of runs."""
        parts = [self.task.label, self.method.label, *([f"r{self.r}"] if self.r else [])]
        parts += [self.placement] if self.placement else []
        return "-".join([*parts, *([f"share{_digits(self.train_share)}"] if self.train_share < 1 else [])])


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    study: Study
    cell: Cell
    phase: Phase
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's folder; the same whatever else the study holds."""
        return f"{self.cell.label}-{self.phase}-lr{_digits(self.learning_rate)}-seed{self.seed}"

    def recipe(self) -> Recipe:
        """The recipe of the run.

        Raises:
            UserError: the study asks for something that no run can have.
        """
        study, cell, method = self.study, self.cell, self.cell.method
        options = {key: value for key, value in method.more.items() if key not in _TRAINING}
        setting = [("task", cell.task.name), *_flat(study.settings), *_flat(cell.task.more)]
        common = _common_options(study.base, _overrides(setting)) if method.has_rank else {}
        if cell.placement is not None:
            common["target_modules"] = study.grid.placement[cell.placement]
        changes = [
            *setting,
            ("training.train_share", cell.train_share),
            *([("training.held_out", study.choose.rows)] if self.phase == "choose" else []),
            ("method", {"name": method.name, **({"r": cell.r} if cell.r else {}), **common, **options}),
            *((f"training.{key}", method.more[key]) for key in _TRAINING if key in method.more),
            ("training.learning_rate", self.learning_rate),
            ("training.seed", self.seed),
            ("name", self.name),
        ]
        try:
            return load_recipe(study.base, list(_overrides(changes)))
        except UserError as error:
            raise UserError(f"study: {self.cell.label}: {error}") from error


def load_study(source: str, overrides: list[str] | None = None) -> Study:
    """Read a study.

    Args:
        source: path of a YAML file, or the name of a study that ships with pera.
        overrides: ``key.subkey=value`` each; a key that is not one of a study's is one of its recipes', so
            ``training.epochs=1`` is short for ``settings.training.epochs=1``.

    Raises:
        UserError: no such study, not YAML, an unknown key (the nearest known one is named), a value that does
            not fit, or a combination that makes no recipe.
    """
    name, content = read_yaml(source, "study", "studies")
    for override in overrides or []:
        own = override.partition("=")[0].partition(".")[0] in Study.model_fields
        apply_override(content, override if own else f"settings.{override}")
    base = content.get("base")
    if isinstance(base, str) and os.path.isfile(base):  # holds from every working folder
        content["base"] = os.path.abspath(base)
    return parse(Study, {"name": name, **content}, "study")


def _digits(value: float) -> str:
    """A number in a name: short where that reads back as the same number, else all its digits."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as pairs of a dotted key and a value."""
    pairs: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _overrides(changes: list[tuple[str, Any]]) -> tuple[str, ...]:
    """Pairs of a key and a value as a recipe's overrides; what JSON has no form for, such as a date, as text."""
    return tuple(f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in changes)


def _common_options(base: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The options of the base recipe's method that all methods take."""
    method = _base_method(base, overrides)
    own_words = methods.find_method(method["name"]).words
    found = {word: method.get(own_words.get(word, word), method.get(word)) for word in _COMMON}
    return {word: value for word, value in found.items() if value is not None}


@lru_cache
def _base_method(base: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    return load_recipe(base, list(overrides)).method
