"""The description of a study, read from YAML: its grid, its cells and their trials.

A cell is one method in one setting. A trial is one run of a cell, with its own recipe.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from pera.errors import UserError, nearest
from pera_lab.methods import find_method
from pera_lab.recipe import Recipe, apply_overrides, load_recipe, parse, read_yaml, write, write_value
from pera_lab.sections import Section, flatten, one_message
from pera_lab.tasks import family_of

Phase = Literal["choose", "report"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rank = Annotated[int, Field(ge=1)]

HELD_OUT = 500
"""Default number of training rows that are held out to choose a learning rate."""

_TRAINING_OPTIONS = ("lr_ratio", "weight_decay")
"""Options of ``training`` that a method of the grid may set."""

_COMMON_OPTIONS = ("target_modules", "dropout", "modules_to_save")
"""Options of the base recipe's method that all methods take over."""

_RESERVED = {
    "name": "each run gets its own name; leave it out",
    "method": "set options of a method in grid.method",
    "task.name": "set tasks in grid.task",
    "training.learning_rate": "set rates in choose.learning_rate",
    "training.seed": "set seeds in choose.seeds and report.seeds",
    "training.train_share": "set shares of the data in grid.train_share",
    "training.held_out": "set the number of rows in choose.rows",
}
"""Keys of its recipes that a study sets, and where the user sets them instead."""


def _check_reserved(key: str, settings: dict[str, Any]) -> None:
    """Raise ValueError if ``settings`` hold a key that the study sets."""
    if isinstance(settings.get("task"), str):
        raise ValueError(f"{key}.task={settings['task']!r} cannot be set here; {_RESERVED['task.name']}")
    for name in flatten(settings):
        for reserved, remedy in _RESERVED.items():
            if name == reserved or name.startswith(f"{reserved}."):
                raise ValueError(f"{key}.{name} cannot be set here; {remedy}")


def _check_distinct(key: str, seeds: list[int]) -> None:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{key}={seeds} should be distinct")


def _check_label(key: str, label: Any) -> None:
    if not re.fullmatch(r"[\w.+-]+", str(label)):
        raise ValueError(f"{key}={label!r} is part of folder names; use only letters, digits and . _ + -")


class _Named(Section):
    """A value of the grid: a name alone, or a mapping with further keys."""

    model_config = ConfigDict(extra="allow")

    name: str
    label: str = ""
    """The name in run folders and tables (default: ``name``). It is needed if a name occurs twice."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_label(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            value = {"label": value["name"], **value}
            _check_label("label", value["label"])
        return value

    @property
    def more(self) -> dict[str, Any]:
        """The further keys."""
        return dict(self.model_extra or {})


class StudyTask(_Named):
    """A task. Further keys are sections of its recipes, such as ``training: {epochs: 3}``."""

    @property
    def recalls(self) -> bool:
        """Whether the test rows are the training rows. Each seed then draws other rows.

        Raises:
            UserError: the task is not known.
        """
        return family_of(self.name).recalls


class StudyMethod(_Named):
    """A method. Further keys are its options, or ``lr_ratio`` and ``weight_decay`` of its parameter groups."""

    learning_rate: list[Annotated[float, Field(gt=0)]] = Field([])
    """Learning rates to try for this method (default: ``choose.learning_rate``)."""
    r: list[Rank] = Field([])
    """Ranks of this method (default: ``grid.r``). A LoRA at more ranks shows which rank equals another method."""
    seeds: list[Seed] = Field([])
    """Seeds to report, paired in order with the seeds of the other methods (default: ``report.seeds``). LoRA against
    LoRA with other seeds shows the size of a difference by chance."""

    @property
    def has_rank(self) -> bool:
        """Whether ranks and placements apply to the method."""
        return find_method(self.name).has_rank


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, dict)) else value


class Grid(Section):
    """What is compared. The study runs all combinations."""

    method: Annotated[list[StudyMethod], BeforeValidator(_as_list), Field(min_length=1)]
    task: Annotated[list[StudyTask], BeforeValidator(_as_list), Field(min_length=1)]
    r: list[Rank] = Field([8])
    placement: dict[str, Annotated[list[str] | str, one_message("Input should be a list of names, or all-linear")]] = (
        Field({})
    )
    """Target modules by name of the placement (default: the base recipe's)."""
    train_share: list[Annotated[float, Field(gt=0, le=1)]] = Field([1.0])

    @model_validator(mode="after")
    def _check_labels(self) -> Grid:
        for key, items in (("method", self.method), ("task", self.task)):
            labels = [item.label for item in items]
            for label in labels:
                if labels.count(label) > 1:
                    raise ValueError(f"{key} {label!r} occurs twice; give each occurrence its own label")
        for placement in self.placement:
            _check_label("placement", placement)
        return self


class Choose(Section):
    """How the learning rate of each method is chosen: by its loss on held-out training rows, or for a task that recalls
    its training rows by its loss on other rows than the reported ones."""

    learning_rate: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)
    seeds: list[Seed] = Field([1], min_length=1)
    rows: int | None = Field(None, ge=1)
    """Number of held-out training rows (default: 500). In this phase they are not trained on. A task that recalls its
    training rows has none."""
    extend: int = Field(0, ge=0)
    """How many further rates are tried while the best rate lies at an edge, in the ratio of the last two."""


