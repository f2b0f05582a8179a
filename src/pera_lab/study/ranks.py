"""The rank that a trained adapter needs: its loss when ΔW of every layer is truncated (Eckart and Young).

python -m pera_lab.study.ranks RUN... [--rank 1 --rank 2 --rank 4] [--examples 128]
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import typer

from pera_lab.diagnose import Cuts
from pera_lab.diagnose.effect import held_out, mean_loss
from pera_lab.runs import Run


class TruncatedLoss(NamedTuple):
    """Loss per label of an adapter, and its change at each rank."""

    labels: int
    loss: float
    change: dict[int, float]


def truncated_loss(run: Run, ranks: list[int], *, examples: int = 128) -> TruncatedLoss:
    """The loss of a run's adapter on held-out examples, in float32, with ΔW of every layer truncated to each rank.

    Args:
        run: a finished run with a LoRA or PERA adapter.
        ranks: the ranks.
        examples: how many held-out examples of its task are used, from the first.

    Raises:
        UserError: as for :class:`pera_lab.diagnose.Cuts`.
    """
    model, batches = held_out(run, examples, batch_size=8)
    cuts = Cuts(model)
    loss, labels = mean_loss(model, batches)
    change = {}
    for rank in ranks:
        with cuts.at(rank):
            change[rank] = mean_loss(model, batches)[0] - loss
    return TruncatedLoss(labels, loss, change)


def main(runs: list[Path], rank: list[int] = [1, 2, 4], examples: int = 128) -> None:  # noqa: B006
    """Print a Markdown table of the loss of runs, and of its change at each rank."""
    typer.echo("| run | labels | loss | " + " | ".join(f"rank {r}" for r in rank) + " |")
    typer.echo("| --- |" + " ---: |" * (2 + len(rank)))
    for path in runs:
        labels, loss, change = truncated_loss(Run(path), rank, examples=examples)
        typer.echo(f"| {path.name} | {labels} | {loss:.4f} | " + " | ".join(f"{change[r]:+.4f}" for r in rank) + " |")


if __name__ == "__main__":
    typer.run(main)
