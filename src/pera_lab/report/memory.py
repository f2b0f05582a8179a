"""What is stored of the facts that a model was trained on: the lines of a score, and the section of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pera_lab.intervals import bootstrap_interval, mean
from pera_lab.memory import Memory
from pera_lab.report.contents import Contents
from pera_lab.report.drawing import (
    COLORS,
    DASHES,
    MARKERS,
    Picture,
    Table,
    legend,
    new_figure,
    short,
    style,
    tick,
)
from pera_lab.report.formatting import ABSENT, count, number, percent
from pera_lab.report.items import Item, setting_label
from pera_lab.scorers import Prediction
from pera_lab.study.results import Results, Setting
from pera_lab.study.spec import Cell, StudyTask
from pera_lab.study.statistics import LEAST_SEEDS, describe, over_seeds
from pera_lab.text import quoted

TESTED = "the facts that it was trained on"
"""What a score with a :class:`Memory` is about."""


def memory_lines(contents: Contents, which: str) -> list[list[str]]:
    """Names and values of what "base" or "adapter" has stored; empty if its score has no such part."""
    score = contents.score(which)
    if score is None or (memory := score.memory) is None:
        return []
    tested = TESTED if which == "adapter" else "the facts that the adapter was trained on"
    lines = [["tested on", tested], ["bits stored", _stored(memory)]]
    if memory.bits is None and which == "adapter":
        lines.append(["bits over the base model", _over_base(contents)])
    if memory.parameters:
        per = number(memory.bits_per_parameter, 3)
        lines.append(["bits per parameter", f"{per} ({count(memory.parameters)} trained parameters)"])
    tokens = f"{count(memory.tokens)} answer tokens"
    lines.append(["loss", f"{number(memory.loss)} per token, over {tokens} and the whole vocabulary"])
    lines.append(["tokens with p > 0.5", f"{percent(memory.confident)} of {tokens}"])
    return lines


def _stored(memory: Memory) -> str:
    if memory.bits is None or memory.low is None or memory.high is None:
        return "unknown, because task.answers does not say how many answers are equally likely"
    interval = f"95 % interval over facts {_bits(memory.low)} to {_bits(memory.high)}"
    return f"{_bits(memory.bits)} of {_bits(memory.information)} ({interval})"


def _over_base(contents: Contents) -> str:
    """Bits by which the loss of all answers is lower with the adapter, from the answers of both models."""
    base, tuned = contents.predictions["base"], contents.predictions["adapter"]
    if not isinstance(base, list) or not isinstance(tuned, list):
        return f"unknown until the base model is scored: pera evaluate {quoted(contents.run.path)} --base"
    before, after = (_nats(rows) for rows in (base, tuned))
    if [p.prompt for p in base] != [p.prompt for p in tuned] or len(before) != len(after):
        return "unknown, because the two models were scored on other facts"
    low, high = bootstrap_interval(lambda b, a: (sum(b) - sum(a)) / math.log(2), before, after)
    found = (sum(before) - sum(after)) / math.log(2)
    return f"{_bits(found)} (95 % interval over facts {_bits(low)} to {_bits(high)})"


def _nats(rows: Sequence[Prediction]) -> list[float]:
    return [-sum(row.log_likelihoods) for row in rows if row.log_likelihoods]


def _bits(value: float | None) -> str:
    """Format a number of bits: 3,322."""
    return ABSENT if value is None else f"{value:,.0f}".replace("-", "−")


def bits(results: Results) -> list[Item]:
    """A table and a figure of the bits per parameter of each method, and the rank at which the reference equals it."""
    items: list[Item] = []
    for task, fixed, cells in _groups(results):
        stored = {cell: found for cell in cells if (found := results.memories(cell))}
        if not stored:
            continue
        title = ", ".join(filter(None, [task.label, setting_label(fixed)])) if fixed != _ALONE else task.label
        rows = [_row(results, cell, found) for cell, found in stored.items()]
        lines: dict[str, dict[int, list[float]]] = {}
        for cell, found in stored.items():
            if cell.r is not None:
                lines.setdefault(cell.method.label, {})[cell.r] = [m.bits_per_parameter or math.nan for m in found]
        items.append(Item("heading", title))
        head = ["method", "r", "parameters", "recall", "bits stored", "of", "bits per parameter", "p > 0.5",
                f"equivalent rank of {results.study.reference} / r", "n seeds"]  # fmt: skip
        items.append(Item("table", Table(head, rows), f"Bits stored, {title}"))
        if lines:
            items.append(Item("picture", per_parameter(title, lines)))
    note = (
        "Every model is tested on the facts that it was trained on. Bits stored: for each answer, log2 of the number "
        "of equally likely answers, less its loss in bits under the softmax over the whole vocabulary; the end token "
        "is not counted. Values are means over the seeds ± standard deviation. Each seed draws its own facts. "
        f"Equivalent rank: where the bits of {results.study.reference}, linear between its measured ranks, reach the "
        f"bits of the method on the same facts, divided by r; with at least {LEAST_SEEDS} seeds it has a 95 % interval "
        "(Student's t over the seeds)."
    )
    return [*items, Item("note", note)] if items else []


_ALONE: Setting = (None, None, 1.0)


def _groups(results: Results) -> list[tuple[StudyTask, Setting, list[Cell]]]:
    """The cells of each task, placement and share of the data, ordered by method and rank."""
    found: dict[tuple[str, Setting], tuple[StudyTask, list[Cell]]] = {}
    for cell in results.cells:
        found.setdefault((cell.task.label, (None, *cell.setting[2:])), (cell.task, []))[1].append(cell)
    order = [method.label for method in results.study.grid.method]
    return [
        (task, fixed, sorted(cells, key=lambda cell: (order.index(cell.method.label), cell.r or 0)))
        for (_, fixed), (task, cells) in found.items()
    ]


def _row(results: Results, cell: Cell, found: Sequence[Memory]) -> list[str]:
    return [
        cell.method.label,
        ABSENT if cell.r is None else str(cell.r),
        count(found[0].parameters),
        percent(results.mean(cell).mean),
        _spread([m.bits for m in found if m.bits is not None], "{:,.0f}"),
        _bits(found[0].information),
        _spread([m.bits_per_parameter for m in found if m.bits_per_parameter is not None], "{:.3f}"),
        percent(mean(m.confident for m in found)),
        ABSENT if cell.method.label == results.study.reference else _equivalent(results, cell),
        str(len(found)),
    ]


def _spread(values: Sequence[float], form: str) -> str:
    found = describe(values)
    text = form.format(found.mean) + (f" ± {form.format(found.deviation)}" if found.n > 1 else "")
    return text.replace("-", "−")


def _equivalent(results: Results, cell: Cell) -> str:
    """The equivalent rank over r, or on which side of the measured ranks it lies."""
    found = results.equivalent_ranks(cell)
    if not found:
        return ABSENT
    if all(map(math.isfinite, found)):
        ratio = over_seeds(found, 0)
        return f"{ratio.mean:.2f}" + (f" ({ratio.low:.2f} to {ratio.high:.2f})" if math.isfinite(ratio.low) else "")
    sides = {"beyond": sum(x == math.inf for x in found), "below": sum(x == -math.inf for x in found)}
    said = [f"{side} the measured ranks" + (f" in {n} of {len(found)} seeds" if n < len(found) else "")
            for side, n in sides.items() if n]  # fmt: skip
    return "; ".join(said)


def per_parameter(title: str, lines: Mapping[str, Mapping[int, Sequence[float]]]) -> Picture:
    """Draw the bits per parameter over the rank, one line per method; thin bars reach from the least to the most."""
    ranks = sorted({r for line in lines.values() for r in line})
    means = {label: {r: mean(values) for r, values in sorted(line.items())} for label, line in lines.items()}
    with style():
        figure, axes = new_figure(3.4)
        for i, (label, line) in enumerate(means.items()):
            look = {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}
            axes.plot(list(line), list(line.values()), label=short(label), marker=MARKERS[i % 8], markersize=4, **look)
            for r in line:
                axes.plot([r, r], [min(lines[label][r]), max(lines[label][r])], color=look["color"], linewidth=0.8)
        axes.set(xscale="log", xlabel="rank r", ylabel="bits per parameter", title=short(title, 60))
        axes.set_xticks(ranks, [str(r) for r in ranks])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter(tick)
        legend(figure)
    best = {r: max((label for label in means if r in means[label]), key=lambda x: means[x][r]) for r in ranks}
    said = ", ".join(f"r = {r} {label} {number(means[label][r], 3)}" for r, label in best.items())
    finding = f"Most bits per parameter: {said}."
    rows = [[label, *(number(line.get(r), 3) for r in ranks)] for label, line in means.items()]
    return Picture(figure, "Lines: bits per parameter by rank", finding,
                   Table(["method", *(f"r = {r}" for r in ranks)], rows))  # fmt: skip