class Reporting(Section):
    """The seeds that are trained with the chosen rate on all training rows, and scored on the test rows."""

    seeds: list[Seed] = Field([42, 43, 44], min_length=1)
    """For a task that recalls its training rows, each seed also draws its own rows."""

    @model_validator(mode="after")
    def _check_seeds(self) -> Reporting:
        _check_distinct("seeds", self.seeds)
        return self


class Resources(Section):
    """What a run may use. It changes how fast a study runs, not what it computes."""

    cpus: int | None = Field(None, ge=1)
    """Threads (default: one on a Ray cluster, else the threads of this machine divided by the workers)."""
    gpus: float | None = Field(None, ge=0, le=1)
    """GPUs. Two runs share a GPU with 0.5, and a run uses none with 0 (default: one if there is one)."""

    @model_validator(mode="after")
    def _check_share(self) -> Resources:
        if self.gpus and self.gpus < 0.01:
            raise ValueError(f"gpus={self.gpus:g} should be 0 or at least 0.01")
        return self


class Study(Section):
    """A complete description of a study. :func:`load_study` reads one."""

    name: str
    base: str
    """A recipe: a file, or the name of a shipped recipe."""
    settings: dict[str, Any] = Field({})
    """Changes to that recipe, for every run."""
    grid: Grid
    choose: Choose
    report: Reporting = Reporting()
    resources: Resources = Resources()
    against: str = ""
    """Label of the reference method (default: the first method)."""

    @model_validator(mode="after")
    def _check(self) -> Study:
        labels = [method.label for method in self.grid.method]
        if self.against and self.against not in labels:
            raise ValueError(f"against={self.against!r} is not a method of the grid; {nearest(self.against, labels)}")
        for method in self.grid.method:
            self._check_method(f"grid.method {method.label}", method)
        _check_distinct("choose.seeds", self.choose.seeds)
        if self.choose.extend and len(set(self.choose.learning_rate)) < 2:
            raise ValueError(
                f"choose.extend={self.choose.extend} needs the ratio of two rates, but choose.learning_rate has one; "
                "give two rates or extend: 0"
            )
        _check_reserved("settings", self.settings)
        for task in self.grid.task:
            _check_reserved(f"grid.task {task.label}", task.more)
        self._check_drawn_rows()
        return self

    def _check_drawn_rows(self) -> None:
        """Check every recipe, and that a task which recalls its training rows draws other rows for other seeds."""
        recalling = set()
        for cell in self.cells():
            task, label = Trial(self, cell, "report", 1e-3, 0).recipe().task, f"grid.task {cell.task.label}"
            if not cell.task.recalls:
                continue
            recalling.add(cell.task.label)
            if "task.seed" in flatten(self.settings) or "task.seed" in flatten(cell.task.more):
                raise ValueError(f"{label}: task.seed cannot be set; each run draws its facts from its own seed")
            if not task.drawn_by_seed:
                raise ValueError(
                    f"{label}: its rows come from data, so rates would be chosen on the reported facts; a study needs "
                    "generated facts, such as task phonebook without data"
                )
            if cell.method.seeds:
                raise ValueError(
                    f"grid.method {cell.method.label}: seeds={cell.method.seeds} would compare other facts, because "
                    f"the facts of task {cell.task.label!r} follow the seed; leave seeds out"
                )
        if recalling and (both := set(self.choose.seeds) & set(self.report.seeds)):
            raise ValueError(
                f"choose.seeds and report.seeds share {min(both)}, so a rate would be chosen on reported facts; give "
                "other seeds"
            )
        if self.choose.rows is not None and len(recalling) == len(self.grid.task):
            raise ValueError(
                f"choose.rows={self.choose.rows} has no effect, because every task is tested on its training rows; "
                "leave it out"
            )

    def _check_method(self, key: str, method: StudyMethod) -> None:
        n = len(self.report.seeds)
        if method.seeds and len(method.seeds) != n:
            raise ValueError(f"{key}: seeds={method.seeds} should be {n} seeds, as in report.seeds")
        _check_distinct(f"{key}: seeds", method.seeds)
        if method.r and not method.has_rank:
            raise ValueError(f"{key}: r={method.r} has no effect, because the method has no rank; leave it out")
        if len(set(method.r)) < len(method.r):
            raise ValueError(f"{key}: r={method.r} should be distinct")
        if self.grid.placement and "target_modules" in method.more:
            raise ValueError(f"{key}.target_modules cannot be set with grid.placement; set targets there")

    @property
    def reference(self) -> str:
        """Label of the method that the others are compared with."""
        return self.against or self.grid.method[0].label

    def cells(self) -> list[Cell]:
        """All methods in all settings. A method without a rank has one cell for all ranks and placements.

        Raises:
            ValueError: two different cells have the same name.
        """
        own = [r for method in self.grid.method for r in method.r]
        cells = [
            Cell(task, method, r if method.has_rank else None, placement if method.has_rank else None, share)
            for task in self.grid.task
            for placement in self.grid.placement or [None]
            for r in dict.fromkeys([*self.grid.r, *own])
            for share in self.grid.train_share
            for method in self.grid.method
            if r in (method.r or self.grid.r)
        ]
        named: dict[str, Cell] = {}
        for cell in cells:
            if (other := named.setdefault(cell.label, cell)) != cell:
                a, b = (f"task {c.task.label!r} with method {c.method.label!r}" for c in (other, cell))
                raise ValueError(f"grid: {a} and {b} are both named {cell.label!r}; change a label")
        return list(named.values())

    def report_seeds(self, cell: Cell) -> list[int]:
        """The seeds that are reported for a cell."""
        return cell.method.seeds or self.report.seeds

    def to_yaml(self) -> str:
        """The study as YAML, with all defaults filled in."""
        return write(self.model_dump(mode="json"))


