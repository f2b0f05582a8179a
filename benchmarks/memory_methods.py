"""The methods of benchmarks/memory.py, each as a function from the rank to a PEFT configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from peft import (
    GraloraConfig,
    HiraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    RandLoraConfig,
    VeraConfig,
)

from pera import PeraConfig
from pera.polynomial import expanded_rank


class Method(NamedTuple):
    config: Callable[[int, str], PeftConfig] | None
    """From the rank and the regular expression of the targets; None trains the weights themselves."""
    ratios: dict[str, float] = {}
    """Learning rates as multiples of the run's, by a part of the parameter's name."""
    prepare: Callable[[Any], None] = lambda model: None
    """Changes the adapted model before training."""

    def ratio(self, parameter: str) -> float:
        return next((ratio for part, ratio in self.ratios.items() if part in parameter), 1.0)


def _lora(r: int, targets: str, rank: Callable[[int], int] = int, **options: Any) -> LoraConfig:
    return LoraConfig(r=rank(r), lora_alpha=rank(r), target_modules=targets, **options)


def _pera(r: int, targets: str, **options: Any) -> PeraConfig:
    return PeraConfig(r=r, target_modules=targets, **options)


def _hira(r: int, targets: str) -> HiraConfig:
    return HiraConfig(r=r, target_modules=targets)


ACTIVE = {"normalization": "rms", "init_coefficients": 0.3}

METHODS = {
    "full": Method(None),
    "lora": Method(_lora),
    "lora-gaussian": Method(partial(_lora, init_lora_weights="gaussian")),
    "lora-K": Method(partial(_lora, rank=expanded_rank)),
    "rslora": Method(partial(_lora, use_rslora=True)),
    "lora+4": Method(_lora, {"lora_B": 4.0}),
    "lora+16": Method(_lora, {"lora_B": 16.0}),
    "dora": Method(partial(_lora, use_dora=True)),
    "hira": Method(_hira),
    "pera-published": Method(_pera),
    "pera-rms": Method(partial(_pera, **ACTIVE)),
    "pera-centred": Method(partial(_pera, normalization="centred", init_coefficients=0.3)),
    "pera-squares": Method(partial(_pera, terms="square", **ACTIVE)),
    "pera-crosses": Method(partial(_pera, terms="cross", **ACTIVE)),
    **{f"anchors-{k}": Method(partial(_pera, terms="none", anchors=k)) for k in (1, 4, 16, 64)},
    **{f"anchors-{k}-fixed": Method(partial(_pera, terms="none", anchors=k, coefficients="fixed")) for k in (4, 16)},
    **{f"anchors-{k}-all": Method(partial(_pera, anchors=k, **ACTIVE)) for k in (1, 4, 16)},
}
