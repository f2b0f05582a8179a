"""Fit given matrices with ΔW = B̂ Â at equal r: LoRA, PERA, and the optimum at rank r and at rank K.

    python benchmarks/expressivity.py --output docs/results/expressivity.md

Adam with a cosine schedule fits each matrix from LoRA's initialization, at several learning rates. The table shows the
best rate. The error is ‖M − ΔW‖² / ‖M‖². The truncated SVD has the smallest error of all matrices of its rank (Eckart
and Young).
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import time
from pathlib import Path

import torch
from torch import Tensor

import pera
from pera.polynomial import delta_weight, expanded_rank, num_coefficients

RATES = (3e-3, 1e-2, 3e-2)
DIFFERENCE = (
    "The SmolLM2 matrices are weight differences: a weight of block 15 after full fine-tuning (40 steps of 8 examples "
    "of family_relationships, AdamW at 2e-5) minus the same weight before."
)
METHODS = {  # terms, normalization, initial h
    "LoRA": ("none", "none", 0.0),
    "PERA published": ("all", "none", 0.0),
    "PERA squares": ("square", "none", 0.0),
    "PERA rms, h from 0": ("all", "rms", 0.0),
    "PERA rms, h from 0.3": ("all", "rms", 0.3),
    "PERA centred, h from 0.3": ("all", "centred", 0.3),
}


def targets(size: int, weight_difference: Path | None) -> dict[str, Tensor]:
    """Return the matrices to fit by name, each scaled to a mean square of 1."""
    generator = torch.Generator().manual_seed(0)

    def gauss(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    low = gauss(size, 4) @ gauss(4, size) / 2
    q, w = (torch.linalg.qr(gauss(size, size))[0] for _ in range(2))
    found = {
        "Gaussian": gauss(size, size),
        "rank 4": low,
        "S + S⊙S/2, S of rank 4": low + low * low / 2,
        "spectrum 1/i": q @ torch.diag(1 / torch.arange(1, size + 1.0)) @ w,
    }
    if weight_difference is not None:
        found |= torch.load(weight_difference, weights_only=True)
    return {name: M / M.square().mean().sqrt() for name, M in found.items()}


def eckart_young(M: Tensor, rank: int) -> float:
    """Return the relative squared error of the best approximation of M with the given rank."""
    energy = torch.linalg.svdvals(M.double()).square()
    return float(energy[rank:].sum() / energy.sum())


def fit(M: Tensor, r: int, method: str, rate: float, steps: int, seed: int) -> float:
    """Fit M with Adam and return the relative squared error, or infinity if the fit diverges.

    Args:
        M: the matrix to fit, (rows, columns).
        r: rank of the factors.
        method: a key of ``METHODS``.
        rate: peak learning rate.
        steps: number of optimizer steps.
        seed: seed of the initial factor A.
    """
    terms, normalization, initial = METHODS[method]
    torch.manual_seed(seed)
    rows, columns = M.shape
    A = torch.empty(r, columns)
    torch.nn.init.kaiming_uniform_(A, a=5**0.5)
    h = torch.full((num_coefficients(r, terms),), initial) if terms != "none" else None
    parameters = [p.requires_grad_() for p in (A, torch.zeros(rows, r), h) if p is not None]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = (M - _delta(parameters, terms, normalization)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        error = float((M - _delta(parameters, terms, normalization)).square().sum() / M.square().sum())
    return error if error == error else float("inf")


def _delta(parameters: list[Tensor], terms: str, normalization: str) -> Tensor:
    A, B, *h = parameters
    return delta_weight(A, B, h[0] if h else None, terms, normalization)


def weight_difference(steps: int, rows: int) -> dict[str, Tensor]:
    """Fine-tune SmolLM2-135M on family relationships, ``steps`` of 8 examples, and return the change of two weights."""
    from pera_lab.models import load_model, load_tokenizer
    from pera_lab.recipe import load_recipe
    from pera_lab.tasks.encoding import AnswerCollator

    recipe = load_recipe("relationships-smollm2", [f"task.train_size={rows}", "task.test_size=1"])
    model, tokenizer = load_model("smollm2-135m", dtype="float32"), load_tokenizer("smollm2-135m")
    encoded = recipe.task.encode(tokenizer, recipe.build_splits().train).rows
    collate = AnswerCollator(tokenizer, model)
    block = model.model.layers[15]
    layers = {"SmolLM2, q_proj": block.self_attn.q_proj, "SmolLM2, down_proj": block.mlp.down_proj}
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    torch.manual_seed(0)
    for step in range(steps):
        batch = collate([encoded[(8 * step + i) % len(encoded)] for i in range(8)])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: layer.weight.detach() - before[name] for name, layer in layers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--difference", type=Path, help="file of weight differences; created if it does not exist")
    parser.add_argument("--output", type=Path, default=Path("docs/results/expressivity.md"))
    options = parser.parse_args()
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    start = time.perf_counter()
    if options.difference is not None and not options.difference.is_file():
        torch.save(weight_difference(40, 320), options.difference)
    rows = []
    for name, M in targets(options.size, options.difference).items():
        for r in options.r:
            errors = []
            for method in METHODS:
                found = {
                    rate: [fit(M, r, method, rate, options.steps, seed) for seed in range(options.seeds)]
                    for rate in RATES
                }
                errors.append(min(sum(x) / len(x) for x in found.values()))
            best = [eckart_young(M, r), eckart_young(M, expanded_rank(r))]
            rows.append([f"{name}, {M.shape[0]} × {M.shape[1]}", r, expanded_rank(r), *errors, *best])
            print(*rows[-1], flush=True)
    command = "python benchmarks/expressivity.py" + (" --difference FILE" if options.difference else "")
    command += (
        f" --size {options.size} --r {' '.join(map(str, options.r))} --steps {options.steps} --seeds {options.seeds}"
    )
    head = ["matrix", "r", "K", *METHODS, "best of rank r", "best of rank K"]
    lines = [
        "# Expressivity: how well a matrix can be fitted at equal r",
        "",
        " ".join((__doc__ or "").split("\n\n")[2].split()),
        *([DIFFERENCE] if options.difference else []),
        f"Rates {', '.join(f'{rate:g}' for rate in RATES)}, n = {options.seeds} seeds, {options.steps} steps. The "
        "last two columns are the optimum for that rank, from the SVD.",
        "",
        "| " + " | ".join(head) + " |",
        "| --- |" + " ---: |" * (len(head) - 1),
        *("| " + " | ".join(f"{x:.4f}" if isinstance(x, float) else str(x) for x in row) + " |" for row in rows),
        "",
        f"Made by `{command}` at commit {commit} in {time.perf_counter() - start:.0f} s; pera {pera.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, CPU, {torch.get_num_threads()} thread(s).",
        "",
    ]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
