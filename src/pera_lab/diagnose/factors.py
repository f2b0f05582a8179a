"""Diagnosis of an adapter from its factors alone: norms of its parts, spectrum, effective rank."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, fields
from itertools import groupby

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from pera.anchors import Anchors
from pera.errors import UserError
from pera.polynomial import Normalization, Terms, expand_A, expand_B, num_products, squares_and_crosses
from pera.tuner import ParamWrapper, PeraConfig, PeraLayer, check_speed
from pera.tuner.saved import saved_factors
from pera_lab.adapters import Adapter


@dataclass(frozen=True)
class LayerDiagnosis:
    """Diagnosis of one adapted layer. Norms are Frobenius norms of parts of ΔW, including the scale s.

    The parts are not orthogonal. Their squared norms do not add up, and a ratio may exceed 1.
    """

    out_features: int
    in_features: int
    r: int
    expanded_rank: int
    norm: float
    """‖ΔW‖_F."""
    linear: float
    """‖s BA‖_F."""
    square: float
    """Norm of the part that the squares b_i ⊙ b_i contribute."""
    cross: float
    """Norm of the part that the crosses b_i ⊙ b_j, i < j, contribute."""
    high_order: float
    """Norm of squares and crosses together."""
    anchors: float
    """Norm of the part that the crosses with frozen rows contribute."""
    ones_weight: float
    """Share of the squared norm of the high-order part along the direction 1·1ᵀ, from 0 to 1."""
    singular_values: list[float]
    """The first min(K, out_features, in_features) singular values of ΔW in descending order; the others are zero."""

    @property
    def high_order_ratio(self) -> float:
        """‖high-order part‖_F / ‖s BA‖_F. Infinite if only the linear part is zero, 0 if both are."""
        return _ratio(self.high_order, self.linear)

    @property
    def square_ratio(self) -> float:
        """‖square part‖_F / ‖s BA‖_F."""
        return _ratio(self.square, self.linear)

    @property
    def cross_ratio(self) -> float:
        """‖cross part‖_F / ‖s BA‖_F."""
        return _ratio(self.cross, self.linear)

    @property
    def anchor_ratio(self) -> float:
        """‖part of the anchors‖_F / ‖s BA‖_F."""
        return _ratio(self.anchors, self.linear)

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖_F² / σ₁². At most the rank, and insensitive to small singular values. 0 for ΔW = 0."""
        energy = [value * value for value in self.singular_values]
        return sum(energy) / energy[0] if energy[0] else 0.0

    @property
    def effective_rank(self) -> float:
        """:func:`effective_rank` of ΔW."""
        return effective_rank(torch.tensor(self.singular_values, dtype=torch.float64))


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of σ_i² / Σσ². k for k equal singular values, 0 if all are zero.

    Each direction counts by its share of ‖ΔW‖_F², so many tiny singular values add little.
    """
    energy = singular_values.square()
    total = energy.sum()
    return float(torch.special.entr(energy / total).sum().exp()) if total > 0 else 0.0


@torch.no_grad()
def diagnose_layer(
    A: Tensor,
    B: Tensor,
    h: Tensor | None,
    terms: Terms = "all",
    normalization: Normalization = "none",
    anchors: Anchors | None = None,
    scaling: float = 1.0,
) -> LayerDiagnosis:
    """Diagnose one layer in float64, without building ΔW.

    With B̂ = Q_B R_B and Âᵀ = Q_A R_A, ΔW has the singular values of s R_B R_Aᵀ, and each part of ΔW has the norm of
    the same part of s R_B R_Aᵀ. The cost is O((m + n) K²).

    Args:
        A: ``(r, in_features)``.
        B: ``(out_features, r)``.
        h: coefficients, ``(num_coefficients(r, terms, k),)``; None means 1 for every term.
        terms: the products that take part; see :mod:`pera.polynomial`.
        normalization: how the products are normalized; see :mod:`pera.polynomial`.
        anchors: the frozen rows that take part; see :mod:`pera.anchors`.
        scaling: s = α / r.

    Raises:
        UserError: ΔW is not finite.
    """
    A_hat = expand_A(A.double(), None if h is None else h.double(), terms, normalization, anchors)
    B_hat = scaling * expand_B(B.double(), terms, normalization, anchors)
    R_A = torch.linalg.qr(A_hat.T, mode="r").R
    R_B = torch.linalg.qr(B_hat, mode="r").R
    core = R_B @ R_A.T
    if not torch.isfinite(core).all():
        raise UserError("the weights of a layer are too large for float64, so its ΔW is not finite.")
    r, K = A.shape[0], A_hat.shape[0]
    squares_end = r + r * squares_and_crosses(terms)[0]
    products_end = r + num_products(r, terms)

    def norm(columns: slice) -> float:
        return float(torch.linalg.matrix_norm(R_B[:, columns] @ R_A[:, columns].T))

    products = slice(r, products_end)
    high_order = norm(products)
    along_ones = float(B_hat[:, products].sum(0) @ A_hat[products].sum(1)) / (B.shape[0] * A.shape[1]) ** 0.5
    return LayerDiagnosis(
        out_features=B.shape[0],
        in_features=A.shape[1],
        r=r,
        expanded_rank=K,
        norm=norm(slice(0, K)),
        linear=norm(slice(0, r)),
        square=norm(slice(r, squares_end)),
        cross=norm(slice(squares_end, products_end)),
        high_order=high_order,
        anchors=norm(slice(products_end, K)),
        ones_weight=(along_ones / high_order) ** 2 if high_order else 0.0,
        singular_values=torch.linalg.svdvals(core).tolist(),
    )


def diagnose_adapter(adapter: Adapter) -> dict[str, LayerDiagnosis]:
    """Diagnose each layer of a saved PERA or LoRA adapter without its base model. A LoRA has a linear part only.

    Raises:
        UserError: the folder holds an adapter of another method, a variant of LoRA, or a broken adapter.
    """
    config = adapter.config
    if isinstance(config, PeraConfig):
        layers = {name: diagnose_layer(*factors) for name, factors in saved_factors(adapter.weights, config).items()}
    elif isinstance(config, LoraConfig):
        try:
            check_lora(config)
            found = _saved_lora(adapter.weights, config)
        except UserError as error:
            raise UserError(f"{str(adapter.path)!r}: {error}") from error
        layers = {name: diagnose_layer(A, B, None, "none", scaling=scaling) for name, (A, B, scaling) in found.items()}
    else:
        raise UserError(
            f"{str(adapter.path)!r} is a {adapter.method} adapter; only PERA and LoRA adapters can be diagnosed."
        )
    return {name.removeprefix("base_model.model."): diagnosis for name, diagnosis in layers.items()}


def check_lora(config: LoraConfig) -> None:
    """Check that ΔW of every layer of a LoRA is s B A.

    Raises:
        UserError: it is a variant of LoRA, its initialization changed the base model, or it adapts fused experts.
    """
    variants = [f.name for f in fields(config) if f.metadata.get("is_lora_variant") and getattr(config, f.name)]
    if variants:
        value = getattr(config, variants[0])
        raise UserError(
            f"{variants[0]}={value!r:.80} makes ΔW something else than the product B A, so it has no rank to measure."
        )
    if config.init_lora_weights not in (True, False, None, "gaussian", "eva", "orthogonal"):
        raise UserError(
            f"init_lora_weights={config.init_lora_weights!r} also changed the base model, so B A is not the whole ΔW; "
            "save the adapter with PEFT's path_initial_model_for_weight_conversion."
        )
    if config.target_parameters:
        raise UserError(
            f"target_parameters={config.target_parameters!r:.80}: a LoRA of single parameters cannot be diagnosed."
        )


def _saved_lora(weights: dict[str, Tensor], config: LoraConfig) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A ``(r, in)``, B ``(out, r)`` and scale of each layer in a LoRA weights file, in float64. Kernels are flat."""
    found = {}
    alphas = config.alpha_pattern or {}
    check_speed((key.removeprefix("base_model.model.").partition(".lora_")[0] for key in weights), config)
    for key, A in weights.items():
        name, is_A, rest = key.partition(".lora_A.weight")
        if not is_A:
            name, is_A, rest = key.partition(".lora_embedding_A")
        if not is_A or rest:
            continue
        B = weights.get(key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B"))
        if B is None:
            raise UserError(f"the weights file lacks the lora_B of {name!r}.")
        A, B = A.double().flatten(1), B.double().flatten(1)
        if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1]:
            raise UserError(
                f"lora_A and lora_B of {name!r} have ranks {len(A)} and {B.shape[-1]}; they should be equal."
            )
        alpha = alphas.get(get_pattern_key(list(alphas), name.removeprefix("base_model.model.")), config.lora_alpha)
        found[name] = A, B, alpha / (len(A) ** 0.5 if config.use_rslora else len(A))
    if not found:
        raise UserError("the weights file has no LoRA layer.")
    return found


