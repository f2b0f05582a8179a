"""The look of the figures (sizes, colours, axes) and their SVG elements for a page."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element, fromstring

from pera_lab.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

COLORS = ("#0b62a4", "#b35900", "#117a52", "#7a3e9d", "#b3263a", "#0f7285", "#7a5230", "#5c6066")
"""Colours of lines and bars on white. A page replaces them by its CSS variables ``--c1``, ``--c2``, …"""
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
"""Width of a figure in inches. It is small so that letters stay readable on a phone."""


@dataclass(frozen=True)
class Table:
    """Head and rows of a table. The first cell of a row is its name."""

    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """A figure with its description and its numbers."""

    figure: Figure
    label: str
    """What the figure draws."""
    finding: str
    """What the figure shows."""
    table: Table

    def svg(self, prefix: str) -> Element:
        """Return an SVG element whose ids begin with ``prefix``. Its caption has the id ``<prefix>-caption``."""
        drawn = fromstring(svg_text(self.figure, metadata={"Date": None, "Creator": None}))
        svg = _inline(drawn, prefix)
        svg.attrib = {"viewBox": svg.attrib["viewBox"], "role": "img", "aria-label": self.label,
                      "aria-describedby": f"{prefix}-caption"}  # fmt: skip
        return svg


def short(name: str, length: int = 20) -> str:
    """Shorten a name so that it fits next to an axis."""
    name = visible(name, inline=True)
    return name if len(name) <= length else f"…{name[1 - length :]}"


def drawable(value: float) -> float:
    """The value, or NaN if it is not finite or too large for the arithmetic of matplotlib."""
    return value if abs(value) < 1e30 else math.nan


@contextmanager
def style() -> Iterator[None]:
    """Context for making and writing figures, independent of the user's matplotlib settings."""
    from matplotlib.style import context

    with warnings.catch_warnings(), context(["default", STYLE]):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page has other fonts
        warnings.filterwarnings("ignore", message="constrained_layout not applied")  # the labels are long
        yield


def new_figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Return a figure of ``height`` inches and its axes in rows and columns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def shades(name: str) -> Colormap:
    """Return a colour map from almost transparent to the first colour, so that low values show the page."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    color = to_rgb(COLORS[0])
    found: Colormap = LinearSegmentedColormap.from_list(name, [(*color, 0.06), (*color, 1.0)], N=40)
    return found.with_extremes(under=(*color, 0.0))


def draw_line(axes: Axes, x: Iterable[int], y: list[float], index: int, label: str = "", mark: bool = True) -> None:
    """Draw a line in the colour, dashes and marker of its index. Values that cannot be drawn leave a gap."""
    from matplotlib.ticker import MaxNLocator

    values = [drawable(value) for value in y]
    axes.plot(
        list(x),
        values,
        label=short(label) or None,
        color=COLORS[index % len(COLORS)],
        linestyle=DASHES[index % len(DASHES)],
        marker=MARKERS[index % len(MARKERS)] if mark and len(values) <= 60 else None,
        markersize=3,
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(tick)


def set_scale(axes: Axes, values: list[float], axis: str = "y") -> None:
    """Use a logarithmic axis if the values span more than a factor of five. Label it with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    line = axes.yaxis if axis == "y" else axes.xaxis
    finite = [value for value in map(drawable, values) if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > 5 * min(finite):
        decades = math.log10(max(finite) / min(finite))
        axes.set(**{f"{axis}scale": "log"})
        line.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
        line.set_minor_formatter(NullFormatter())
    line.set_major_formatter(tick)


def tick(value: float, _position: float = 0) -> str:
    """Format a number at an axis."""
    return f"{value:.6g}".replace("-", "−")


def legend(figure: Figure) -> None:
    """Draw the legend above the axes."""
    figure.legend(loc="outside upper left", ncols=3, fontsize=8, handlelength=2.4, columnspacing=1.0)


def svg_text(figure: Figure, **options: Any) -> str:
    """Return the figure as an SVG document. Control characters, which XML forbids, become their codes."""
    buffer = StringIO()
    with style():
        figure.savefig(buffer, format="svg", **options)
    return visible(buffer.getvalue())


def _inline(drawn: Element, prefix: str) -> Element:
    """Return a copy of an SVG element for a page: without namespaces, with the page's colours and with unique ids."""
    tag = _local(drawn.tag)
    attributes = {_local(key): value for key, value in drawn.items()}
    if tag not in ("path", "clipPath"):  # nothing refers to other elements
        attributes.pop("id", None)
    copy = Element(tag, {key: _value(key, value, prefix) for key, value in attributes.items()})
    copy.text = drawn.text if tag == "text" else None
    copy.extend(_inline(child, prefix) for child in drawn if _local(child.tag) not in ("metadata", "style"))
    return copy


def _value(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}-{value}"
    if key in ("href", "clip-path"):
        return value.replace("#", f"#{prefix}-")
    if key == "style":
        for i, color in enumerate(COLORS, 1):
            value = value.replace(color, f"var(--c{i})")
        return value.replace("#000000", "currentColor")
    return value


def _local(name: str) -> str:
    """The name of an element or attribute without its namespace."""
    return name.rpartition("}")[2]
