"""What is measured: adapters on a single layer or on a language model, all on one and the same frozen base."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear

from cost import Shape
from pera import PeraConfig
from pera.polynomial import coefficient_pairs, expanded_rank

BASE = "base"


class Subject(NamedTuple):
    """A base model and what is done with a model made of it."""

    base: nn.Module
    targets: list[str]
    """Last part of the names of the layers that are adapted."""
    tokens: int
    forward: Callable[[nn.Module], Any]
    step: Callable[[nn.Module], None]
    decode: Callable[[nn.Module], None] | None = None


class Candidate(NamedTuple):
    """A way to adapt a model."""

    name: str
    adapt: Callable[[nn.Module, list[str]], Any]
    """Changes a model in place and gives the adapted one, from the model and ``Subject.targets``."""
    rank: int
    """The K of the cost model, 0 for the base alone."""
    baseline: str
    """What it is divided by: PEFT's LoRA of the same r."""


def candidates(*, ranks: tuple[int, ...], neighbours: tuple[int, ...], variants: tuple[int, ...]) -> list[Candidate]:
    """The base; LoRA and PERA at every rank; at ``neighbours`` LoRA of rank K, DoRA, HiRA and the plain reference;
    at ``variants`` PERA's options."""
    found = [Candidate(BASE, lambda model, targets: model, 0, f"lora r={min(ranks)}")]
    for r in ranks:
        lora, K = f"lora r={r}", expanded_rank(r)
        rows: list[tuple[str, Any, int]] = [
            (lora, LoraConfig(r=r, lora_alpha=r), r),
            (f"pera r={r}", PeraConfig(r=r), K),
        ]
        if r in variants:
            rows += [
                (f"pera r={r}, rms", PeraConfig(r=r, normalization="rms"), K),
                (f"pera r={r}, squares", PeraConfig(r=r, terms="square"), 2 * r),
            ]
        if r in neighbours:
            rows += [
                (f"lora r={K} (K of {r})", LoraConfig(r=K, lora_alpha=K), K),
                (f"dora r={r}", LoraConfig(r=r, lora_alpha=r, use_dora=True), r),
                (f"hira r={r}", HiraConfig(r=r), r),
            ]
            found.append(Candidate(f"plain r={r}", partial(_plain, r), K, lora))
        found += [Candidate(name, partial(_adapt, config), rank, lora) for name, config, rank in rows]
    return found


def shared(base: nn.Module) -> nn.Module:
    """A copy of a model that shares all weights with it."""
    return copy.deepcopy(base, memo={id(p): p for p in base.parameters()})


def shapes(model: nn.Module, targets: list[str], rank: int) -> list[Shape]:
    """The frozen matrices of a base model for the cost model, ``rank`` on those that are adapted."""
    return [
        Shape(*module.weight.shape, rank if name.rpartition(".")[2] in targets else 0)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def _adapt(config: PeftConfig, model: nn.Module, targets: list[str]) -> nn.Module:
    """Adapt with PEFT, factors in the dtype of the base, at a point where no product is zero."""
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
    """The equation as one would first write it: every forward builds all r × r products of rows and takes the upper
    triangle, and autograd keeps what it made on the way. It stands here to compare with."""

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