def kind(name: str, layer: PeraLayer | None = None) -> str:
    """The kind of a layer, such as "q_proj": the last part of its name that is not a number or "base_layer".

    If ``layer`` is given and adapts a parameter of a module, the kind is the name of that parameter.

    Examples:
        >>> kind("model.layers.0.self_attn.q_proj")
        'q_proj'
        >>> kind("model.layers.0.mlp.experts.base_layer.12")
        'experts'
    """
    if isinstance(layer, ParamWrapper):
        return layer.parameter_name
    return re.sub(r"(\.(\d+|base_layer))+$", "", name).rpartition(".")[2]


@dataclass(frozen=True)
class Layer:
    """An adapted layer and its place in the model."""

    name: str
    block: int | None
    """Number of its block; None for a layer outside the blocks."""
    kind: str
    diagnosis: LayerDiagnosis


def place_layers(diagnoses: dict[str, LayerDiagnosis]) -> list[Layer]:
    """Read block and kind of each layer from its name; the layers come in the order of their blocks.

    If a block has several layers of one :func:`kind`, their kind is the path after the block's number, with ``*`` for
    further numbers, such as "attn.c_proj" and "mlp.c_proj", or "experts.*.w1".
    """
    paths = {}
    for name in diagnoses:
        parts = name.split(".")
        start = next((i for i, part in enumerate(parts) if part.isdecimal()), -1)
        path = ".".join("*" if part.isdecimal() else part for part in parts[start + 1 :] if part != "base_layer")
        paths[name] = (int(parts[start]) if start >= 0 else None, path or name)
    counts = Counter((block, kind(name)) for name, (block, _) in paths.items())
    several = {found for (_, found), count in counts.items() if count > 1}
    layers = [
        Layer(name, block, path if kind(name) in several else kind(name), diagnoses[name])
        for name, (block, path) in paths.items()
    ]
    return sorted(layers, key=lambda layer: (layer.block is None, layer.block or 0, layer.kind, layer.name))


def by_kind(layers: list[Layer]) -> dict[str, list[Layer]]:
    """Group the layers by kind, in alphabetical order."""
    ordered = sorted(layers, key=lambda layer: layer.kind)
    return {kind: list(members) for kind, members in groupby(ordered, key=lambda layer: layer.kind)}


def _ratio(part: float, linear: float) -> float:
    if linear:
        return part / linear
    return float("inf") if part else 0.0
