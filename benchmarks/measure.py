"""Measure time in interleaved rounds, peak memory, and what is kept for backward."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Timing(NamedTuple):
    """Seconds of one candidate, and its ratios over a baseline: medians and quartiles."""

    seconds: float
    ratio: float
    low: float
    high: float


def interleaved(
    candidates: dict[str, Callable[[], object]], repetitions: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each call of each candidate.

    Every round calls all candidates, starting at a different one, so a slow minute of the machine affects all of them.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-warm_up, repetitions):
        for position in range(len(names)):
            name = names[(position + round_) % len(names)]
            _synchronize()
            start = time.perf_counter()
            candidates[name]()
            _synchronize()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def against(seconds: dict[str, list[float]], name: str, baseline: str) -> Timing:
    """Return the timing of ``name`` over ``baseline``, with the ratio taken round by round."""
    ratios = sorted(a / b for a, b in zip(seconds[name], seconds[baseline], strict=True))
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Timing(statistics.median(seconds[name]), statistics.median(ratios), low, high)


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak of allocated bytes during a call, above what was allocated before it.

    On the CPU it comes from the events of torch's allocator: exact and repeatable, without what libraries allocate.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    total = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def saved_bytes(call: Callable[[], object], own: set[int]) -> int:
    """Return the bytes a forward keeps for backward, each storage once, without those at the addresses in ``own``
    (the weights of the base)."""
    saved: dict[int, Any] = {}

    def pack(t: Tensor) -> None:  # a kept tensor would hold the graph that holds it
        storage = t.untyped_storage()  # kept, so that its address is not reused
        saved.setdefault(storage.data_ptr(), storage)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        result = call()
    kept = sum(storage.nbytes() for address, storage in saved.items() if address not in own)
    del result
    return kept


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
