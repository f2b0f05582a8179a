"""Tables and pictures of benchmarks/memory.py, rebuilt from its archive without training.

    python benchmarks/memory_report.py [--runs FILE ...] [--output docs/results/memory]

The rate of a method is chosen on facts of other seeds; the tables use the seeds that are reported. Intervals are 95 %
intervals of Student's t over seeds. A ratio of bits per parameter is the geometric mean over paired seeds, whose facts
are the same, and its interval is that of the mean of the logarithms.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from pera_lab.study.statistics import adjusted

CHOOSING = 1000
SETTING = ("facts", "count", "site", "steps", "batch", "vocabulary", "dtype", "weight_decay")
Result = dict[str, Any]
Setting = tuple[Any, ...]


class Interval(NamedTuple):
    mean: float
    low: float
    high: float
    n: int
    p: float = math.nan
    """Two-sided p of a mean of 0."""

    def text(self, digits: int = 2) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.{digits}f} (n = {self.n})"
        return f"{self.mean:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def interval(values: Sequence[float]) -> Interval:
    """Mean with its 95 % interval; NaN ends for fewer than three values."""
    n, mean = len(values), float(np.mean(values))
    if n < 3:
        return Interval(mean, math.nan, math.nan, n)
    error = stats.sem(values)
    half = float(stats.t.ppf(0.975, n - 1) * error)
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Interval(mean, mean - half, mean + half, n, p)


def ratio(values: Sequence[float]) -> Interval:
    """Geometric mean of ratios, its interval, and the p of a ratio of 1. NaN if a ratio is not positive."""
    if min(values) <= 0:
        return Interval(math.nan, math.nan, math.nan, len(values))
    x = interval([math.log(value) for value in values])
    return Interval(math.exp(x.mean), math.exp(x.low), math.exp(x.high), x.n, x.p)


def load(files: Iterable[Path]) -> list[Result]:
    found = []
    for file in files:
        with lzma.open(file, "rt") if file.suffix == ".xz" else file.open() as lines:
            found += [json.loads(line) for line in lines]
    return found


class Runs:
    """Results by setting, method and rank, at the chosen rate."""

    def __init__(self, results: Iterable[Result]) -> None:
        self.all: dict[tuple[Setting, str, int], list[Result]] = defaultdict(list)
        for x in results:
            self.all[tuple(x[key] for key in SETTING), x["method"], x["r"]].append(x)

    def rate(self, setting: Setting, method: str, r: int) -> tuple[float, float]:
        """The chosen rate and its mean bits on the facts for choosing."""
        bits: dict[float, list[float]] = defaultdict(list)
        for x in self.all[setting, method, r]:
            if x["seed"] >= CHOOSING:
                bits[x["rate"]].append(x["bits"] if math.isfinite(x["bits"]) else -math.inf)
        best = max(bits, key=lambda rate: float(np.mean(bits[rate])))
        return best, float(np.mean(bits[best]))

    def reported(self, setting: Setting, method: str, r: int) -> dict[int, Result]:
        """The results at the chosen rate by seed."""
        if not any(x["seed"] < CHOOSING for x in self.all[setting, method, r]):
            return {}
        best, _ = self.rate(setting, method, r)
        return {x["seed"]: x for x in self.all[setting, method, r] if x["rate"] == best and x["seed"] < CHOOSING}

    def lora(self, setting: Setting, r: int) -> str:
        """The start of LoRA, "lora" or "lora-gaussian", with more bits on the facts for choosing."""
        return max(
            (m for m in ("lora", "lora-gaussian") if self.all.get((setting, m, r))),
            key=lambda m: self.rate(setting, m, r)[1],
        )
