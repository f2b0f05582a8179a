"""The figures of a study, each with its description and its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pera_lab.diagnose import Effects
from pera_lab.intervals import mean
from pera_lab.report.drawing import (
    COLORS,
    DASHES,
    MARKERS,
    Picture,
    Table,
    legend,
    new_figure,
    set_scale,
    shades,
    short,
    style,
    tick,
)
from pera_lab.report.formatting import number, p_value, percent, points, signed
from pera_lab.study.results import Comparison
from pera_lab.study.statistics import pareto


def forest(compared: Sequence[Comparison], reference: str) -> Picture:
    """Draw the gain of each method over the reference on the same tasks, with its interval, in the given order."""
    with style():
        figure, axes = new_figure(0.8 + 0.25 * len(compared))
        for i, c in enumerate(compared):
            gain, shown = c.gain, c.verdict in ("better", "worse")
            color = COLORS[0] if shown else COLORS[7]
            if math.isfinite(gain.low):
                axes.plot([100 * gain.low, 100 * gain.high], [i, i], color=color, marker="|", markersize=7)
            axes.plot([100 * gain.mean], [i], color=color, marker="o", markersize=5)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(compared)), [short(c.method, 36) for c in compared])
        axes.set(xlabel=f"gain over {short(reference)} in points, with 95 % interval", ylim=(len(compared) - 0.5, -0.5))
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(tick)
    best = compared[0]
    finding = (
        f"Gain over {reference}, mean over {', '.join(best.gains)}: blue if a difference is shown, grey otherwise. "
        f"Largest: {best.method} with {points(best.gain.mean)} points."
    )
    rows = []
    for c in compared:
        interval = [points(x) for x in (c.gain.mean, c.gain.low, c.gain.high)]
        rows.append([c.method, *interval, str(c.gain.seeds), str(c.gain.tasks), p_value(c.p)])
    head = ["method", "gain", "from", "to", "pairs of seeds", "tasks", "adjusted p"]
    return Picture(figure, "Gains over the reference with intervals", finding, Table(head, rows))


def rate_curves(
    title: str, curves: Mapping[str, Mapping[float, float]], chosen: Mapping[str, float | None]
) -> Picture | None:
    """Draw the held-out loss over the learning rate, one line per method; None if no run has ended."""
    curves = {label: {r: x for r, x in curve.items() if not math.isnan(x)} for label, curve in curves.items()}
    curves = {label: curve for label, curve in curves.items() if curve}
    finite = [x for curve in curves.values() for x in curve.values() if math.isfinite(x)]
    if not finite:
        return None
    with style():
        figure, axes = new_figure(3.6)
        top = max(finite)
        for i, (label, curve) in enumerate(curves.items()):
            line = {rate: x for rate, x in curve.items() if math.isfinite(x)}
            look = {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}
            axes.plot(list(line), list(line.values()), label=short(label), marker=MARKERS[i % 8], markersize=3, **look)
            lost = [rate for rate, x in curve.items() if math.isinf(x)]
            axes.plot(lost, [top] * len(lost), color=look["color"], marker="x", linestyle="none")
            rate = chosen.get(label)
            if rate in line:
                axes.plot([rate], [line[rate]], marker="o", markersize=9, fillstyle="none", color=look["color"])
        axes.set(xscale="log", xlabel="learning rate", ylabel="held-out loss", title=short(title, 60))
        rates = sorted({rate for curve in curves.values() for rate in curve})
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter(tick)
        set_scale(axes, finite)
        legend(figure)
    known = {label: rate for label, rate in chosen.items() if rate is not None and label in curves}
    best = min(finite)
    winner = next(label for label, curve in curves.items() if best in curve.values())
    rings = ", ".join(f"{label} {rate:g}" for label, rate in known.items())
    finding = f"{title}: lowest held-out loss {number(best)} ({winner}). Chosen (ringed): {rings or 'none yet'}."
    rows = [[label, *(number(curve.get(rate)) for rate in rates)] for label, curve in curves.items()]
    return Picture(figure, "Lines: held-out loss by learning rate", finding,
                   Table(["method", *(f"{rate:g}" for rate in rates)], rows))  # fmt: skip


def front(points: Mapping[str, tuple[float, float]], cost: str, title: str) -> Picture:
    """Draw the mean score over a cost. A line joins the methods that no other method beats in both."""
    labels = list(points)
    best = {labels[i] for i in pareto(list(points.values()))}
    with style():
        figure, axes = new_figure(3.2)
        line = sorted(points[label] for label in best)
        axes.plot([x for x, _ in line], [100 * y for _, y in line], color=COLORS[7], linewidth=0.8)
        for i, (label, (x, y)) in enumerate(points.items()):
            fill = "full" if label in best else "none"
            axes.plot([x], [100 * y], label=short(label), color=COLORS[i % len(COLORS)], marker=MARKERS[i % 8],
                      fillstyle=fill, linestyle="none")  # fmt: skip
        axes.set(xlabel=cost, ylabel="mean score in %", title=short(title, 60))
        axes.yaxis.set_major_formatter(tick)
        set_scale(axes, [x for x, _ in points.values()], axis="x")
        legend(figure)
    finding = f"Not beaten in both score and {cost}: {', '.join(label for label in labels if label in best)}."
    rows = [[label, number(x), f"{100 * y:.2f}", "yes" if label in best else "no"] for label, (x, y) in points.items()]
    return Picture(figure, f"Points: score against {cost}", finding,
                   Table(["method", cost, "mean score in %", "on the front"], rows))  # fmt: skip


def effect_by_group(effects: Sequence[Effects]) -> Picture | None:
    """Draw the change of the loss without the high-order terms of each group of layers, mean over the seeds."""
    groups = list(effects[0].without_high_order) if effects else []
    if not groups:
        return None
    means = {group: mean(e.without_high_order.get(group, math.nan) for e in effects) for group in groups}
    with style():
        figure, axes = new_figure(0.8 + 0.25 * len(groups))
        for i, change in enumerate(means.values()):
            axes.barh(i, change, height=0.65, color=COLORS[0 if change >= 0 else 1])
        axes.set_yticks(range(len(groups)), [short(group) for group in groups])
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(xlabel="change of the loss without high-order terms")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(tick)
    most = max(means, key=lambda group: abs(means[group]))
    finding = f"Mean over n = {len(effects)} seeds; the largest change is {signed(means[most])}, in {most}."
    rows = [[group, signed(change)] for group, change in means.items()]
    return Picture(figure, "Bars: effect of the high-order terms by layer", finding, Table(["layer", "change"], rows))


def interaction_maps(strengths: Mapping[str, Sequence[Sequence[float]]]) -> Picture:
    """Draw the interaction strengths of each method, ``(features, features)``, as maps on one scale."""
    rows = math.ceil(len(strengths) / 3)
    positive = [x for matrix in strengths.values() for row in matrix for x in row if x > 0] or [1.0]
    high = max(positive)
    low = max(min(positive), high / 1e4)
    with style():
        from matplotlib.colors import LogNorm, Normalize

        figure, grid = new_figure(0.9 + 1.6 * rows, rows, 3, squeeze=False)
        wide = high > 10 * low
        norm = LogNorm(low, high, clip=True) if wide else Normalize(0, high)
        for axes in grid.flat[len(strengths) :]:
            axes.set_axis_off()
        for axes, (label, matrix) in zip(grid.flat, strengths.items(), strict=False):
            mesh = axes.pcolormesh(matrix, cmap=shades("strength"), norm=norm, rasterized=False)
            axes.set(xticks=[], yticks=[], aspect="equal")
            axes.set_title(short(label), fontsize=8)
            axes.invert_yaxis()
            axes.grid(visible=False)
        bar = figure.colorbar(mesh, ax=grid, location="bottom", aspect=40, label="interaction strength")
        set_scale(bar.ax, [low, high] if wide else [], axis="x")
        bar.outline.set_visible(False)
    pairs = {label: [x for i, row in enumerate(m) for x in row[i + 1 :]] for label, m in strengths.items()}
    squares = {label: [row[i] for i, row in enumerate(m)] for label, m in strengths.items()}
    strongest = max(pairs, key=lambda label: mean(pairs[label]))
    finding = (
        f"Mean over pairs of features: {', '.join(f'{x} {number(mean(p), 3)}' for x, p in pairs.items())}. "
        f"Strongest: {strongest}."
    )
    table = [[x, number(mean(pairs[x]), 3), number(max(pairs[x]), 3), number(mean(squares[x]), 3)] for x in strengths]
    return Picture(figure, "Maps: interaction strength of pairs of hidden features", finding,
                   Table(["method", "mean of pairs", "largest", "mean of the diagonal"], table))  # fmt: skip


def sweep(name: str, values: Sequence[str], lines: Mapping[str, Sequence[float]], *, title: str = "") -> Picture:
    """Draw the mean score of each method along one axis of the grid.

    Args:
        name: name of the axis.
        values: labels of its values.
        lines: by method, one mean score per value; NaN if it is unknown.
        title: the fixed part of the setting, if there are several.
    """
    with style():
        figure, axes = new_figure(3)
        for i, (label, line) in enumerate(lines.items()):
            look = {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}
            axes.plot(range(len(values)), [100 * y for y in line], label=short(label), marker=MARKERS[i % 8], **look)
        axes.set_xticks(range(len(values)), [short(value) for value in values])
        axes.set(ylabel="mean score in %", xlabel=name, title=short(title, 60))
        axes.yaxis.set_major_formatter(tick)
        legend(figure)
    rows = [[label, *(percent(y, unit="") for y in line)] for label, line in lines.items()]
    scores = "; ".join(f"{label} {', '.join(cells)}" for label, *cells in rows)
    finding = f"Mean score in % by {name} ({', '.join(values)}){f', {title}' if title else ''}: {scores}."
    return Picture(figure, f"Lines: score by {name}", finding, Table(["method", *values], rows))
