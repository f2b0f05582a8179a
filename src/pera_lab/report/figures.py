"""The figures of a run, each with its description and its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import median
from typing import TYPE_CHECKING, Literal, TypeVar

from pera_lab.diagnose import Effects, Fullness, Layer, Part, by_kind
from pera_lab.files import number_or_nan
from pera_lab.intervals import mean
from pera_lab.report.contents import Metrics
from pera_lab.report.drawing import (
    COLORS,
    Picture,
    Table,
    draw_line,
    drawable,
    legend,
    new_figure,
    set_scale,
    shades,
    short,
    style,
    tick,
)
from pera_lab.report.formatting import ABSENT, count, number, percent, signed
from pera_lab.scorers import Score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 40
"""Most rows of a table of numbers, and most bars or lines of a figure."""
T = TypeVar("T")


def accuracy(scores: Mapping[str, Score]) -> Picture:
    """Draw the metric before and after training, with intervals."""
    metric = next(iter(scores.values())).metric
    names = {"base": "base model", "adapter": "with adapter"}
    with style():
        figure, axes = new_figure(0.75 + 0.3 * len(scores))
        for i, (which, score) in enumerate(scores.items()):
            value, *ends = (100 * drawable(x) for x in (score.value, score.low, score.high))
            axes.barh(i, value, height=0.6, color=COLORS[7 if which == "base" else 0])
            axes.plot(ends, [i, i], color="black", marker="|", markersize=8)
        lowest = min(0, *(100 * low for score in scores.values() if math.isfinite(low := drawable(score.low))))
        axes.set(xlim=(lowest, 100), xlabel=f"{short(metric, 40)} in %, with 95 % interval")
        axes.set_yticks(range(len(scores)), [names[which] for which in scores])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    said = [f"{names[k]} {percent(s.value)} ({percent(s.low)} to {percent(s.high)})" for k, s in scores.items()]
    finding = f"{metric.capitalize()} with 95 % interval: {', '.join(said)}."
    if len(scores) == 2:
        a, b = scores.values()
        apart = a.high < b.low or b.high < a.low
        finding += f" The intervals {'do not overlap' if apart else 'overlap'}."
    if any(score.memory is not None for score in scores.values()):
        finding += " Tested on the facts that the adapter was trained on."
    head = ["", metric, "from", "to", "right", "of", "scorer"]
    rows = [
        [names[k], *map(percent, (s.value, s.low, s.high)), count(s.correct), str(s.n), s.scorer]
        for k, s in scores.items()
    ]
    return Picture(figure, f"Bars: {metric} before and after training", finding, Table(head, rows))


def training(metrics: Metrics) -> Picture:
    """Draw the loss over the steps, and the learning rate below it."""
    label = "Lines: loss and learning rate over the training steps"
    head = ["step", "epoch", "loss", "learning rate", "gradient norm", "tokens/s"]
    keys = ("epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second")
    rows = []
    for line in _thinned(metrics.lines):
        cells = (ABSENT if (x := line.get(key)) is None else number(number_or_nan(x)) for key in keys)
        rows.append([str(line["step"]), *cells])
    return Picture(training_figure(metrics), label, _course(metrics).capitalize(), Table(head, rows))


def validation(metrics: Metrics, kept: int | None) -> Picture:
    """Draw the loss on the validation rows over the steps.

    Args:
        metrics: the lines of ``validation.jsonl``.
        kept: the step of the checkpoint that was kept; None if the last step was kept or none is known.
    """
    with style():
        figure, axes = new_figure(2.6)
        draw_line(axes, metrics.steps, metrics.series("loss"), 0)
        if kept is not None:
            axes.axvline(kept, color="black", linewidth=0.8, alpha=0.6)
        axes.set(xlabel="step", ylabel="validation loss")
        set_scale(axes, metrics.series("loss"))
    keys = [key for key, value in metrics.lines[0].items() if key != "step" and isinstance(value, (int, float))]
    rows = [
        [str(line["step"]), *(number(number_or_nan(line.get(key))) for key in keys), "kept" * (line["step"] == kept)]
        for line in _thinned(metrics.lines)
    ]
    finding = _course(metrics).capitalize()
    if kept is not None:
        finding += f" The checkpoint of step {kept} was kept; the vertical line marks it."
    return Picture(
        figure, "Line: loss on the validation rows over the steps", finding, Table(["step", *keys, ""], rows)
    )


def training_figure(metrics: Metrics, title: str = "") -> Figure:
    """Return the figure of :func:`training`."""
    with style():
        figure, (loss, rate) = new_figure(3.2, rows=2, sharex=True, height_ratios=[3, 1])
        draw_line(loss, metrics.steps, metrics.series("loss"), 0)
        draw_line(rate, metrics.steps, metrics.series("learning_rate"), 0, mark=False)
        loss.set(ylabel="loss per label", title=short(title, 60))
        rate.set(xlabel="step", ylabel="learning rate")
        set_scale(loss, metrics.series("loss"))
    return figure


def losses(runs: Mapping[str, Metrics]) -> Picture:
    """Draw the loss of several runs over the steps."""
    with style():
        figure, axes = new_figure(3)
        for i, (name, metrics) in enumerate(runs.items()):
            draw_line(axes, metrics.steps, metrics.series("loss"), i, name)
        axes.set(xlabel="step", ylabel="loss per label")
        set_scale(axes, [x for metrics in runs.values() for x in metrics.series("loss")])
        legend(figure)
    found = {name: dict(zip(m.steps, m.series("loss"), strict=True)) for name, m in runs.items()}
    steps = _thinned(sorted({step for m in runs.values() for step in m.steps}))
    rows = [[str(step), *(number(loss.get(step)) for loss in found.values())] for step in steps]
    finding = " ".join(f"{name}: {_course(metrics)}" for name, metrics in runs.items())
    return Picture(figure, "Lines: loss of the runs over the steps", finding, Table(["step", *runs], rows))


Ratio = Literal["high-order", "anchor"]


def ratio_map(layers: list[Layer], of: Ratio = "high-order") -> Picture | None:
    """Draw the ratio of a part to the linear part by block and kind of module; None if no layer has the part."""
    key = {"high-order": "high_order_ratio", "anchor": "anchor_ratio"}[of]
    ratios: dict[str, float] = {layer.name: getattr(layer.diagnosis, key) for layer in layers}
    finite = {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}
    positive = [ratio for ratio in finite.values() if ratio > 0]
    if not positive:
        return None
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    kinds = by_kind(layers)
    cells = [[_mean(finite.get(x.name) for x in members if x.block == b) for b in blocks] for members in kinds.values()]
    with style():
        from matplotlib.colors import LogNorm, Normalize

        figure, axes = new_figure(1.1 + 0.27 * len(kinds))
        wide = max(positive) > 10 * min(positive)
        norm = LogNorm(min(positive), max(positive)) if wide else Normalize(0, max(positive))
        mesh = axes.pcolormesh(cells, cmap=shades("ratio"), norm=norm, rasterized=False)
        axes.set_yticks([i + 0.5 for i in range(len(kinds))], [short(kind) for kind in kinds])
        every = max(1, math.ceil(len(blocks) / 10))
        shown = range(0, len(blocks), every)
        axes.set_xticks([i + 0.5 for i in shown], [ABSENT if blocks[i] is None else str(blocks[i]) for i in shown])
        axes.set(xlabel="block")
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.tick_params(length=0)
        bar = figure.colorbar(mesh, ax=axes, location="bottom", aspect=40, label=f"{of} ratio")
        set_scale(bar.ax, positive if wide else [], axis="x")
        bar.outline.set_visible(False)
    low, high = min(finite, key=finite.__getitem__), max(finite, key=finite.__getitem__)
    finding = (
        f"{of.capitalize()} ratio: median {number(median(finite.values()), 3)} over {len(finite)} layers; "
        f"smallest {number(finite[low], 3)} ({low}), largest {number(finite[high], 3)} ({high})."
    )
    table = Table(
        ["block", *kinds],
        [
            [ABSENT if b is None else str(b), *(ABSENT if math.isnan(row[i]) else number(row[i], 3) for row in cells)]
            for i, b in enumerate(blocks)
        ],
    )
    return Picture(figure, f"Map: {of} ratio by block and kind of module", finding, table)


def spectra(layers: list[Layer]) -> Picture | None:
    """Draw the singular values of ΔW relative to the largest, as medians by kind; None if every ΔW is zero."""
    curves = {}
    for kind, members in by_kind(layers).items():
        values = [x.diagnosis.singular_values for x in members if x.diagnosis.singular_values[0] > 0]
        if values:
            longest = max(map(len, values))
            curves[kind] = [median(v[i] / v[0] for v in values if len(v) > i) for i in range(longest)]
    if not curves:
        return None
    ranks = sorted({layer.diagnosis.r for layer in layers})
    expanded = max(layer.diagnosis.expanded_rank for layer in layers)
    floor = 1e-8
    with style():
        figure, axes = new_figure(3.2)
        for i, (kind, curve) in enumerate(curves.items()):
            seen = [value if value > floor else math.nan for value in curve]
            draw_line(axes, range(1, len(curve) + 1), seen, i, kind, mark=False)
        if len(ranks) == 1:
            axes.axvline(ranks[0], color="black", linewidth=0.8, alpha=0.6)
            at = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            axes.annotate(f"r = {ranks[0]}", (ranks[0], 1), (3, -8), **at)
        axes.set(xlabel="index i", ylabel="σᵢ / σ₁, median")
        set_scale(axes, [v for curve in curves.values() for v in curve if v > floor])
        legend(figure)
    chosen = sorted({1, *(2**i for i in range(1, 10)), *ranks, *(r + 1 for r in ranks), expanded})
    rows = [
        [str(i), *(number(curve[i - 1], 3) if i <= len(curve) else ABSENT for curve in curves.values())]
        for i in chosen
        if i <= expanded
    ]
    stable = number(median(layer.diagnosis.stable_rank for layer in layers), 3)
    effective = number(median(layer.diagnosis.effective_rank for layer in layers), 3)
    finding = (
        f"Median over {len(layers)} layers: stable rank {stable}, effective rank {effective}. "
        f"Nominal rank {', '.join(map(str, ranks))}; expanded rank at most {expanded}."
    )
    return Picture(figure, "Lines: singular values of the weight updates", finding, Table(["i", *curves], rows))


def ratio_over_time(recorded: list[tuple[int, dict[str, float]]], of: Ratio = "high-order") -> Picture:
    """Draw the ratio of a part to the linear part by kind of module over the steps."""
    kinds = sorted({kind for _, ratios in recorded for kind in ratios})
    steps = [step for step, _ in recorded]
    series = {kind: [ratios.get(kind, math.nan) for _, ratios in recorded] for kind in kinds}
    first = list(series.items())[:ROWS]
    with style():
        figure, axes = new_figure(3)
        for i, (kind, values) in enumerate(first):
            draw_line(axes, steps, values, i, kind)
        axes.set(xlabel="step", ylabel=f"{of} ratio")
        set_scale(axes, [value for values in series.values() for value in values])
        legend(figure)
    changes = (f"{kind} {number(values[0], 3)} → {number(values[-1], 3)}" for kind, values in first)
    finding = f"{of.capitalize()} ratio from step {steps[0]} to step {steps[-1]}: {', '.join(changes)}."
    shown = _thinned(list(range(len(steps))))
    rows = [[str(steps[i]), *(number(values[i], 3) for values in series.values())] for i in shown]
    return Picture(figure, f"Lines: {of} ratio during training", finding, Table(["step", *kinds], rows))


def effect(effects: Effects) -> Picture:
    """Draw the change of the loss without each kind of term, and without the terms of each group of layers."""
    terms = {"square": "squares", "cross": "crosses", "high_order": "both", "anchors": "anchors"}
    parts = {terms[part]: change for part, change in effects.without.items()}
    if effects.at_rank_r is not None:
        parts["ranks beyond r"] = effects.at_rank_r
    groups = {f"both in {group}": change for group, change in effects.without_high_order.items()}
    changes = {**parts, **groups}
    bars = {name: drawable(change) for name, change in list(changes.items())[:ROWS]}
    with style():
        figure, axes = new_figure(0.8 + 0.25 * len(bars))
        for i, (name, change) in enumerate(bars.items()):
            value = 0.0 if math.isnan(change) else change
            axes.barh(i, value, height=0.65, color=COLORS[0 if value >= 0 else 1])
            beside = {"textcoords": "offset points", "va": "center_baseline", "fontsize": 8}
            axes.annotate(signed(changes[name]), (max(value, 0.0), i), (3, 0), **beside)
        axes.set_yticks(range(len(bars)), [short(name, 24) for name in bars])
        axes.axvline(0, color="black", linewidth=0.8)
        if parts and groups:
            axes.axhline(len(parts) - 0.5, color="black", linewidth=0.5, alpha=0.5)
        low, high = (edge((0.0, *filter(math.isfinite, bars.values()))) for edge in (min, max))
        axes.set_xlim(1.05 * low, high + (0.3 * (high - low) or 1.0))
        axes.locator_params(axis="x", nbins=5)
        axes.set(xlabel="change of the loss when removed")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(tick)
    told: list[str] = []
    names: dict[Part, str] = {"high_order": "high-order terms", "anchors": "anchors"}
    for part, name in names.items():
        if part in effects.without:
            removed = effects.without[part]
            relative = removed / effects.loss if effects.loss else math.nan
            share = f" ({percent(relative)} of it)" if math.isfinite(relative) else ""
            told.append(f"Without the {name} it changes by {signed(removed)}{share}.")
    finding = " ".join([f"Over {effects.tokens:,} labels the loss is {number(effects.loss)}.", *told]) + (
        f" The figure shows the first {ROWS} of {len(changes)} changes." if len(changes) > ROWS else ""
    )
    rows = [
        [name, signed(change), percent(change / effects.loss if effects.loss else None)]
        for name, change in changes.items()
    ]
    table = Table(["removed", "change of the loss", "relative"], rows)
    return Picture(figure, "Bars: change of the loss without the high-order terms", finding, table)


def loss_at_rank(found: Fullness) -> Picture:
    """Draw the loss over the rank that every ΔW is cut to, with the loss that the tolerance allows."""
    losses = {**dict(sorted(found.loss_at_rank.items())), found.rank: found.loss}
    with style():
        figure, axes = new_figure(2.6)
        draw_line(axes, list(losses), [drawable(loss) for loss in losses.values()], 0)
        if found.needed is not None:
            axes.axhline(drawable(found.tolerated), color="black", linewidth=0.8, alpha=0.6)
        axes.set(xlabel="rank of every ΔW", ylabel="loss per label")
        set_scale(axes, list(losses.values()))
    rows = [
        [str(rank), number(loss), signed(loss - found.loss), percent((loss - found.loss) / found.gain or 0.0)]
        if found.gain
        else [str(rank), number(loss), signed(loss - found.loss), ABSENT]
        for rank, loss in losses.items()
    ]
    bits = f"unknown. {found.not_learned}"
    if found.learned is not None:
        bits = f"{number(found.learned.bits)}, {number(found.learned.per_parameter, 2)} per trained parameter."
    finding = (
        f"{found.sentence()} Effective rank of ΔW: {number(found.effective_rank, 2)} of {found.rank}. "
        f"Bits learned in the first epoch: {bits}"
    )
    head = ["rank", "loss per label", "change", "share of the gain lost"]
    return Picture(figure, "Line: loss with every weight update cut to a rank", finding, Table(head, rows))


def _course(metrics: Metrics) -> str:
    """Describe a loss curve in a sentence."""
    pairs = list(zip(metrics.steps, metrics.series("loss"), strict=True))
    finite = [(step, loss) for step, loss in pairs if math.isfinite(loss)]
    lost = f" {len(pairs) - len(finite)} of {len(pairs)} logged losses are not finite." if finite != pairs else ""
    if not finite:
        return f"no loss was finite.{lost}"
    (first, a), (last, b) = finite[0], finite[-1]
    step, lowest = min(finite, key=lambda pair: pair[1])
    return (
        f"loss {number(a)} at step {first}, {number(b)} at step {last}; lowest {number(lowest)} at step {step}.{lost}"
    )


def _mean(values: Iterable[float | None]) -> float:
    found = [value for value in values if value is not None]
    return mean(found) if found else math.nan


def _thinned(rows: list[T]) -> list[T]:
    """Select at most :data:`ROWS` rows at equal distances, including the last."""
    every = math.ceil(len(rows) / ROWS)
    return rows[(len(rows) - 1) % every :: every] if rows else rows
