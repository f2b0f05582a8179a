"""The picture of a training: loss and learning rate over the steps."""

from __future__ import annotations

import io
from pathlib import Path

from pera.errors import UserError, missing_extra
from pera.files import write_atomic
from pera.runs import Run


def loss_picture(run: Run, file: Path) -> None:
    """Draw the loss of a run, and its learning rate below; the ending of ``file`` sets the format (svg, png, pdf).

    Raises:
        UserError: the run has no metrics, matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "report") from error
    metrics = run.metrics()
    if not metrics:
        raise UserError(f"{str(run.path)!r} has no metrics yet; train first.")
    steps = [line["step"] for line in metrics]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    loss.plot(steps, [line["loss"] for line in metrics], marker=".")
    loss.set(ylabel="loss per answer token", yscale="log", title=run.path.name)
    rate.plot(steps, [line["learning_rate"] for line in metrics], color="tab:gray")
    rate.set(xlabel="step", ylabel="learning rate")
    for axes in (loss, rate):
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format=file.suffix.removeprefix("."))
    write_atomic(file, picture.getvalue())
