"""Tables of benchmarks/ordinary.py, rebuilt from its archive without training.

    python benchmarks/ordinary_report.py [--runs FILE ...] [--output docs/results/memory]

The rate of a method is chosen by the loss on held-out training rows; the tables use the seeds that are reported. A
ratio over several tasks is the geometric mean over the tasks for each seed, whose runs are paired. Intervals are 95 %
intervals of Student's t over the seeds, for ratios of their logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np

from memory_facts import CHOOSING
from memory_report import Interval, Result, asked, holm, interval, label, ratio, table
from ordinary import AGAIN, AT_ONE, FAMILY

METHODS = ("lora", "pera-rms", "anchors-16", "hira")
LATER = (FAMILY,)
"""Tasks that the first test did not name, each with a test of its own."""
COMPARED = tuple(product(("pera-rms", "anchors-16"), ("lora", "hira")))
METRIC = {"cola": "matthews"}


class Runs:
    """Results at a site by task, method and rank."""

    def __init__(self, results: Iterable[Result], site: str = "down") -> None:
        self.anywhere = list(results)
        self.all = [x for x in self.anywhere if x.get("site", "down") == site]  # early runs do not state it
        self.ranks = sorted({x["r"] for x in self.all if x["method"] != "full"})
        begun = dict.fromkeys(x["task"] for x in self.all if x["task"] != AGAIN)
        self.tasks = [
            task for task in begun if all(self.of(task, *cell) for cell in [*product(METHODS, self.ranks), ("full", 1)])
        ]
        """The tasks of which every method was measured."""
        self.left_out = [task for task in begun if task not in self.tasks]
        self.first = [task for task in self.tasks if task not in LATER]
        """The tasks of the first test."""

    def of(self, task: str, method: str, r: int) -> list[Result]:
        return [x for x in self.all if (x["task"], x["method"], x["r"]) == (task, method, r)]

    def at(self, site: str) -> Runs:
        """The results at another site."""
        return Runs(self.anywhere, site)

    def rate(self, task: str, method: str, r: int) -> float:
        """The rate with the smallest held-out loss. Where none was chosen, the rate that was used."""
        losses = {x["rate"]: x["loss"] for x in self.of(task, method, r) if x["seed"] >= CHOOSING}
        if not losses:
            return float(self.of(task, method, r)[0]["rate"])
        return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)

    def reported(self, task: str, method: str, r: int, rate: float | None = None) -> list[Result]:
        """The results of the reported seeds in their order, at a rate (default: the chosen one)."""
        rate = self.rate(task, method, r) if rate is None else rate
        found = [x for x in self.of(task, method, r) if x["seed"] < CHOOSING and x["rate"] == rate]
        return sorted(found, key=lambda x: x["seed"])

    def values(self, task: str, method: str, r: int, value: Callable[[Result], float]) -> np.ndarray[Any, Any]:
        return np.array([value(x) for x in self.reported(task, method, r)])


def loss(x: Result) -> float:
    return float(x["loss"])


def metric(x: Result) -> float:
    """Accuracy of the answers (CoLA: Matthews' correlation), in percent."""
    return 100 * float(x[METRIC.get(x["task"], "accuracy")])


def loss_ratio(runs: Runs, tasks: Sequence[str], method: str, against: str, r: int) -> Interval:
    """Test loss over the test loss of another method: geometric mean over tasks, then over seeds."""
    logs = [np.log(runs.values(t, method, r, loss) / runs.values(t, against, r, loss)) for t in tasks]
    return ratio(list(np.exp(np.mean(logs, axis=0))))


def compared_table(runs: Runs, head: str, cells: Iterable[tuple[str | int, Sequence[str], int]]) -> str:
    """The ratios of each cell: its name, its tasks and its rank. p is adjusted over all of them."""
    pairs = [(*cell, *pair) for cell in cells for pair in COMPARED]
    found = [loss_ratio(runs, tasks, method, against, r) for _, tasks, r, method, against in pairs]
    adjusted = holm([x.p for x in found])
    rows = [
        (name, label(method), label(against), x.n, x.text(3), f"{p:.2g}")
        for (name, _, _, method, against), x, p in zip(pairs, found, adjusted, strict=True)
    ]
    return table([head, "method", "against", "n", "ratio of test losses (95 %)", "p, Holm"], rows)


def by_rank(runs: Runs, tasks: Sequence[str], ranks: Sequence[int]) -> str:
    return compared_table(runs, "r", ((r, tasks, r) for r in ranks))


def losses_at_one(runs: Runs, task: str) -> str:
    """What the methods reached in a test at r = 1."""
    rows = []
    for method, r in [*((method, 1) for method in METHODS), ("lora", 2)]:
        found = runs.reported(task, method, r)
        spread = interval([loss(x) for x in found]), interval([metric(x) for x in found])
        rows.append((label(method), r, found[0]["rate"], spread[0].text(3), spread[1].text(1)))
    return table(["method", "r", "rate", "test loss (95 %)", "accuracy % of tokens"], rows)


def three_matrices(runs: Runs) -> list[str]:
    """The test with the adapter on the three matrices of the MLP."""
    begun = dict.fromkeys(x["task"] for x in runs.all)
    tasks = [task for task in begun if all(runs.of(task, *cell) for cell in AT_ONE)]
    if not tasks:
        return []
    parts = ["## Three matrices, r = 1", compared_table(runs, "task", ((task, [task], 1) for task in tasks))]
    for task in tasks:
        parts += [f"### {task} in three matrices", losses_at_one(runs, task)]
    return parts


def task_table(runs: Runs, task: str) -> str:
    rows = []
    for method, r in [*product(METHODS, runs.ranks), ("full", 1)]:
        found = runs.reported(task, method, r)
        gain = ratio_of_losses = "–"
        if method not in ("lora", "full"):
            gain = interval(runs.values(task, method, r, metric) - runs.values(task, "lora", r, metric)).text(1)
            ratio_of_losses = loss_ratio(runs, [task], method, "lora", r).text(3)

        def mean(key: str, found: list[Result] = found) -> float:
            return float(np.mean([x[key] for x in found]))

        rows.append(
            (
                "full matrix" if method == "full" else label(method),
                "–" if method == "full" else r,
                f"{found[0]['parameters']:,}",
                f"{found[0]['rate']:g}",
                interval([x["loss"] for x in found]).text(3),
                ratio_of_losses,
                interval([metric(x) for x in found]).text(1),
                gain,
                f"{mean('train_loss'):.3f}",
                f"{mean('effective_rank'):.1f}",
                "–" if method == "full" else f"{mean('cut_r'):.3f}",
                f"{mean('forgetting'):.2f}",
            )
        )
    name = "Matthews" if task in METRIC else "accuracy"
    head = ["method", "r", "parameters", "rate", "test loss (95 %)", "over LoRA's", f"{name} %", "gain over LoRA"]
    return table([*head, "training loss", "effective rank", "test loss, ΔW cut to r", "forgetting, nats"], rows)


def curve_table(runs: Runs) -> str:
    """Test loss at LoRA's own rate over LoRA's, after some steps: geometric mean over tasks, then seeds."""
    rows = []
    for r, method in product(runs.ranks, ("pera-rms", "anchors-16")):
        steps: dict[str, list[float]] = {}
        for task in runs.first:
            rate = runs.rate(task, "lora", r)
            pairs = zip(runs.reported(task, method, r, rate), runs.reported(task, "lora", r, rate), strict=True)
            for x, other in pairs:
                for step in x["curve"]:
                    steps.setdefault(step, []).append(math.log(x["curve"][step] / other["curve"][step]))
                steps.setdefault("600", []).append(math.log(x["loss"] / other["loss"]))
        by_seed = {step: np.reshape(logs, (len(runs.first), -1)).mean(0) for step, logs in steps.items() if step != "0"}
        rows.append((r, label(method), *(ratio(list(np.exp(logs))).text(3) for logs in by_seed.values())))
    return table(["r", "method", *(f"{step} steps" for step in by_seed)], rows)


def page(runs: Runs) -> str:
    parts = [
        "# Ordinary tasks at the site of memory.md",
        "Written by `python benchmarks/ordinary_report.py` from ordinary.jsonl.xz.",
        f"Not complete, so not in any table: {', '.join(runs.left_out)}."
        if runs.left_out
        else "All tasks are complete.",
        "## The test",
        by_rank(runs, runs.first, runs.ranks),
        "## Test loss at LoRA's own rate, over LoRA's",
        curve_table(runs),
    ]
    if runs.of(AGAIN, "lora", 1):
        parts += ["## The second test: GSM8K again, r = 1", by_rank(runs, [AGAIN], [1]), losses_at_one(runs, AGAIN)]
    for task in runs.tasks:
        parts += [f"## {task}", task_table(runs, task)]
        if task in LATER:
            parts.append(by_rank(runs, [task], runs.ranks))
    parts += three_matrices(runs.at("mlp"))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    results, output = asked(__doc__, "ordinary.jsonl.xz", "ordinary.md")
    (output / "ordinary.md").write_text(page(Runs(results)))


if __name__ == "__main__":
    main()
