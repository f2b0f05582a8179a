"""The picture of a training as a file of its own."""

from __future__ import annotations

import io
from pathlib import Path

from pera.errors import UserError
from pera.files import write_atomic
from pera.report.contents import Contents, Missing
from pera.report.drawing import style
from pera.report.plots import training_figure
from pera.runs import Run


def loss_picture(run: Run, file: Path) -> None:
    """Draw the loss of a run, and its learning rate below; the ending of ``file`` sets the format (svg, png, pdf).

    Raises:
        UserError: the run has no metrics, matplotlib is missing, the format is not known, or the file cannot be
            written.
    """
    metrics = Contents(run).metrics
    if isinstance(metrics, Missing):
        raise UserError(f"{str(run.path)!r} has no metrics yet; train first.")
    picture, kind = io.BytesIO(), file.suffix.removeprefix(".")
    figure = training_figure(metrics, run.path.name)
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise UserError(f"picture: {file.name!r} has no ending of a picture; one of: {', '.join(sorted(known))}.")
    with style():
        figure.savefig(picture, format=kind, facecolor="white")
    write_atomic(file, picture.getvalue())
