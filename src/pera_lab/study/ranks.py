"""The rank that a trained adapter needs: its loss when ΔW of every layer is truncated (Eckart and Young).

python -m pera_lab.study.ranks RUN... [--rank 1 --rank 2 --rank 4] [--examples 128]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor
from torch.nn.functional import pad

from pera import to_lora
from pera.errors import UserError
from pera.lora import truncate_factors
from pera.tuner import PeraModel
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
        UserError: the adapter is not a LoRA or PERA of linear layers.
    """
    model, batches = held_out(run, examples, batch_size=8)
    lora = to_lora(model) if isinstance(model.base_model, PeraModel) else model
    factors = linear_factors(lora, run.path.name)
    loss, labels = mean_loss(lora, batches)
    change = {}
    for rank in ranks:
        with torch.no_grad(), truncated(factors, rank):
            change[rank] = mean_loss(lora, batches)[0] - loss
    return TruncatedLoss(labels, loss, change)


def linear_factors(lora: PeftModel, name: str) -> list[tuple[Tensor, Tensor]]:
    """The factors A and B of every layer.

    Raises:
        UserError: the adapter of the run ``name`` has no LoRA layer, or ΔW of a layer is not B A.
    """
    layers: dict[str, Any] = {key: layer for key, layer in lora.named_modules() if isinstance(layer, LoraLayer)}
    others = [key for key, layer in layers.items() if not isinstance(layer, Linear) or layer.lora_magnitude_vector]
    if others or not layers:
        found = f"layer {others[0]!r} is something else" if others else "its adapter has none"
        raise UserError(f"{name!r}: only linear layers of a LoRA or PERA can be truncated, and {found}.")
    return [(layer.lora_A[key].weight, layer.lora_B[key].weight) for layer in layers.values() for key in layer.lora_A]


@contextmanager
def truncated(factors: list[tuple[Tensor, Tensor]], rank: int) -> Iterator[None]:
    """Replace each B A by its best approximation of this rank while the block runs."""
    saved = [(A.data, B.data) for A, B in factors]
    try:
        for A, B in factors:
            near_A, near_B = truncate_factors(A.data.double(), B.data.double(), rank)
            missing = len(A) - len(near_A)
            A.data, B.data = pad(near_A, (0, 0, 0, missing)).to(A), pad(near_B, (0, missing)).to(B)
        yield
    finally:
        for (A, B), (saved_A, saved_B) in zip(factors, saved, strict=True):
            A.data, B.data = saved_A, saved_B


def main(runs: list[Path], rank: list[int] = [1, 2, 4], examples: int = 128) -> None:  # noqa: B006
    """Print a Markdown table of the loss of runs, and of its change at each rank."""
    typer.echo("| run | labels | loss | " + " | ".join(f"rank {r}" for r in rank) + " |")
    typer.echo("| --- |" + " ---: |" * (2 + len(rank)))
    for path in runs:
        labels, loss, change = truncated_loss(Run(path), rank, examples=examples)
        typer.echo(f"| {path.name} | {labels} | {loss:.4f} | " + " | ".join(f"{change[r]:+.4f}" for r in rank) + " |")


if __name__ == "__main__":
    typer.run(main)
