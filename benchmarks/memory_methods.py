"""The methods of benchmarks/memory.py, each as a function from the rank to a PEFT configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations_with_replacement
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
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
from peft.tuners.vera.layer import Linear as VeraLinear
from torch import Tensor
from torch.nn.functional import linear

from pera import PeraConfig
from pera.polynomial import expanded_rank, rms
from pera.tuner import adapted_layers


class Method(NamedTuple):
    config: Callable[[int, str], PeftConfig] | None
    """From the rank and the regular expression of the targets; None trains the weights themselves."""
    ratios: Mapping[str, float] = MappingProxyType({})
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


def _loha(r: int, targets: str) -> LoHaConfig:
    """Two pairs of factors of rank r / 2: the parameters of a LoRA of rank r, which has to be even."""
    return LoHaConfig(r=r // 2, alpha=r // 2, target_modules=targets)


def _lokr(r: int, targets: str) -> LoKrConfig:
    """A factor (8, 8) times a product of rank 8 r: the parameters of a LoRA of rank r, and 64."""
    return LoKrConfig(r=8 * r, alpha=8 * r, decompose_factor=8, target_modules=targets)


def _gralora(r: int, targets: str) -> GraloraConfig:
    """Two by two blocks; r has to be even."""
    return GraloraConfig(r=r, alpha=r, gralora_k=2, target_modules=targets)


def _vera(r: int, targets: str) -> VeraConfig:
    """The parameters of a LoRA of rank r on a layer (576, 1536): its own rank and 576."""
    return VeraConfig(r=2112 * r - 576, target_modules=targets)


def _randlora(r: int, targets: str) -> RandLoraConfig:
    """About the parameters of a LoRA of rank r on a layer (576, 1536): n bases of rank 576 / n have 576 (n + 1)."""
    rank = math.ceil(576 / round(2112 * r / 576 - 1))
    return RandLoraConfig(r=rank, randlora_alpha=20 * rank, target_modules=targets)


def _frozen_rows(model: Any, draw: Callable[[Any, int, int], tuple[Tensor, Tensor]]) -> None:
    """Replace the signs of the anchors with other rows, whose root mean square is 1."""
    for layer in adapted_layers(model.get_base_model(), "default").values():
        expansion = layer.expansion["default"]
        V, U = draw(layer, *expansion.anchors.V.shape)
        layer.expansion["default"] = expansion._replace(anchors=type(expansion.anchors)(V, U))


def _gaussian_rows(layer: Any, k: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.randn(k, columns), torch.randn(k, layer.out_features)


def _singular_rows(layer: Any, k: int, columns: int) -> tuple[Tensor, Tensor]:
    """The first k right and left singular vectors of the base weight."""
    U, _, Vh = torch.linalg.svd(layer.get_base_layer().weight.detach(), full_matrices=False)
    return Vh[:k] * columns**0.5, U[:, :k].T.contiguous() * layer.out_features**0.5


def _third_degree(model: Any) -> None:
    """Add the products of three learned rows, a_i ⊙ a_j ⊙ a_k / ρ_A² and the same of B, each with a coefficient."""
    for layer in adapted_layers(model.get_base_model(), "default").values():
        A, B = layer.pera_A["default"], layer.pera_B["default"]
        index = torch.tensor(list(combinations_with_replacement(range(len(A)), 3))).unbind(1)
        layer.pera_third = torch.nn.Parameter(torch.full((len(index[0]),), ACTIVE["init_coefficients"]))
        second = layer.get_delta_weight

        def factors(A: Tensor = A, B: Tensor = B, index: Any = index, layer: Any = layer) -> tuple[Tensor, Tensor]:
            A3, B3 = (math.prod(X[i] for i in index) / rms(X) ** 2 for X in (A, B.T))
            return layer.pera_third.unsqueeze(1) * A3, B3

        def add(_: Any, inputs: Any, output: Tensor, factors: Any = factors, layer: Any = layer) -> Tensor:
            A3, B3 = factors()
            return output if layer.merged else output + inputs[0] @ A3.T @ B3

        def whole(name: str, factors: Any = factors, second: Any = second) -> Tensor:
            A3, B3 = factors()
            return second(name) + B3.T @ A3

        layer.register_forward_hook(add)
        layer.get_delta_weight = whole


def _keep_projection(model: Any) -> None:
    """Keep the product of the input with VeRA's frozen A, because the input is the same in every step."""
    for layer in (module for module in model.modules() if isinstance(module, VeraLinear)):
        A, B = layer.vera_A["default"], layer.vera_B["default"]
        kept: dict[str, Tensor] = {}

        def forward(
            x: Tensor, A: Tensor = A, B: Tensor = B, kept: dict[str, Tensor] = kept, layer: Any = layer
        ) -> Tensor:
            y: Tensor = layer.base_layer(x)
            if layer.merged:
                return y
            if kept.get("x") is not x:
                kept.update(x=x, projected=linear(x, A))
            return y + layer.vera_lambda_b["default"] * linear(layer.vera_lambda_d["default"] * kept["projected"], B)

        layer.forward = forward


METHODS |= {
    "pera-third": METHODS["pera-rms"]._replace(prepare=_third_degree),
    "anchors-16-third": METHODS["anchors-16-all"]._replace(prepare=_third_degree),
    "loha": Method(_loha),
    "lokr": Method(_lokr),
    "gralora": Method(_gralora),
    "vera": Method(_vera, prepare=_keep_projection),
    "randlora": Method(_randlora),
    "anchors-16-gaussian": METHODS["anchors-16"]._replace(prepare=partial(_frozen_rows, draw=_gaussian_rows)),
    "anchors-16-svd": METHODS["anchors-16"]._replace(prepare=partial(_frozen_rows, draw=_singular_rows)),
}
