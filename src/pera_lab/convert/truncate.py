"""Truncation: all layers of a LoRA cut to one smaller rank, and what that loses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pera.folding import Folded
from pera.lora import balanced_factors, factored_svd
from pera.tuner.layers import PeraLinear

FLOAT32_ROUNDING = torch.finfo(torch.float32).eps ** 2
"""Share of ‖ΔW‖_F² that is lost when ΔW is rounded to float32, the dtype in which adapters are written."""


@dataclass(frozen=True)
class Truncation:
    """What an adapter loses when all its layers are cut to one rank."""

    rank: int
    expanded_rank: int
    """The largest K of the layers before the cut."""
    discarded: dict[str, float]
    """Discarded share of ‖ΔW‖_F² by layer."""
    total_discarded: float
    """Discarded share of the sum of ‖ΔW‖_F² over all layers."""
    output_change: dict[str, float] = field(default_factory=dict)
    """‖x (ΔW − ΔW′)ᵀ‖_F / ‖x ΔWᵀ‖_F over the tokens of the prompts, by linear layer; see :func:`measured`."""

    @property
    def lossless(self) -> bool:
        """Whether every layer loses at most what rounding its weights to float32 loses."""
        return max(self.discarded.values()) <= FLOAT32_ROUNDING

    def sentence(self) -> str:
        """The result in one line."""
        worst = max(self.discarded, key=lambda name: self.discarded[name])
        parts = [
            f"rank {self.expanded_rank} → {self.rank}, {100 * self.total_discarded:.2g} % of the energy discarded "
            f"(at most {100 * self.discarded[worst]:.2g} %, in {worst})"
        ]
        if self.output_change:
            layer = max(self.output_change, key=lambda name: self.output_change[name])
            parts.append(f"outputs of a layer change by at most {100 * self.output_change[layer]:.2g} %, in {layer}")
        return "; ".join(parts)


def truncate(
    layers: dict[str, Folded], *, max_rank: int | None = None, energy: float | None = None
) -> tuple[dict[str, Folded], Truncation]:
    """Cut all layers to one rank. Each layer becomes its best approximation of that rank (Eckart and Young).

    Args:
        layers: the layers by name, from :func:`pera.folding.folded_layers`.
        max_rank: the largest rank, at least 1.
        energy: the share of ‖ΔW‖_F² to keep in every layer, above 0 and at most 1. The rank is the smallest that
            keeps it. Give either ``max_rank`` or ``energy``.

    Returns:
        The layers, and the loss without ``output_change``.
    """
    found = {name: factored_svd(layer.A, layer.B) for name, layer in layers.items()}
    spectra = {name: S.square() for name, (_, S, _) in found.items()}
    if energy is not None:
        max_rank = max(_rank_for(spectrum, energy) for spectrum in spectra.values())
    assert max_rank is not None
    rank = min(max_rank, max(spectrum.shape[-1] for spectrum in spectra.values()))
    lost = {name: float(spectrum[..., rank:].sum()) for name, spectrum in spectra.items()}
    whole = {name: float(spectrum.sum()) for name, spectrum in spectra.items()}
    cut = {
        name: Folded(layer.layer, layer.kind, *balanced_factors(*found[name], rank)) for name, layer in layers.items()
    }
    total = sum(whole.values())
    return cut, Truncation(
        rank=rank,
        expanded_rank=max(layer.A.shape[-2] for layer in layers.values()),
        discarded={name: lost[name] / whole[name] if whole[name] else 0.0 for name in layers},
        total_discarded=sum(lost.values()) / total if total else 0.0,
    )


def _rank_for(spectrum: Tensor, energy: float) -> int:
    """The smallest rank that keeps the share ``energy`` of each row of squared singular values."""
    tails = spectrum.flip(-1).cumsum(-1).flip(-1)  # entry k: the energy that a cut to rank k discards
    kept = tails <= (1 - energy) * tails[..., :1]
    needed = torch.where(kept.any(-1), kept.int().argmax(-1), spectrum.shape[-1])
    return max(1, int(needed.max()))


@contextmanager
def measured(layers: dict[str, Folded], cut: dict[str, Folded]) -> Iterator[dict[str, float]]:
    """Context manager that measures how a truncation changes the outputs of linear layers while the model runs.

    Args:
        layers: the layers of the running model, from :func:`pera.folding.folded_layers`.
        cut: the truncated layers.

    Yields:
        A dictionary that is filled at the end of the block. For each linear layer that was called it holds the norm
        of the change of the adapter's output divided by the norm of that output.
    """
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in layers}
    changes: dict[str, float] = {}

    def hook(name: str) -> Any:
        (*_, A, B), (*_, A_cut, B_cut) = layers[name], cut[name]

        def measure(module: Any, args: tuple[Any, ...]) -> None:
            x = args[0].detach().cpu().double()
            output = x @ A.mT @ B.mT
            change = output - x @ A_cut.mT @ B_cut.mT
            sums[name] += torch.stack([change.square().sum(), output.square().sum()])

        return measure

    with ExitStack() as stack:
        for name, (layer, kind, *_) in layers.items():
            if issubclass(kind, PeraLinear):
                module: Any = layer
                stack.callback(module.register_forward_pre_hook(hook(name)).remove)
        yield changes
    for name, (change, output) in sums.items():
        if output > 0:
            changes[name] = float((change / output).sqrt())
