"""The law of what adapters store, ΔL = C · r^α · ℓ^(−β) + b (arXiv 2605.30260), fitted to runs of memory.py.

    python benchmarks/memory_law.py [--runs FILE ...] [--output docs/results/memory]   # law.md and law.svg

The fit takes the reported seeds of every number of facts and rank at the site of the test, at the rate that was chosen
there, or where none was chosen at the rate of code words at r = 2. Intervals are 2.5 and 97.5 % quantiles of parameters
drawn from the normal distribution of the estimates. They hold if the law does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from memory_plans import SEEDS
from memory_report import NAMES, SETTING, Runs, asked, label, load_at, table
from pera_lab.report.drawing import COLORS, MARKERS, legend, new_figure, style, svg_text


class Law(NamedTuple):
    """ΔL = C · r^α · (ℓ/1000)^(−β) + b, fitted by least squares; ℓ is the number of answer tokens, ΔL in nats."""

    C: float
    alpha: float
    beta: float
    b: float
    r2: float
    n: int
    draws: Any = None
    """Parameters (ln C, α, β, b) drawn from the normal distribution of their estimates, ``(draws, 4)``."""

    def gain(self, r: Any, tokens: Any) -> Any:
        return _law_form((r, tokens), math.log(self.C), self.alpha, self.beta, self.b)


def _law_form(x: Any, log_C: Any, alpha: Any, beta: Any, b: Any) -> Any:
    r, tokens = x
    return np.exp(log_C) * r**alpha * (tokens / 1000) ** -beta + b


def law(points: Sequence[tuple[int, int, float]]) -> Law:
    """Fit the law to (r, answer tokens, reduction of the loss)."""
    r, tokens, gain = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    found, covariance = optimize.curve_fit(_law_form, (r, tokens), gain, p0=[0.0, 0.5, 0.5, 0.0], maxfev=20000)
    rest = float(np.sum((gain - _law_form((r, tokens), *found)) ** 2))
    r2 = 1 - rest / float(np.sum((gain - gain.mean()) ** 2))
    draws = np.random.default_rng(0).multivariate_normal(found, covariance, 4000, check_valid="ignore")
    return Law(math.exp(found[0]), *map(float, found[1:]), r2, len(points), draws)


def law_rank(of_lora: Law, other: Law, r: int, tokens: int) -> tuple[float, float, float]:
    """Rank of the LoRA whose law predicts as much as the law of another method of rank r, divided by r, with the
    2.5 and 97.5 % quantiles of the fits' draws."""

    def solved(theirs: Any, mine: Any) -> Any:
        log_C, alpha, beta, b = theirs
        rest = _law_form((r, tokens), *mine) - b
        with np.errstate(invalid="ignore"):
            return (rest / (np.exp(log_C) * (tokens / 1000) ** -beta)) ** (1 / alpha) / r

    best = solved(
        *((math.log(x.C), x.alpha, x.beta, x.b) for x in (of_lora, other)),
    )
    low, high = np.nanquantile(solved(of_lora.draws.T, other.draws.T), [0.025, 0.975])
    return float(best), float(low), float(high)


TOKENS = {"codes": 1, "phonebook": 10}
"""Answer tokens of a fact."""
FULL = 0.95
"""A cell is left out of the law if more than this share of its bits is stored: no method could store much more."""


def law_points(runs: Runs, kind: str, method: str) -> list[tuple[int, int, float]]:
    """(r, answer tokens, reduction of the loss in nats) for the reported seeds of each number of facts and rank."""
    points = []
    for setting in runs.settings():
        if setting[0] == kind and setting[2:] == tuple(SETTING.values())[2:]:
            tokens = setting[1] * TOKENS[kind]
            for r in runs.ranks(setting):
                found = list(runs.reported(setting, method, r).values())
                if found and np.mean([x["bits"] / x["offered"] for x in found]) < FULL:
                    points.append((r, tokens, float(np.mean([x["bits"] for x in found])) * math.log(2) / tokens))
    return sorted(points)


def laws(runs: Runs, kind: str) -> dict[str, Law]:
    """The law of each method that was measured often enough."""
    points = {method: law_points(runs, kind, method) for method in NAMES}
    return {method: law(found) for method, found in points.items() if len(found) > 5}


def measured(runs: Runs) -> list[str]:
    """The kinds of facts with a law of at least two methods."""
    return [kind for kind in TOKENS if len(laws(runs, kind)) > 1]


