"""Is an adapter full? The rank that its ΔW needs, the bits that it learned, and one sentence about both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pera_lab.diagnose.cuts import Cuts, ranks_below
from pera_lab.files import checked, number_or_nan

TOLERANCE = 0.05
"""Share of an adapter's gain that a cut to a lower rank may lose."""
ELICITED = 0.1
"""Bits per trained parameter below which an adapter is not full, even if it uses its whole rank."""
TAUGHT = 0.5
"""Bits per trained parameter from which on an adapter that uses its whole rank is full."""
LEARNED = 0.05
"""Share of the loss of :attr:`Fullness.base` below which nothing is left to learn."""

Verdict = Literal["enough", "full", "undecided"]
"""The adapter or a smaller one would do; the adapter is full; or the measurements do not decide."""


@dataclass(frozen=True)
class Learned:
    """Excess description length: the bits by which the final adapter predicts the first epoch better than it was
    predicted while it was learned ("Bits That Count", ICML 2026; arXiv 2601.04728).

    bits = (Σ loss of each batch before the step on it − labels · loss of the final adapter on held-out examples) / ln 2
    """

    labels: int
    """Labels in the first epoch, or in the training if it was shorter."""
    bits: float
    parameters: int
    """Trained parameters."""

    @property
    def per_parameter(self) -> float:
        """Bits per trained parameter."""
        return self.bits / self.parameters


@dataclass(frozen=True)
class Fullness:
    """How much of its rank an adapter uses, measured on held-out examples."""

    r: int
    """The r that was trained, the largest of all layers."""
    rank: int
    """The largest rank that a ΔW can have: r for a LoRA, the expanded rank for PERA."""
    effective_rank: float
    """Mean over the layers of exp of the entropy of σ_i² / Σσ², weighted by ‖ΔW‖_F²."""
    loss: float
    """Loss per label of the adapter."""
    loss_at_rank: dict[int, float]
    """Loss per label with every ΔW cut to a rank. At 0 the adapter has no ΔW."""
    frequency_loss: float
    """Loss per label of a guess that knows only how often each label occurs."""
    learned: Learned | None
    not_learned: str = ""
    """Why ``learned`` is not known."""

    def __post_init__(self) -> None:
        if 0 not in self.loss_at_rank:
            raise ValueError("loss_at_rank lacks rank 0")

    @property
    def base(self) -> float:
        """The loss that the adapter is compared with: without ΔW, or of the label frequencies if that is lower.

        A model that was not taught the form of the answers can be far worse than the frequencies. Almost any rank would
        keep almost all of a gain over it.
        """
        return min(self.loss_at_rank[0], self.frequency_loss)

    @property
    def gain(self) -> float:
        """How far the adapter lowers the loss per label below :attr:`base`."""
        return self.base - self.loss

    @property
    def uses_its_rank(self) -> bool:
        """Whether the adapter needs more than half of r."""
        return self.needed is not None and 2 * self.needed > self.r

    @property
    def tolerated(self) -> float:
        """The highest loss that keeps the gain: :data:`TOLERANCE` of the gain above the loss."""
        return self.loss + TOLERANCE * self.gain

    @property
    def needed(self) -> int | None:
        """The least measured rank from which on no cut exceeds the tolerated loss; None without a gain."""
        if not self.gain > 0:
            return None
        needed = self.rank
        for rank in sorted(self.loss_at_rank, reverse=True):
            if not self.loss_at_rank[rank] <= self.tolerated:
                break
            needed = rank
        return needed

    @property
    def verdict(self) -> Verdict:
        """Whether the adapter or a smaller one would do, or a larger adapter would learn more.

        A LoRA of the needed rank suffices if that is at most r / 2, or if the adapter learned few bits per parameter.
        The adapter suffices as it is if hardly any loss is left. Otherwise it is full if it learned many bits per
        parameter.
        """
        if self.needed is None:
            return "undecided"
        if not self.uses_its_rank or self.loss <= LEARNED * self.base:
            return "enough"
        if self.learned is None or ELICITED <= self.learned.per_parameter < TAUGHT:
            return "undecided"
        return "enough" if self.learned.per_parameter < ELICITED else "full"

    def sentence(self) -> str:
        """The verdict in words, with the measurements that it follows from."""
        needed = self.needed
        if needed is None:
            return (
                f"Undecided: the loss, {self.loss:.4g}, is no lower than without ΔW or with label frequencies alone, "
                f"{self.base:.4g}."
            )
        if not self.uses_its_rank:
            kept = 1 - (self.loss_at_rank[needed] - self.loss) / self.gain
            return f"A LoRA of rank {needed} would do: cut to that rank, the adapter keeps {_share(kept)} of its gain."
        below = max(rank for rank in self.loss_at_rank if rank < needed)
        lost = (self.loss_at_rank[below] - self.loss) / self.gain
        uses = f"a cut to rank {below} loses {_share(min(lost, 1.0))} of the gain" if below else "it uses its rank of 1"
        bits = f"it learned {self.learned.per_parameter:.2g} bits per parameter" if self.learned else ""
        if self.verdict == "full":
            return f"The adapter is full: {uses}, and {bits}. Anchors, a larger rank or more layers will store more."
        if self.verdict == "undecided":
            why = f"{bits}, between {ELICITED} and {TAUGHT}" if bits else "the bits that it learned are unknown"
            return f"Undecided: {uses}, and {why}. Train longer or with a larger rank to see whether the loss falls."
        if self.loss <= LEARNED * self.base:
            return f"The adapter suffices: of a loss of {self.base:.3g}, {self.loss:.2g} is left. But {uses}."
        return f"A LoRA of rank {needed} would do: {uses}, but {bits}, which is far from full."


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def fullness(cuts: Cuts, loss: Callable[[], float], frequency_loss: float, learned: Learned | str) -> Fullness:
    """Measure the loss of an adapter with every ΔW cut to 0, 1, 2, 3, 4, 6, 8, … directions, and whole.

    Args:
        cuts: the adapter.
        loss: computes its loss per label on held-out examples.
        frequency_loss: loss per label there of a guess that knows only how often each label occurs.
        learned: the bits that it learned, or why they are not known.
    """
    whole = loss()
    at_rank = {}
    for rank in ranks_below(cuts.rank):
        with cuts.at(rank):
            at_rank[rank] = loss()
    bits, reason = (learned, "") if isinstance(learned, Learned) else (None, learned)
    return Fullness(
        r=cuts.r,
        rank=cuts.rank,
        effective_rank=cuts.effective_rank,
        loss=whole,
        loss_at_rank=at_rank,
        frequency_loss=frequency_loss,
        learned=bits,
        not_learned=reason,
    )


