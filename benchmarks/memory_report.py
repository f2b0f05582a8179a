"""Tables and pictures of benchmarks/memory.py, rebuilt from its archive without training.

    python benchmarks/memory_report.py [--runs FILE ...] [--output docs/results/memory]

The rate of a method is chosen on facts of other seeds; the tables use the seeds that are reported. Intervals are 95 %
intervals of Student's t over seeds. A ratio of bits per parameter is the geometric mean over paired seeds, whose facts
are the same. Its interval and its p come from the logarithms; p is adjusted by Holm over all ratios of the test.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from memory_facts import CHOOSING
from memory_plans import BOTH, FRESH, SEEDS, ZEROED
from pera_lab.report.drawing import COLORS, draw_line, legend, new_figure, style, svg_text
from pera_lab.study.statistics import equivalent_rank as reaching_rank
from pera_lab.study.statistics import over_seeds

SETTING = {
    "facts": "",
    "count": 0,
    "site": "down",
    "steps": 1600,
    "batch": None,
    "vocabulary": "answers",
    "dtype": "float32",
    "weight_decay": 0.0,
    "dropout": 0.0,
    "base": "pretrained",
}
"""What is varied, with its usual value, which early runs of the archive do not state."""
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
    found = over_seeds(values, 0)
    return Interval(found.mean, found.low, found.high, found.seeds, found.p)


def ratio(values: Sequence[float]) -> Interval:
    """Geometric mean of ratios, its interval, and the p of a ratio of 1. NaN if a ratio is not positive."""
    if min(values) <= 0:
        return Interval(math.nan, math.nan, math.nan, len(values))
    x = interval([math.log(value) for value in values])
    return Interval(math.exp(x.mean), math.exp(x.low), math.exp(x.high), x.n, x.p)


def holm(p: Sequence[float]) -> list[float]:
    """The p-values of several comparisons, adjusted for their number (Holm): the chance of any false one is bounded."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    found, least = [1.0] * len(p), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        found[i] = least
    return found


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
            self.all[tuple(x.get(key, usual) for key, usual in SETTING.items()), x["method"], x["r"]].append(x)

    def only(self, seeds: Sequence[int]) -> Runs:
        """The runs on facts for choosing, and the reported ones of ``seeds``."""
        return Runs(x for found in self.all.values() for x in found if x["seed"] >= CHOOSING or x["seed"] in seeds)

    def rate(self, setting: Setting, method: str, r: int) -> tuple[float, float]:
        """The rate with the most bits on the facts for choosing, and those bits. Where none was chosen, the rate that
        was used, and NaN."""
        bits: dict[float, list[float]] = defaultdict(list)
        results = self.all.get((setting, method, r), [])
        for x in results:
            if x["seed"] >= CHOOSING:
                bits[x["rate"]].append(x["bits"] if math.isfinite(x["bits"]) else -math.inf)
        if not bits:
            return results[0]["rate"], math.nan
        best = max(bits, key=lambda rate: float(np.mean(bits[rate])))
        return best, float(np.mean(bits[best]))

    def reported(self, setting: Setting, method: str, r: int) -> dict[int, Result]:
        """The results of the reported seeds, at the rate above."""
        results = [x for x in self.all.get((setting, method, r), []) if x["seed"] < CHOOSING]
        return {x["seed"]: x for x in results if x["rate"] == self.rate(setting, method, r)[0]}

    def chosen(self, setting: Setting, method: str, r: int) -> list[Result]:
        """The results of the facts for choosing, at the rate above."""
        results = [x for x in self.all.get((setting, method, r), []) if x["seed"] >= CHOOSING]
        return [x for x in results if x["rate"] == self.rate(setting, method, r)[0]]

    def lora(self, setting: Setting, r: int) -> str:
        """The start of LoRA, "lora" or "lora-gaussian", with more bits on the facts for choosing."""
        return max(
            (m for m in ("lora", "lora-gaussian") if self.all.get((setting, m, r))),
            key=lambda m: self.rate(setting, m, r)[1],
        )

    def settings(self) -> list[Setting]:
        return sorted({setting for setting, _, _ in self.all}, key=lambda s: (*s[:2], str(s)))

    def methods(self, setting: Setting, r: int) -> list[str]:
        return [method for s, method, rank in self.all if s == setting and rank == r]

    def ranks(self, setting: Setting) -> list[int]:
        return sorted({r for s, _, r in self.all if s == setting})