def law_table(runs: Runs) -> str:
    rows = []
    for kind in measured(runs):
        fitted = laws(runs, kind)
        for method, x in fitted.items():
            spread = [np.quantile(x.draws[:, i], [0.025, 0.975]) for i in (1, 2)]
            ranks = ["1"] * 3
            if method != "lora":
                ranks = [
                    "{:.2f} ({:.2f} to {:.2f})".format(*law_rank(fitted["lora"], x, r, load_at(kind, r) * TOKENS[kind]))
                    for r in (1, 2, 4)
                ]
            rows.append(
                (
                    kind,
                    label(method),
                    x.n,
                    f"{x.C:.2f}",
                    f"{x.alpha:.2f} ({spread[0][0]:.2f} to {spread[0][1]:.2f})",
                    f"{x.beta:.2f} ({spread[1][0]:.2f} to {spread[1][1]:.2f})",
                    f"{x.b:.2f}",
                    f"{x.r2:.3f}",
                    *ranks,
                )
            )
    head = ["facts", "method", "cells", "C", "α (95 %)", "β (95 %)", "b", "R²"]
    return table([*head, *(f"equivalent rank / r, r = {r}" for r in (1, 2, 4))], rows)


def page(runs: Runs) -> str:
    runs = runs.only(SEEDS)
    parts = ["# The law", "Written by `python benchmarks/memory_law.py` from runs.jsonl.xz.", law_table(runs)]
    for kind in measured(runs):
        parts += [f"## Reduction of the loss, nats: {kind}", cells_table(runs, kind)]
    return "\n\n".join(parts) + "\n"


def cells_table(runs: Runs, kind: str) -> str:
    """What was measured, and in parentheses what the law gives."""
    points = {method: law_points(runs, kind, method) for method in NAMES}
    fitted = laws(runs, kind)
    cells = sorted({cell[:2] for found in points.values() for cell in found})
    rows = []
    for r, tokens in cells:
        row = [str(r), f"{tokens:,}"]
        for method, found in points.items():
            value = {cell[:2]: cell[2] for cell in found}.get((r, tokens))
            by_law = f" ({fitted[method].gain(r, tokens):.2f})" if method in fitted else ""
            row.append("–" if value is None else f"{value:.2f}{by_law}")
        rows.append(row)
    return table(["r", "answer tokens", *map(label, points)], rows)


def draw_law(runs: Runs, file: Path) -> None:
    """Measured reductions of the loss over the number of answer tokens, and the law, at r = 1 and 2."""
    kinds = measured(runs)
    figure, axes = new_figure(2.8 * len(kinds), rows=len(kinds), squeeze=False)
    for kind, panel in zip(kinds, axes[:, 0], strict=True):
        for index, (method, x) in enumerate(laws(runs, kind).items()):
            points = law_points(runs, kind, method)
            color, name = COLORS[index], label(method) if panel is axes[0, 0] else ""
            for r, dashes in ((1, "-"), (2, "--")):
                cells = [cell for cell in points if cell[0] == r]
                panel.plot(
                    [n for _, n, _ in cells],
                    [gain for *_, gain in cells],
                    MARKERS[index],
                    color=color,
                    label=name,
                    markersize=4,
                )
                name = ""
                if cells:
                    tokens = np.geomspace(min(n for _, n, _ in cells), max(n for _, n, _ in cells), 50)
                    panel.plot(tokens, x.gain(r, tokens), dashes, color=color, linewidth=1)
        ticks = sorted({cell[1] for method in NAMES for cell in law_points(runs, kind, method)})
        panel.set(xscale="log", ylabel=f"reduction of the loss, nats\n{kind}", ylim=(0, None))
        panel.set_xticks(ticks, [f"{n:,}" for n in ticks])
        panel.minorticks_off()
    axes[-1, 0].set(xlabel="answer tokens (line: r = 1, dashed: r = 2)")
    legend(figure)
    file.write_text(svg_text(figure, metadata={"Date": None, "Creator": None}))


def main() -> None:
    results, output = asked(__doc__, "runs.jsonl.xz", "law.md and law.svg")
    runs = Runs(results)
    (output / "law.md").write_text(page(runs))
    with style():
        draw_law(runs.only(SEEDS), output / "law.svg")


if __name__ == "__main__":
    main()
