"""How figures look: sizes, colours, axes, and the SVG element that a page takes in."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from pera_lab.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

COLORS = ("#0b62a4", "#b35900", "#117a52", "#7a3e9d", "#b3263a", "#0f7285", "#7a5230", "#5c6066")
"""Of lines and bars on white; a page puts its own variables ``--c1``, ``--c2``, … in their place."""
MARKERS, DASHES = "osD^vPXd", ("-", "--", ":", "-.")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pera",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "black",
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
}
WIDTH = 4.0
"""Inches; small, so that letters stay readable when a telephone shows the whole width."""


@dataclass(frozen=True)
class Table:
    """Head and rows of a table; the first cell of a row names it."""

    head: list[str]
    rows: list[list[str]]
    paper: frozenset[int] = frozenset()
    """Indices of the rows that hold figures of the paper."""


@dataclass(frozen=True)
class Picture:
    """A figure, what it shows in words and in numbers."""

    figure: Figure
    label: str
    """What is drawn."""
    finding: str
    """What is to be seen."""
    table: Table

    def svg(self, prefix: str) -> str:
        """The figure as an SVG element for a page, whose ids all begin with ``prefix``; the caption has the id
        ``<prefix>-caption``."""
        return _inline(self.figure, prefix, self.label)


def short(name: str, length: int = 20) -> str:
    """A name that fits beside an axis."""
    name = visible(name)
    return name if len(name) <= length else f"…{name[1 - length :]}"


@contextmanager
def style() -> Iterator[None]:
    """The context in which figures are made and written, whatever the user's own settings of matplotlib are."""
    from matplotlib.style import context

    with warnings.catch_warnings(), context(["default", STYLE]):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page has other fonts
        yield


def new_figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of a height in inches, and its axes in rows and columns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def shades(name: str) -> Colormap:
    """Of the first colour for a map, from next to nothing to full, so that the page shows through."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    color = to_rgb(COLORS[0])
    found: Colormap = LinearSegmentedColormap.from_list(name, [(*color, 0.06), (*color, 1.0)], N=40)
    return found.with_extremes(under=(*color, 0.0))


def draw_line(axes: Axes, x: Iterable[int], y: list[float], index: int, label: str = "", mark: bool = True) -> None:
    """A line with the colour, dashes and marker of its index; what is not finite is a gap."""
    from matplotlib.ticker import MaxNLocator

    values = [value if math.isfinite(value) else math.nan for value in y]
    axes.plot(
        list(x),
        values,
        label=label or None,
        color=COLORS[index % len(COLORS)],
        linestyle=DASHES[index % len(DASHES)],
        marker=MARKERS[index % len(MARKERS)] if mark and len(values) <= 60 else None,
        markersize=3,
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(tick)


def set_scale(axes: Axes, values: list[float], axis: str = "y") -> None:
    """A logarithmic axis where the values span more than a factor of five, and plain numbers on it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    line = axes.yaxis if axis == "y" else axes.xaxis
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > 5 * min(finite):
        decades = math.log10(max(finite) / min(finite))
        axes.set(**{f"{axis}scale": "log"})
        line.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
        line.set_minor_formatter(NullFormatter())
    line.set_major_formatter(tick)


def tick(value: float, _position: float = 0) -> str:
    """A number at an axis."""
    return f"{value:.6g}".replace("-", "−")


def legend(figure: Figure) -> None:
    """Name the lines, above the axes."""
    figure.legend(loc="outside upper left", ncols=3, fontsize=8, handlelength=2.4, columnspacing=1.0)


def _inline(figure: Figure, prefix: str, label: str) -> str:
    buffer = StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    opening = re.search(r"<svg[^>]*>", text)
    assert opening
    box = re.search(r'viewBox="[^"]*"', opening[0])
    assert box
    body = text[opening.end() :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", body)
    body = body.replace('xlink:href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    for i, color in enumerate(COLORS, 1):
        body = body.replace(color, f"var(--c{i})")
    body = re.sub(r"\s*\n\s*", "\n", body.replace("#000000", "currentColor"))
    described = f'role="img" aria-label="{label}" aria-describedby="{prefix}-caption"'
    return f"<svg {box[0]} {described}>{body}"
