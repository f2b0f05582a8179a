"""What is measured: adapters on a single layer or on a language model, on one shared frozen base."""

from __future__ import annotations

import copy
import importlib
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear

from cost import Shape
from pera import PeraConfig
from pera.polynomial import coefficient_pairs, expanded_rank
from pera.tuner import PeraLinear

BASE = "base"
ANCHORS = 4
"""Frozen rows of the candidates with anchors."""


class Subject(NamedTuple):
    """A base model and the calls to time on its adapted models."""

    base: nn.Module
    targets: list[str]
    """Last component of the names of the adapted layers."""
    tokens: int
    forward: Callable[[nn.Module], Any]
    step: Callable[[nn.Module], None]
    decode: Callable[[nn.Module], None] | None = None


class Candidate(NamedTuple):
    """A way to adapt a model."""

    name: str
    adapt: Callable[[nn.Module, list[str]], Any]
    """Adapts a model in place and returns it, given the model and ``Subject.targets``."""
    rank: int
    """K of the cost model, 0 for the base."""
    baseline: str
    """The candidate it is divided by: PEFT's LoRA of the same r."""


def candidates(*, ranks: tuple[int, ...], neighbours: tuple[int, ...], variants: tuple[int, ...]) -> list[Candidate]:
    """Return the base and, for each rank, LoRA, PERA and PERA with rms.

    Args:
        ranks: all values of r.
        neighbours: the r that also have PERA with anchors, LoRA of both ranks K, DoRA, HiRA and the plain reference.
        variants: the r that also have PERA with squares only.
    """
    found = [Candidate(BASE, lambda model, targets: model, 0, f"lora r={min(ranks)}")]
    for r in ranks:
        lora, K = f"lora r={r}", expanded_rank(r)
        rows: list[tuple[str, Any, int]] = [
            (lora, LoraConfig(r=r, lora_alpha=r), r),
            (f"pera r={r}", PeraConfig(r=r), K),
            (f"pera r={r}, rms", PeraConfig(r=r, normalization="rms"), K),
        ]
        if r in variants:
            rows.append((f"pera r={r}, squares", PeraConfig(r=r, terms="square"), 2 * r))
        if r in neighbours:
            anchored = expanded_rank(r, "none", ANCHORS)
            rows += [
                (f"pera r={r}, {ANCHORS} anchors", PeraConfig(r=r, terms="none", anchors=ANCHORS), anchored),
                (f"lora r={anchored} (K of anchors)", LoraConfig(r=anchored, lora_alpha=anchored), anchored),
                (f"lora r={K} (K of {r})", LoraConfig(r=K, lora_alpha=K), K),
                (f"dora r={r}", LoraConfig(r=r, lora_alpha=r, use_dora=True), r),
                (f"hira r={r}", HiraConfig(r=r), r),
            ]
            found.append(Candidate(f"plain r={r}", partial(_plain, r), K, lora))
        found += [Candidate(name, partial(_adapt, config), rank, lora) for name, config, rank in rows]
    return found


def others(checkout: Path | None) -> list[Candidate]:
    """Return PERA of r = 8 with the operator of another checkout of pera, without and with rms."""
    if checkout is None:
        return []
    operator = _operator_of(checkout)
    rows = (("", PeraConfig(r=8)), (", rms", PeraConfig(r=8, normalization="rms")))
    return [
        Candidate(f"other r=8{name}", partial(_adapt_with, operator, config), expanded_rank(8), "lora r=8")
        for name, config in rows
    ]


def _operator_of(checkout: Path) -> Callable[..., Tensor]:
    """Import ``pera.linear`` of a checkout next to the installed one, and return its ``pera_linear``."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "pera"}
    package = types.ModuleType("pera")  # without the package's own imports, which would register it with PEFT
    package.__path__ = [str(checkout / "src" / "pera")]
    sys.modules["pera"] = package
    try:
        operator: Callable[..., Tensor] = importlib.import_module("pera.linear").pera_linear
        return operator
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "pera"]:
            del sys.modules[name]
        sys.modules.update(ours)


def _adapt_with(operator: Callable[..., Tensor], config: PeraConfig, model: nn.Module, targets: list[str]) -> nn.Module:
    class Layer(PeraLinear):
        def _applied(self, adapter_name: str, x: Tensor, base: Tensor | None) -> Tensor:
            terms, normalization, _ = self.expansion[adapter_name]
            options = {"terms": terms, "normalization": normalization, "scaling": self.scaling[adapter_name]}
            return operator(x, *self.factors(adapter_name), base=base, **options)

    adapted = _adapt(config, model, targets)
    for module in adapted.modules():
        if isinstance(module, PeraLinear):
            module.__class__ = Layer
    return adapted


def shared(base: nn.Module) -> nn.Module:
    """Return a copy of a model that shares all weights with it."""
    return copy.deepcopy(base, memo={id(p): p for p in base.parameters()})


def shapes(model: nn.Module, targets: list[str], rank: int) -> list[Shape]:
    """Return the frozen matrices of a base model for the cost model, with ``rank`` on the adapted ones."""
    return [
        Shape(module.out_features, module.in_features, rank if name.rpartition(".")[2] in targets else 0)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def _adapt(config: PeftConfig, model: nn.Module, targets: list[str]) -> nn.Module:
    """Adapt with PEFT, with factors in the dtype of the base and no product at zero."""
    config = copy.deepcopy(config)
    config.target_modules = set(targets)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and ("_B." in name or "_h." in name):
            nn.init.normal_(parameter, std=0.02)
    return adapted


def _plain(r: int, model: nn.Module, targets: list[str]) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            model.set_submodule(name, PlainPera(module, r))
    return model


class PlainPera(nn.Module):
    """The textbook implementation, for comparison: every forward builds all r × r products and takes the upper
    triangle. Autograd keeps the intermediate results."""

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__()
        dtype = base.weight.dtype
        self.base = base
        self.A = nn.Parameter(torch.randn(r, base.in_features, dtype=dtype) / base.in_features**0.5)
        self.B = nn.Parameter(0.02 * torch.randn(base.out_features, r, dtype=dtype))
        pairs = coefficient_pairs(r, "all")
        self.h = nn.Parameter(0.02 * torch.randn(len(pairs), dtype=dtype))
        self.register_buffer("pairs", torch.tensor(pairs).T, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        i, j = self.pairs
        A_hat = torch.cat([self.A, self.h[:, None] * (self.A[:, None] * self.A[None])[i, j]])
        B_hat = torch.cat([self.B, (self.B[:, :, None] * self.B[:, None])[:, i, j]], 1)
        return self.base(x) + linear(linear(x, A_hat), B_hat)
