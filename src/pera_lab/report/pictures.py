"""Figures saved as image files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from pera.errors import UserError
from pera_lab.adapters import Adapter
from pera_lab.diagnose import diagnose_adapter, place_layers
from pera_lab.files import check_output_file, write_atomic
from pera_lab.report.contents import Contents, Missing
from pera_lab.report.drawing import style, svg_text
from pera_lab.report.figures import ratio_map, training_figure
from pera_lab.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_picture(run: Run, file: Path) -> None:
    """Save a figure of the loss and the learning rate of a run.

    Raises:
        UserError: the run has no metrics, or :func:`save_figure` fails.
    """
    metrics = Contents(run).metrics
    if isinstance(metrics, Missing):
        raise UserError(f"{str(run.path)!r} has no metrics; train it first.")
    save_figure(training_figure(metrics, run.path.name), file)


def ratio_picture(adapter: Adapter, file: Path) -> None:
    """Save a figure of the high-order ratio of a saved PERA adapter by block and kind of module.

    If all products are zero, the figure shows the ratio of the anchors.

    Raises:
        UserError: there is no PERA adapter, it has no high-order terms or anchors, or :func:`save_figure` fails.
    """
    layers = place_layers(diagnose_adapter(adapter))
    picture = ratio_map(layers) or ratio_map(layers, "anchor")
    if picture is None:
        raise UserError(f"{str(adapter.path)!r} has no high-order terms to draw.")
    save_figure(picture.figure, file)


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure in the format of the ending of ``file`` (svg, png, pdf).

    Raises:
        UserError: the format is unknown, or the file cannot be written.
    """
    kind = file.suffix.removeprefix(".")
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise UserError(f"{file.name!r} does not end in a known image format; use one of: {', '.join(sorted(known))}.")
    check_output_file(file)
    if kind == "svg":
        write_atomic(file, svg_text(figure, facecolor="white"))
        return
    content = io.BytesIO()
    with style():
        figure.savefig(content, format=kind, facecolor="white")
    write_atomic(file, content.getvalue())
