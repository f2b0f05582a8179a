"""What benchmarks/memory.py trains: the plans, each a list of cells with a grid of rates and seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

RATES = (0.01, 0.0316, 0.1, 0.316, 1.0)
"""The first grid of rates; an edge that is best extends it."""


@dataclass(frozen=True)
class Plan:
    """Trainings of every method in every setting: first the rates on ``choose``, then ``report`` at the best rate."""

    settings: tuple[dict[str, Any], ...]
    methods: tuple[tuple[str, int], ...]
    """Method and rank."""
    choose: tuple[int, ...] = (1000,)
    report: tuple[int, ...] = ()
    rates: tuple[float, ...] = RATES
    fixed: Mapping[str, float] = field(default_factory=dict)
    """The rate of a method where it is not chosen, such as the rate that another plan chose."""

    def cells(self) -> Iterator[dict[str, Any]]:
        for setting in self.settings:
            for method, r in self.methods:
                yield {**setting, "method": method, "r": r}


VARIANTS = (
    "lora",
    "lora-gaussian",
    "hira",
    "pera-rms",
    "pera-published",
    "pera-centred",
    "dora",
    "pera-squares",
    "pera-crosses",
    "rslora",
    "lora+4",
    "lora+16",
)
ANCHORS = ("anchors-16", "anchors-4", "anchors-4-all", "anchors-16-all", "anchors-1", "anchors-64", "anchors-16-fixed")
TESTED = ("lora", "lora-gaussian", "pera-rms", "hira", "anchors-16")
SEEDS = (1, 2, 3, 4, 5)
FRESH = (6, 7, 8, 9, 10)
"""Seeds of a second test, where the first ones suggested it."""


def codes(r: int) -> dict[str, Any]:
    """1.45 bits for each parameter of a LoRA of rank r."""
    return {"facts": "codes", "count": 512 * r}


def phonebook(r: int) -> dict[str, Any]:
    """1.57 bits for each parameter of a LoRA of rank r."""
    return {"facts": "phonebook", "count": 100 * r}


def at(r: int, *methods: str) -> tuple[tuple[str, int], ...]:
    return tuple((method, r) for method in methods)


PLANS: dict[str, Plan] = {
    **{f"variants-codes-{r}": Plan((codes(r),), at(r, *VARIANTS)) for r in (1, 2, 4)},
    **{f"anchors-codes-{r}": Plan((codes(r),), at(r, *ANCHORS)) for r in (1, 2, 4)},
    **{
        f"confirm-{name}-{r}": Plan((load(r),), at(r, *TESTED), report=SEEDS)
        for name, load in (("codes", codes), ("phonebook", phonebook))
        for r in (1, 2, 4)
    },
}

CHOSEN = {"lora": 0.0316, "pera-rms": 0.1, "hira": 0.316, "anchors-16": 0.0316}
"""Rates that the plans above chose for code words at r = 2."""
CHOSEN_1 = {"lora": 0.0316, "pera-rms": 0.0316, "hira": 0.316, "anchors-16": 0.1}
"""The same at r = 1."""


def _law(facts: str, counts: tuple[int, ...]) -> Plan:
    settings = tuple({"facts": facts, "count": count} for count in counts)
    return Plan(settings, tuple((method, r) for r in (1, 2, 4) for method in CHOSEN), report=(1,), fixed=CHOSEN)


def _far(*settings: dict[str, Any], seeds: tuple[int, ...] = (1, 2, 3)) -> Plan:
    return Plan(tuple({**codes(2), **s} for s in settings), at(2, *CHOSEN), report=seeds, fixed=CHOSEN)


PLANS |= {
    "law-codes": _law("codes", (1024, 2048, 4096, 512)),
    "law-phonebook": _law("phonebook", (50, 100, 200, 400)),
    "steps": _far({"steps": 6400}, {"steps": 400}),
    "overload": _far({"count": 2048}),
    "settings": _far(
        {"dtype": "bfloat16"},
        {"dtype": "nf4"},
        {"batch": 128},
        {"weight_decay": 0.01},
        {"dropout": 0.1},
        {"facts": "codes-reworded"},
        {"base": "random"},
        seeds=(1,),
    ),
    "third": Plan((phonebook(2),), at(2, "pera-third", "anchors-16-all", "anchors-16-third"), report=(1, 2, 3)),
    "mlp": Plan(({"facts": "codes", "count": 1536, "site": "mlp", "steps": 400},), at(1, *CHOSEN), report=(1,)),
    "earlier": Plan(
        ({"facts": "codes", "count": 256, "site": "down-28", "steps": 400},),
        at(1, *CHOSEN),
        report=(1, 2, 3),
        fixed=CHOSEN_1,
    ),
    "small": Plan(({"facts": "codes", "count": 496, "site": "down-3", "base": "small"},), at(2, *CHOSEN), report=SEEDS),
    "eight": Plan((codes(8),), at(8, "lora", "pera-rms", "anchors-16"), report=(1, 2, 3), rates=(0.01, 0.0316, 0.1)),
    "others-codes-2": Plan((codes(2),), at(2, "lokr", "loha", "gralora", "randlora", "vera", "full")),
    "frozen-codes-2": Plan((codes(2),), at(2, "anchors-16-gaussian", "anchors-16-svd")),
    **{
        f"ranks-{name}-{r}": Plan((load(r),), tuple(("lora", rank) for rank in ranks), report=SEEDS)
        for name, load in (("codes", codes), ("phonebook", phonebook))
        for r, ranks in ((1, (2, 3, 4, 6)), (2, (3, 4, 6, 8)))
    },
}

BOTH = "anchors-16-all"
ZEROED = (11, 12, 13)
"""Seeds of runs that are also scored with the coefficients at zero. Earlier runs were not."""
PLANS |= {
    **{
        f"zeroed-{name}": Plan((load(2),), at(2, *rates), report=ZEROED, fixed=rates)
        for name, load, rates in (
            ("codes", codes, {"pera-rms": 0.1, "anchors-16": 0.0316, BOTH: 0.1}),
            ("phonebook", phonebook, {"pera-rms": 0.0316, "anchors-16": 0.1, BOTH: 0.1}),
        )
    },
    **{
        f"both-{name}-{r}": Plan((load(r),), at(r, BOTH), report=SEEDS)
        for name, load, r in (
            ("codes", codes, 1),
            ("codes", codes, 2),
            ("codes", codes, 4),
            ("phonebook", phonebook, 1),
            ("phonebook", phonebook, 4),
        )
    },
    "both-phonebook-2": Plan((phonebook(2),), at(2, BOTH, "lora", "hira", "pera-rms", "anchors-16"), report=FRESH),
}
