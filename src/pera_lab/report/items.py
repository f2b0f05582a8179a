"""What the sections of a study's page are made of."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import Any

from pera_lab.intervals import mean
from pera_lab.study.folder import StudyFolder
from pera_lab.study.results import Results, Setting
from pera_lab.study.spec import HELD_OUT, Cell


@dataclass(frozen=True)
class Item:
    """One element of a section: "verdict", "warning", "text", "note", "heading", "table", "picture" or "details"."""

    kind: str
    content: Any
    label: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    id: str
    title: str
    items: list[Item]


def setting_label(setting: Setting) -> str:
    """Format a setting, such as "r = 4, all, 10 % of the data"."""
    r, placement, share = setting
    parts = [f"r = {r}" if r else "", placement or "", f"{100 * share:g} % of the data" if share < 1 else ""]
    return ", ".join(filter(None, parts)) or "all"


def chosen_by(results: Results) -> str:
    """Name the loss by which learning rates are chosen."""
    tasks = {task.recalls: task for task in results.study.grid.task}
    held_out = f"loss on {results.study.choose.rows or HELD_OUT} rows held out of the training set"
    other = "loss on the trained facts, which differ from the reported facts"
    if len(tasks) == 2:
        return f"{held_out}, or for {tasks[True].label} {other}"
    return other if True in tasks else held_out


def mean_over_tasks(results: Results, cells: list[Cell]) -> float:
    """Mean score of the cells; NaN if one was not scored or a run diverged, since lucky seeds must not stand for it."""
    if any(map(results.num_diverged, cells)):
        return math.nan
    means = [results.mean(cell).mean for cell in cells if results.mean(cell).n]
    return mean(means) if means and len(means) == len(cells) else math.nan


def run_command(folder: StudyFolder) -> str:
    """The command that runs the remaining runs of a study."""
    file, output = (shlex.quote(str(path)) for path in (folder.study_file, folder.path))
    return f"pera study run {file} --output {output}"