def described(setting: Setting) -> str:
    facts, count, site, steps, batch, vocabulary, dtype, decay, dropout, base = setting
    parts = [f"{count:,} facts of {facts!r}", f"site {site!r}", f"{steps:,} steps"]
    parts += [f"minibatches of {batch}"] * (batch is not None) + ["whole vocabulary"] * (vocabulary == "whole")
    parts += [dtype] * (dtype != "float32") + [f"weight decay {decay:g}"] * (decay != 0)
    parts += [f"dropout {dropout:g}"] * (dropout != 0) + [f"{base} base"] * (base != "pretrained")
    return ", ".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def chosen_table(runs: Runs, setting: Setting) -> str:
    """Every method at its best rate on the facts for choosing, exploratory."""
    rows = []
    for r in runs.ranks(setting):
        for method in runs.methods(setting, r):
            if found := runs.chosen(setting, method, r):
                per_parameter = np.mean([x["bits_per_parameter"] for x in found])
                rows.append((r, method, f"{found[0]['rate']:g}", len(found), f"{per_parameter:.2f}", *_row(found)))
    rows.sort(key=lambda row: (row[0], -float(row[4])))
    return table(["r", "method", "rate", "n", "bits per parameter", *_COLUMNS], rows)


def reported_table(runs: Runs, setting: Setting) -> str:
    rows = []
    for r in runs.ranks(setting):
        for method in runs.methods(setting, r):
            if found := list(runs.reported(setting, method, r).values()):
                per_parameter = interval([x["bits_per_parameter"] for x in found]).text()
                rows.append(
                    (r, method, f"{runs.rate(setting, method, r)[0]:g}", len(found), per_parameter, *_row(found))
                )
    return table(["r", "method", "rate", "n", "bits per parameter (95 %)", *_COLUMNS], rows)


_COLUMNS = (
    "parameters",
    "bits",
    "recall",
    "p > 0.5",
    "effective rank",
    "loss",
    "loss, ΔW cut to r",
    "recall, merged in bfloat16",
)


def _row(found: Sequence[Result]) -> list[str]:
    def mean(*keys: str) -> float:
        values = []
        for x in found:
            value: Any = x
            for key in keys:
                value = value.get(key, math.nan) if isinstance(value, dict) else math.nan
            values.append(value)
        return float(np.mean(values))

    return [
        f"{found[0]['parameters']:,}",
        f"{mean('bits'):,.0f}",
        f"{100 * mean('recall'):.0f} %",
        f"{100 * mean('likely'):.0f} %",
        f"{mean('effective_rank'):.1f}",
        f"{mean('loss'):.2f}",
        f"{mean('cut_r', 'loss'):.2f}",
        f"{100 * mean('merged_bfloat16', 'recall'):.0f} %",
    ]


class Comparison(NamedTuple):
    setting: Setting
    r: int
    method: str
    against: str
    """The method it is compared with, as it is named in the runs."""
    ratio: Interval


def comparisons(runs: Runs, setting: Setting, methods: Sequence[str], against: Sequence[str]) -> list[Comparison]:
    """Ratios of bits per parameter over paired seeds. "lora" in ``against`` is LoRA's better start."""
    found = []
    for r in runs.ranks(setting):
        for other in against:
            if other not in runs.methods(setting, r):
                continue
            name = runs.lora(setting, r) if other == "lora" else other
            theirs = runs.reported(setting, name, r)
            for method in methods:
                mine = runs.reported(setting, method, r)
                seeds = sorted(mine.keys() & theirs.keys())
                if seeds:
                    values = [mine[s]["bits_per_parameter"] / theirs[s]["bits_per_parameter"] for s in seeds]
                    found.append(Comparison(setting, r, method, name, ratio(values)))
    return found