@dataclass(frozen=True)
class FirstEpoch:
    """An entry ``first_epoch`` of ``metrics.jsonl``: a part of the first epoch, which ends with the line's step."""

    since: int
    """The step after which it begins."""
    labels: int
    nats: float
    """Loss of each batch before the step on it, summed over the labels."""


def learned(lines: list[dict[str, Any]], loss: float, parameters: int) -> Learned | str:
    """The bits that an adapter learned, or a sentence that says why they are not known.

    Args:
        lines: the lines of ``metrics.jsonl``.
        loss: loss per label of the final adapter on held-out examples.
        parameters: trained parameters.
    """
    parts: list[FirstEpoch] = []
    last, epoch = 0, 0.0
    for line in lines:
        begin = line["step"]
        if "first_epoch" in line:
            name = f"metrics.jsonl: first_epoch of step {line['step']}"
            parts.append(checked(line["first_epoch"], FirstEpoch, name))
            begin = parts[-1].since
        if parts and epoch < 1 and begin != last:
            return f"The training was resumed, and the losses of steps {last + 1} to {begin} are lost."
        last, epoch = line["step"], number_or_nan(line.get("epoch"))
    if not parts or parts[0].since:
        return "metrics.jsonl does not have the losses of the whole first epoch. A new training records them."
    labels, nats = sum(part.labels for part in parts), sum(part.nats for part in parts)
    return Learned(labels, (nats - labels * loss) / math.log(2), parameters)
