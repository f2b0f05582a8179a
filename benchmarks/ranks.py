"""How much rank a trained adapter needs: the change of its loss when the ΔW of every layer is cut to its leading
directions (Eckart and Young).

    python benchmarks/ranks.py RUN… [--ranks 1 2 4] [--examples 128]

RUN is a run folder with an adapter of LoRA or PERA, whose loss is taken on the first held-out examples of its task, in
float32. Prints a line for each run: labels, loss, and its change at each rank.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor
from torch.nn.functional import pad

from pera import to_lora
from pera.lora import truncate_factors
from pera.tuner import PeraModel
from pera_lab.diagnose.effect import held_out, mean_loss
from pera_lab.runs import Run


def factors_of(lora: PeftModel, name: str) -> list[tuple[Tensor, Tensor]]:
    """A and B of every layer. Ends the program where there are none, or a layer's ΔW is not their product."""
    layers = {key: layer for key, layer in lora.named_modules() if isinstance(layer, LoraLayer)}
    others = [key for key, layer in layers.items() if not isinstance(layer, Linear) or layer.lora_magnitude_vector]
    if others or not layers:
        said = f"{others[0]} is none" if others else "this adapter has none"
        raise SystemExit(f"{name}: only linear layers of a LoRA or PERA can be cut to a rank; {said}.")
    return [(layer.lora_A[key].weight, layer.lora_B[key].weight) for layer in layers.values() for key in layer.lora_A]


@contextmanager
def cut(factors: list[tuple[Tensor, Tensor]], rank: int) -> Iterator[None]:
    """Within the block, each B A is the best approximation of itself of that rank."""
    own = [(A.data, B.data) for A, B in factors]
    try:
        for A, B in factors:
            near_A, near_B = truncate_factors(A.data.double(), B.data.double(), rank)
            missing = len(A) - len(near_A)
            A.data, B.data = pad(near_A, (0, 0, 0, missing)).to(A), pad(near_B, (0, missing)).to(B)
        yield
    finally:
        for (A, B), (own_A, own_B) in zip(factors, own, strict=True):
            A.data, B.data = own_A, own_B


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", nargs="+", type=Path)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--examples", type=int, default=128)
    arguments = parser.parse_args()
    print("| run | labels | loss |", " | ".join(f"rank {rank}" for rank in arguments.ranks), "|")
    print("| --- |" + " ---: |" * (2 + len(arguments.ranks)))
    for path in arguments.run:
        model, batches = held_out(Run(path), arguments.examples, batch_size=8)
        lora = to_lora(model) if isinstance(model.base_model, PeraModel) else model
        factors = factors_of(lora, path.name)
        loss, labels = mean_loss(lora, batches)
        changes = []
        for rank in arguments.ranks:
            with torch.no_grad(), cut(factors, rank):
                changes.append(f"{mean_loss(lora, batches)[0] - loss:+.4f}")
        print(f"| {path.name} | {labels} | {loss:.4f} |", " | ".join(changes), "|", flush=True)


if __name__ == "__main__":
    main()