def ratio_table(found: Sequence[Comparison]) -> str:
    decided = [x for x in found if not math.isnan(x.ratio.p)]
    corrected = dict(zip(map(id, decided), holm([x.ratio.p for x in decided]), strict=True))
    rows = [
        (
            x.setting[0],
            x.r,
            x.method,
            x.against,
            x.ratio.n,
            x.ratio.text(),
            f"{corrected[id(x)]:.2g}" if id(x) in corrected else "–",
        )
        for x in found
    ]
    head = ["facts", "r", "method", "against", "n", "ratio of bits per parameter (95 %)", "p, Holm"]
    return table(head, rows)


def equivalent_rank(runs: Runs, setting: Setting, method: str, r: int) -> Interval | str:
    """Rank of the LoRA that stores as much as ``method`` of rank r on the same facts, divided by r, over seeds.

    LoRA's bits at its measured ranks are interpolated linearly. Returns words if a seed stores more than every LoRA
    that was measured with this seed.
    """
    curve = {rank: runs.reported(setting, runs.lora(setting, rank), rank) for rank in lora_ranks(runs, setting)}
    values, beyond = [], []
    for seed, x in runs.reported(setting, method, r).items():
        points = [(rank, found[seed]["bits"]) for rank, found in curve.items() if seed in found]
        values.append(reaching_rank(points, x["bits"]) / r if points else math.nan)
        if values[-1] == math.inf:
            beyond.append(max(rank for rank, _ in points) / r)
    if beyond:
        return f"above {min(beyond):g}" + (
            f" in {len(beyond)} of {len(values)} seeds" if len(beyond) < len(values) else ""
        )
    return interval(values) if values and all(map(math.isfinite, values)) else "not measured"


def lora_ranks(runs: Runs, setting: Setting) -> list[int]:
    return [r for r in runs.ranks(setting) if {"lora", "lora-gaussian"} & set(runs.methods(setting, r))]


TESTED = ("pera-rms", "anchors-16")
NAMES = {"lora": "LoRA", "pera-rms": "PERA", "anchors-16": "PERA, 16 anchors", "hira": "HiRA"}


def label(method: str) -> str:
    return NAMES.get("lora" if method == "lora-gaussian" else method, method)


def draw_ranks(
    runs: Runs, settings: Sequence[Setting], value: Callable[[Result], float], what: str, file: Path
) -> None:
    """A value over r at equal load, one panel for each kind of facts, with 95 % intervals."""
    kinds = list(dict.fromkeys(setting[0] for setting in settings))
    figure, axes = new_figure(2.6 * len(kinds), rows=len(kinds), squeeze=False, sharex=True)
    for kind, panel in zip(kinds, axes[:, 0], strict=True):
        for index, method in enumerate(NAMES):
            points = []
            for setting in (s for s in settings if s[0] == kind):
                for r in runs.ranks(setting):
                    if setting[1] == load_at(kind, r):
                        name = runs.lora(setting, r) if method == "lora" else method
                        found = runs.reported(setting, name, r)
                        if found:
                            points.append((r, interval([value(x) for x in found.values()])))
            points.sort()
            draw_line(
                panel,
                [r for r, _ in points],
                [x.mean for _, x in points],
                index,
                label(method) if panel is axes[0, 0] else "",
            )
            for r, x in points:
                if not math.isnan(x.low):
                    panel.vlines(r, x.low, x.high, color=COLORS[index % len(COLORS)], linewidth=1)
        panel.set(ylabel=f"{what}\n{kind}", ylim=(0, None))
    axes[-1, 0].set(xlabel="rank r")
    legend(figure)
    file.write_text(svg_text(figure, metadata={"Date": None, "Creator": None}))


def load_at(kind: str, r: int) -> int:
    """Number of facts of the test at rank r."""
    return {"codes": 512, "phonebook": 100}.get(kind, 0) * r


