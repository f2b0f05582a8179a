"""Fewer ranks: the best approximation of a LoRA's ΔW = B A by one of smaller rank, from its factors alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pera.lora import Folded, balanced_factors, factored_svd
from pera.tuner.layers import PeraLinear

FLOAT32_ROUNDING = torch.finfo(torch.float32).eps ** 2
"""Share of ‖ΔW‖_F² that is lost when ΔW is rounded to float32, in which adapters are written."""


@dataclass(frozen=True)
class Truncation:
    """What an adapter loses when all its layers are cut to one rank."""

    rank: int
    expanded_rank: int
    """The largest K of the layers."""
    discarded: dict[str, float]
    """By layer, the share of ‖ΔW‖_F² that is left out."""
    total_discarded: float
    """The share of Σ ‖ΔW‖_F² over all layers."""
    output_change: dict[str, float] = field(default_factory=dict)
    """By linear layer, ‖x (ΔW − ΔW′)ᵀ‖_F / ‖x ΔWᵀ‖_F over the tokens of the prompts; see :func:`measured`."""

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
            parts.append(f"outputs of a layer changed by at most {100 * self.output_change[layer]:.2g} %, in {layer}")
        return "; ".join(parts)


def truncate(
    layers: dict[str, Folded], *, max_rank: int | None = None, energy: float | None = None
) -> tuple[dict[str, Folded], Truncation]:
    """All layers cut to one rank: ``max_rank``, or the least that keeps the share ``energy`` of ‖ΔW‖_F² in every
    layer.

    Args:
        layers: the layers by name, as :func:`pera.lora.folded_layers` gives them.
        max_rank: the largest rank, at least 1.
        energy: a share above 0, at most 1; not together with ``max_rank``.

    Returns:
        The layers, and what is lost, without ``output_change``.
    """
    found = {name: factored_svd(layer.A, layer.B) for name, layer in layers.items()}
    spectra = {name: S.square() for name, (_, S, _) in found.items()}
    if energy is not None:
        max_rank = max(_rank_for(spectrum, energy) for spectrum in spectra.values())
    assert max_rank is not None
    longest = max(spectrum.shape[-1] for spectrum in spectra.values())
    rank = min(max_rank, longest)
    lost = {name: float(spectrum[..., rank:].sum()) for name, spectrum in spectra.items()}
    whole = {name: float(spectrum.sum()) for name, spectrum in spectra.items()}
    cut = {name: Folded(layer.layer, *balanced_factors(*found[name], rank)) for name, layer in layers.items()}
    total = sum(whole.values())
    return cut, Truncation(
        rank=rank,
        expanded_rank=max(layer.A.shape[-2] for layer in layers.values()),
        discarded={name: lost[name] / whole[name] if whole[name] else 0.0 for name in layers},
        total_discarded=sum(lost.values()) / total if total else 0.0,
    )


def _rank_for(spectrum: Tensor, energy: float) -> int:
    """The least rank that keeps the share ``energy`` of the sum of each row of squared singular values."""
    tails = spectrum.flip(-1).cumsum(-1).flip(-1)  # what a cut before each value would discard
    kept = tails <= (1 - energy) * tails[..., :1]
    needed = torch.where(kept.any(-1), kept.int().argmax(-1), spectrum.shape[-1])
    return max(1, int(needed.max()))


@contextmanager
def measured(layers: dict[str, Folded], cut: dict[str, Folded]) -> Iterator[dict[str, float]]:
    """While the model runs, measure how far the outputs of its linear layers change by the cut.

    Yields:
        A dictionary that holds, when the block has ended, for each linear layer that was called the norm of the
        change of the adapter's output over the norm of that output.
    """
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in layers}
    changes: dict[str, float] = {}

    def hook(name: str) -> Any:
        (_, A, B), (_, A_cut, B_cut) = layers[name], cut[name]

        def measure(module: Any, args: tuple[Any, ...]) -> None:
            x = args[0].detach().cpu().double()
            output = x @ A.mT @ B.mT
            change = output - x @ A_cut.mT @ B_cut.mT
            sums[name] += torch.stack([change.square().sum(), output.square().sum()])

        return measure

    with ExitStack() as stack:
        for name, (layer, *_) in layers.items():
            if isinstance(layer, PeraLinear):
                stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        yield changes
    for name, (change, output) in sums.items():
        if output > 0:
            changes[name] = float((change / output).sqrt())
