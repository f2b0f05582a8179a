"""How much a model has stored of the facts that it was trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pera_lab.intervals import bootstrap_interval


@dataclass(frozen=True)
class Memory:
    """How much a model has stored of the facts on which it is tested. The end token after an answer is not counted."""

    tokens: int
    """Answer tokens."""
    loss: float
    """Mean of −ln p over the answer tokens, with p over the whole vocabulary."""
    confident: float
    """Share of the answer tokens with p > 0.5, which greedy decoding cannot miss."""
    information: float | None = None
    """Bits of all answers: the sum of log2 of the number of equally likely answers. None if that number is unknown."""
    bits: float | None = None
    """Stored bits: ``information`` less the loss of all answers in bits. A negative number is possible."""
    low: float | None = None
    """95 % interval of ``bits`` over facts, by bootstrap."""
    high: float | None = None
    parameters: int | None = None
    """Trained parameters of the adapter, h included. None for a base model."""
    bits_per_parameter: float | None = None


def measure_memory(information: Sequence[float | None], log_likelihoods: Sequence[Sequence[float]]) -> Memory:
    r"""What is stored of facts: Σ over facts of (information + Σ over tokens of ln p / ln 2) bits.

    Args:
        information: bits of the answer to each fact, or None where it is unknown.
        log_likelihoods: ln p of each token of each answer.
    """
    tokens = [x for fact in log_likelihoods for x in fact]
    lost = [-sum(fact) / math.log(2) for fact in log_likelihoods]
    loss, confident = -sum(tokens) / len(tokens), sum(x > -math.log(2) for x in tokens) / len(tokens)
    bits = [x for x in information if x is not None]
    if len(bits) < len(information):
        return Memory(len(tokens), loss, confident)
    low, high = bootstrap_interval(lambda known, gone: sum(known) - sum(gone), bits, lost)
    return Memory(len(tokens), loss, confident, sum(bits), sum(bits) - sum(lost), low, high)
