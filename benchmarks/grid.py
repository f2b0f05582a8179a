"""Resumable trainings, their loop, and the choice of a learning rate, for memory.py and ordinary.py."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import peft
import torch
from torch import Tensor

Result = dict[str, Any]
R = TypeVar("R")


def name(run: Any) -> str:
    """Two runs with equal fields are the same training."""
    return json.dumps(asdict(run), sort_keys=True)


def fit(
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    steps: int,
    loss_of: Callable[[Any], Tensor],
    watch: Callable[[int, float], None],
) -> None:
    """Train with a cosine schedule over ``steps`` batches, or until the loss is not finite.

    ``watch`` is called before each step with the number of steps done and the loss of the batch.
    """
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, batch in enumerate(batches):
        loss = loss_of(batch)
        watch(step, loss.item())
        if not math.isfinite(loss.item()):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def minibatches(count: int, size: int, steps: int) -> Iterator[Tensor]:
    """Indices of ``steps`` batches of at most ``size`` of ``count`` rows, in a new random order each epoch."""
    done = 0
    while True:
        for rows in torch.randperm(count).split(size):
            if done == steps:
                return
            done += 1
            yield rows


class Store(Generic[R]):
    """The finished runs of a folder, one JSON line each. ``R`` is a dataclass with a rate and a seed."""

    def __init__(self, folder: Path, kind: type[R], train: Callable[[R], Result]) -> None:
        self.file, self.train = folder / "runs.jsonl", train
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines(keepends=True) if self.file.is_file() else []
        if lines and not lines[-1].endswith("\n"):  # cut off by an interruption
            self.file.write_text("".join(lines[:-1]))
            lines.pop()
        keys = [f.name for f in fields(kind)]
        self.results = {name(kind(**{key: x[key] for key in keys if key in x})): x for x in map(json.loads, lines)}

    def result(self, run: R) -> Result:
        """The result of ``run``, trained now unless it is there."""
        if name(run) not in self.results:
            self.results[name(run)] = found = {**asdict(run), **self.train(run), **environment()}
            with self.file.open("a") as file:
                file.write(json.dumps(found) + "\n")
            told = {key: f"{value:.4g}" for key, value in found.items() if isinstance(value, float)}
            print(name(run), *(f"{key} {value}" for key, value in told.items()), flush=True)
        return self.results[name(run)]


def choose(
    store: Store[R], run: R, rates: Iterable[float], seeds: Iterable[int], worth: Callable[[Result], float]
) -> float:
    """The rate with the highest mean of ``worth`` over the seeds. A best rate at an edge extends the grid."""
    found: dict[int, float] = {}
    wanted = [round(4 * math.log10(rate)) for rate in rates]
    while wanted:
        for step in wanted:
            values = [worth(store.result(replace(run, rate=rate_at(step), seed=seed))) for seed in seeds]
            found[step] = sum(values) / len(values) if all(map(math.isfinite, values)) else -math.inf
        best = max(found, key=lambda step: found[step])
        edge = {min(found): -STEP, max(found): STEP}
        wanted = [best + edge[best]] if best in edge else []
    return rate_at(best)


STEP = 2
"""Steps of the grid of rates, in quarters of a decade."""


def rate_at(step: int) -> float:
    return float(f"{10 ** (step / 4):.3g}")


@cache
def environment() -> Result:
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False, cwd=Path(__file__).parent).stdout.strip()
    versions = {"torch": torch.__version__, "peft": peft.__version__, "python": platform.python_version()}
    return {"commit": commit, "versions": versions}