@dataclass(frozen=True)
class Cell:
    """One method in one setting. A learning rate is chosen for each cell."""

    task: StudyTask
    method: StudyMethod
    r: int | None
    placement: str | None
    train_share: float

    def __hash__(self) -> int:  # the options of a method may hold lists
        return hash(self.label)

    @property
    def setting(self) -> tuple[str, int | None, str | None, float]:
        """Task, rank, placement and share of the data. Methods are compared within a setting."""
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
        """The name of the run folder. It does not depend on the rest of the study."""
        return f"{self.cell.label}-{self.phase}-lr{_digits(self.learning_rate)}-seed{self.seed}"

    def recipe(self) -> Recipe:
        """The recipe of the run.

        Raises:
            UserError: the settings of the study make no valid recipe.
        """
        study, cell, method = self.study, self.cell, self.cell.method
        options = {key: value for key, value in method.more.items() if key not in _TRAINING_OPTIONS}
        setting = [("task", cell.task.name), *flatten(study.settings).items(), *flatten(cell.task.more).items()]
        common = _common_options(study.base, _overrides(setting)) if method.has_rank else {}
        if cell.placement is not None:
            common["target_modules"] = study.grid.placement[cell.placement]
        held_out = [("training.held_out", study.choose.rows or HELD_OUT)] if self.phase == "choose" else []
        changes = [
            *setting,
            ("training.train_share", cell.train_share),
            *([("task.seed", self.seed)] if cell.task.recalls else held_out),
            ("method", {"name": method.name, **({"r": cell.r} if cell.r else {}), **common, **options}),
            *((f"training.{key}", method.more[key]) for key in _TRAINING_OPTIONS if key in method.more),
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
        source: path of a YAML file, or the name of a shipped study.
        overrides: items of the form ``key.subkey=value``. If the first key is not a key of a study, it belongs to its
            recipes: ``training.epochs=1`` is short for ``settings.training.epochs=1``.

    Raises:
        UserError: the study does not exist, is not YAML, has an unknown key or an invalid value, or makes no recipe.
    """
    name, content = read_yaml(source, "study", "studies")
    own = {override: re.split("[.=]", override)[0] in Study.model_fields for override in overrides or []}
    apply_overrides(content, [override if own[override] else f"settings.{override}" for override in overrides or []])
    base = content.get("base")
    if isinstance(base, str) and os.path.isfile(base):  # valid in every working directory
        content["base"] = os.path.abspath(base)
    return parse(Study, {"name": name, **content}, "study")


def _digits(value: float) -> str:
    """A number in a name: short if the short form reads back as the same number, else with all digits."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _overrides(changes: list[tuple[str, Any]]) -> tuple[str, ...]:
    """Pairs of a key and a value as overrides of a recipe."""
    return tuple(f"{key}={write_value(value)}" for key, value in changes)


def _common_options(base: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The options of the base recipe's method that all methods take over."""
    method = _base_method(base, overrides)
    aliases = find_method(method["name"]).aliases
    found = {name: method.get(aliases.get(name, name), method.get(name)) for name in _COMMON_OPTIONS}
    return {name: value for name, value in found.items() if value is not None}


@lru_cache
def _base_method(base: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    return load_recipe(base, list(overrides)).method