def asked(description: str | None, archive: str, written: str) -> tuple[list[Result], Path]:
    """The results and the output folder that the command line names.

    Args:
        description: the docstring of the report.
        archive: the file of its results, by default.
        written: what it writes into the folder.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path("docs/results/memory")
    parser.add_argument("--runs", type=Path, nargs="+", default=[folder / archive], help="files of results")
    parser.add_argument("--output", type=Path, default=folder, help=f"folder of {written}")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    return load(options.runs), options.output


def main() -> None:
    results, output = asked(__doc__, "runs.jsonl.xz", "tables.md and the pictures")
    everything = Runs(results)
    (output / "tables.md").write_text(page(everything))
    runs = everything.only(SEEDS)
    with style():
        tested = tested_settings(runs)
        draw_ranks(runs, tested, lambda x: x["bits_per_parameter"], "bits per parameter", output / "bits.svg")
        draw_ranks(runs, tested, lambda x: 100 * x["recall"], "recall, %", output / "recall.svg")


def tested_settings(runs: Runs) -> list[Setting]:
    """The settings of the test that was decided beforehand: number of facts by r, 1,600 steps, the last down_proj."""
    return [
        s
        for s in runs.settings()
        if s[2:] == tuple(SETTING.values())[2:]
        and s[0] in ("codes", "phonebook")
        and s[1] in {load_at(s[0], r) for r in (1, 2, 4)}
    ]


def zeroed_table(runs: Runs) -> str:
    """The loss without products and anchors, and with ΔW cut to r directions, at the rates of the tests."""
    rows = []
    for (setting, method, r), found in runs.all.items():
        if mine := [x for x in found if "zeroed" in x]:
            losses = (
                [x["loss"] for x in mine],
                [x["zeroed"]["loss"] for x in mine],
                [x["cut_r"]["loss"] for x in mine],
            )
            rows.append((setting[0], r, method, len(mine), *(interval(values).text() for values in losses)))
    return table(["facts", "r", "method", "n", "loss (95 %)", "coefficients at zero", "ΔW cut to r"], rows)


def second_test(runs: Runs) -> list[Comparison]:
    """Anchors with products over the methods of the first test: seeds 6 to 10 on PhoneBook at r = 2, else 1 to 5."""
    found = []
    for setting in tested_settings(runs):
        for r in (1, 2, 4):
            if setting[1] == load_at(setting[0], r):
                seeds = FRESH if (setting[0], r) == ("phonebook", 2) else SEEDS
                compared = comparisons(runs.only(seeds), setting, (BOTH,), ("lora", "hira", *TESTED))
                found += [x for x in compared if x.r == r]
    return found


def page(everything: Runs) -> str:
    runs = everything.only(SEEDS)
    parts = [
        "# Tables of memory.md",
        "Written by `python benchmarks/memory_report.py` from runs.jsonl.xz.",
        "## The test",
    ]
    found = [
        x
        for setting in tested_settings(runs)
        for x in comparisons(runs, setting, TESTED, ("lora", "hira"))
        if setting[1] == load_at(setting[0], x.r)
    ]
    parts.append(ratio_table(found))
    parts += ["## The second test: anchors and products together", ratio_table(second_test(everything))]
    fresh = everything.only(FRESH)
    for setting in tested_settings(everything):
        if fresh.reported(setting, BOTH, 2) and setting[:2] == ("phonebook", load_at("phonebook", 2)):
            parts += [f"{described(setting)[0].upper()}{described(setting)[1:]}, seeds 6 to 10:"]
            parts += [reported_table(fresh, setting)]
    parts.append("## Equivalent rank of LoRA, divided by r")
    rows = []
    for setting in tested_settings(runs):
        for r in runs.ranks(setting):
            if setting[1] == load_at(setting[0], r):
                for method in (*TESTED, BOTH, "hira"):
                    if runs.reported(setting, method, r):
                        value = equivalent_rank(runs, setting, method, r)
                        rows.append((setting[0], r, method, value if isinstance(value, str) else value.text()))
    parts.append(table(["facts", "r", "method", "equivalent rank / r (95 %)"], rows))
    zeroed = everything.only(ZEROED)
    if any("zeroed" in x for found in zeroed.all.values() for x in found):
        parts += ["## Without products and anchors, seeds 11 to 13", zeroed_table(zeroed)]
    for setting in runs.settings():
        parts.append(f"## {described(setting)[0].upper()}{described(setting)[1:]}")
        seeds = {x["seed"] for key, found in runs.all.items() if key[0] == setting for x in found}
        if min(seeds) < CHOOSING:
            parts += ["Reported seeds:", reported_table(runs, setting)]
        if max(seeds) >= CHOOSING:
            parts += ["Facts for choosing, each method at its best rate (exploratory):", chosen_table(runs, setting)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
