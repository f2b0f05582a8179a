"""The layers of an adapter as LoRA: exact factors of each update, for PERA and for PEFT's other methods.

Many methods write ΔW as another function of small matrices than B A, and ΔW still has exact factors of low rank that
follow from the parameters. For LoHa of rank r, with ⊙ elementwise, each pair of rows gives one of r² rows::

    (B₁ A₁) ⊙ (B₂ A₂) = B A      row (i, j) of A is A₁[i] ⊙ A₂[j], column (i, j) of B is B₁[:, i] ⊙ B₂[:, j]

:data:`METHODS` holds one function for each such method. :data:`FULL` and :data:`NEVER` say why another has none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType, get_quantization_kwargs
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from pera.errors import UserError
from pera.polynomial import lora_factors
from pera.tuner.layers import PeraLayer, PeraLinear, layer_class
from pera.tuner.names import plain_name


class Folded(NamedTuple):
    """A layer and the factors of the equivalent LoRA: A ``(K, in)`` and B ``(out, K)`` in float64. Fused experts add a
    leading dimension."""

    layer: BaseTunerLayer
    kind: type[PeraLayer]
    """PERA's class for such a layer. It says how LoRA names and shapes the factors."""
    A: Tensor
    B: Tensor


def folded_layers(model: Any, weights: dict[str, float], *, full: bool = False) -> dict[str, Folded]:
    """Each layer of a weighted sum of adapters as a LoRA, by the layer's name in the base model.

    The factors are on the CPU, because not every accelerator has float64.

    Args:
        model: model with adapters of one method, none of them merged.
        weights: weight of each adapter.
        full: also fold updates of full rank. One factor is then ΔW, as a merge computes it, and the other the identity.

    Raises:
        UserError: LoRA cannot express the method or a layer, or an update has full rank and ``full`` is False.
    """
    sums: dict[str, Folded] = {}
    quantization = get_quantization_kwargs(model.base_model)
    for adapter, weight in weights.items():
        config = model.peft_config[adapter]
        check_config(config, full=full)
        method = PeftType(config.peft_type).value
        for name, layer in _layers(model, adapter).items():
            base: Any = layer.get_base_layer()
            kind = type(layer) if isinstance(layer, PeraLayer) else layer_class(base, name, quantization)
            kind.check_lora(base, name)
            try:
                A, B = _factors(layer, adapter, method, kind, full)
            except _Full as reason:
                raise _has_full_rank(method, str(reason)) from None
            except _Never as reason:
                raise _is_no_lora(method, str(reason)) from None
            B = weight * B
            if name in sums:
                A, B = torch.cat([sums[name].A, A], -2), torch.cat([sums[name].B, B], -1)
            sums[name] = Folded(layer, kind, A, B)
    return sums


def check_config(config: Any, *, full: bool = False) -> None:
    """Check that LoRA can express an adapter, as far as its configuration tells.

    Args:
        config: PEFT's configuration of the adapter.
        full: whether updates of full rank are allowed.

    Raises:
        UserError: it cannot. The message gives the reason.
    """
    method = PeftType(config.peft_type).value
    if method in NEVER:
        raise _is_no_lora(method, NEVER[method])
    if method not in METHODS and not full:
        raise _has_full_rank(method, FULL.get(method, "has no known factors of low rank"))
    if not isinstance(config, LoraConfig):
        return
    if changes_base(config):
        init = config.init_lora_weights
        raise UserError(f"init_lora_weights={init!r} also changed the base model; merge the adapter instead.")
    if config.layer_replication:
        raise _is_no_lora(method, "repeats layers of the base model (layer_replication)")


def changes_base(config: LoraConfig) -> bool:
    """Whether the initialization of a LoRA also changes the weights of the base model."""
    return str(config.init_lora_weights).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))


class _Full(Exception):
    """An update without factors of low rank. The message says what it does."""


class _Never(Exception):
    """An adapter that is not a fixed update of the weights. The message says what it does."""


def _has_full_rank(method: str, reason: str) -> UserError:
    return UserError(
        f"the update of this {method} adapter {reason}, so no LoRA of low rank equals it; cut it with pera export "
        "--max-rank or --energy, which report the loss, or merge it with: pera merge"
    )


def _is_no_lora(method: str, reason: str) -> UserError:
    return UserError(f"this {method} adapter {reason}, which cannot become a LoRA.")


def _layers(model: Any, adapter: str) -> dict[str, Any]:
    """The layers that an adapter changes, by name. PEFT wraps trainable tokens in layers of another class."""
    layers = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, model.base_model.tuner_layer_cls):
            has = layer.has(adapter) if isinstance(layer, PeraLayer) else adapter in layer._get_available_adapters()
            if has:
                layers[plain_name(name)] = layer
    return layers


def _factors(layer: Any, adapter: str, method: str, kind: type[PeraLayer], full: bool) -> tuple[Tensor, Tensor]:
    """A and B of a layer's update."""
    linear = issubclass(kind, PeraLinear)
    if method in METHODS and (linear or method in _OTHER_LAYERS):
        try:
            return METHODS[method](layer, adapter)
        except _Full:
            if not full:
                raise
    if not linear:
        raise _Never(f"is on a {type(layer.get_base_layer()).__name__}")
    delta = _merged_update(layer, adapter)
    rows, columns = delta.shape
    identity = torch.eye(min(rows, columns), dtype=delta.dtype)
    return (delta, identity) if rows <= columns else (identity, delta)


def _merged_update(layer: Any, adapter: str) -> Tensor:
    """ΔW ``(out, in)``, by merging a copy of the layer in float64."""
    merged = copy.deepcopy(layer).double()
    base = merged.get_base_layer()
    weight, bias = base.weight.detach().clone(), None if base.bias is None else base.bias.detach().clone()
    merged.merge(adapter_names=[adapter])
    if bias is not None and not torch.equal(bias, base.bias):
        raise _Never("also changes biases")
    delta = (base.weight.detach() - weight).cpu()
    return delta if isinstance(base, nn.Linear) else delta.T


def _read(parameters: Any, adapter: str) -> Tensor:
    """A parameter of an adapter, or the weight of a linear layer or convolution, in float64."""
    found = parameters[adapter]
    weight: Tensor = found if isinstance(found, Tensor) else found.weight
    return weight.detach().cpu().double()


def _weight(layer: Any) -> Tensor:
    """The weight of the base layer, ``(out, in)`` in float64."""
    base = layer.get_base_layer()
    weight = dequantize_module_weight(base).detach().cpu().double()
    return weight if isinstance(base, nn.Linear) else weight.T


def _pera(layer: PeraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    A, B, h = (factor.detach().cpu().double() for factor in layer.factors(adapter))
    return lora_factors(A, B, h, *layer.expansion[adapter], layer.scaling[adapter])


_SAME_AS_LORA = ("Velora", "MiCA", "Monteclora")
"""Variants of LoRA that change the training only."""


def _lora(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    if hasattr(layer, "parameter_name"):
        raise _Never("is on target_parameters")
    variant = type(layer.lora_variant[adapter]).__name__ if adapter in layer.lora_variant else ""
    if variant.startswith("Dora"):
        raise _Full("rescales every row of the weights (DoRA)")
    if variant and not variant.startswith((*_SAME_AS_LORA, "BdLora")):
        raise _Never(f"is of the variant {variant.partition('Linear')[0]}")
    if layer.lora_bias.get(adapter):
        raise _Never("also trains biases (lora_bias)")
    if adapter in layer.lora_embedding_A:
        A, B = _read(layer.lora_embedding_A, adapter), _read(layer.lora_embedding_B, adapter)
    else:
        A, B = (_block_diagonal(factors[adapter]) for factors in (layer.lora_A, layer.lora_B))
    return A, layer.scaling[adapter] * B


def _block_diagonal(factor: Any) -> Tensor:
    """The weight of a factor of a LoRA, which BD-LoRA may store as the blocks of its diagonal."""
    stored = getattr(factor, "weight_as_blockdiagonal_matrix", lambda: factor.weight)()
    return stored.detach().cpu().double().flatten(1)


def _adalora(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    A = _read(layer.lora_A, adapter) * _read(layer.lora_E, adapter)
    return A, _read(layer.lora_B, adapter) * (layer.scaling[adapter] / (float(layer.ranknum[adapter]) + 1e-5))


def _loha(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    a1, b1, a2, b2 = (_read(getattr(layer, f"hada_{key}"), adapter) for key in ("w1_b", "w1_a", "w2_b", "w2_a"))
    if adapter in layer.hada_t1:  # a convolution, whose kernels are products of three tensors
        a1, a2 = (
            torch.einsum("ijkl,jr->irkl", _read(core, adapter), a).flatten(1)
            for core, a in ((layer.hada_t1, a1), (layer.hada_t2, a2))
        )
        b1, b2 = b1.T, b2.T
    A = (a1.unsqueeze(1) * a2).flatten(0, 1)
    B = (b1.unsqueeze(2) * b2.unsqueeze(1)).flatten(1)
    return A, layer.scaling[adapter] * B


def _lokr(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """W₁ ⊗ W₂ with W₁ = B₁ A₁ and W₂ = B₂ A₂ is (B₁ ⊗ B₂) (A₁ ⊗ A₂), of the product of both ranks."""
    (A1, B1), (A2, B2) = (_side(layer, side, adapter) for side in ("w1", "w2"))
    return torch.kron(A1, A2), layer.scaling[adapter] * torch.kron(B1, B2)


def _side(layer: Any, side: str, adapter: str) -> tuple[Tensor, Tensor]:
    """Factors of W₁ or W₂ of LoKr, which may be stored whole."""
    whole = getattr(layer, f"lokr_{side}")
    if adapter not in whole:
        return tuple(_read(getattr(layer, f"lokr_{side}_{factor}"), adapter) for factor in "ba")  # type: ignore[return-value]
    W = _read(whole, adapter)
    identity = torch.eye(min(W.shape), dtype=W.dtype)
    return (W, identity) if W.shape[0] <= W.shape[1] else (identity, W)


def _gralora(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Rank k r: each of k parts of the input has r hidden units, and r / k of them go to each part of the output."""
    A, B = _read(layer.gralora_A, adapter), _read(layer.gralora_B, adapter)  # (k, in / k, r), (k, r, out / k)
    k, r, out = B.shape
    to_parts = B.new_zeros(k, out, k, k, r // k)  # output part, output, input part, output part, unit
    for j in range(k):
        to_parts[j, :, :, j] = B[j].reshape(k, r // k, out).permute(2, 0, 1)
    A, B = torch.block_diag(*A.mT), to_parts.reshape(k * out, k * r)
    if layer.hybrid_r[adapter]:
        A = torch.cat([A, _read(layer.gralora_A_general, adapter)])
        B = torch.cat([B, _read(layer.gralora_B_general, adapter)], 1)
    return A, layer.scaling[adapter] * B


def _vera(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    A = _read(layer.vera_A, adapter)[:, : layer.in_features] * _read(layer.vera_lambda_d, adapter).unsqueeze(1)
    B = _read(layer.vera_B, adapter)[: layer.out_features] * _read(layer.vera_lambda_b, adapter).unsqueeze(1)
    return A, B


def _pvera(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """VeRA, whose first half is the mean. The other half is the variance of the noise in training."""
    if layer.sample_at_inference[adapter]:
        raise _Never("draws random numbers at inference (sample_at_inference)")
    mean, _ = _read(layer.pvera_lambda_d, adapter).chunk(2)
    A, _ = _read(layer.pvera_A, adapter)[:, : layer.in_features].chunk(2)
    B = _read(layer.pvera_B, adapter)[: layer.out_features]
    return A * mean.unsqueeze(1), B * _read(layer.pvera_lambda_b, adapter).unsqueeze(1)


def _delora(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    A, B = _read(layer.delora_A, adapter), _read(layer.delora_B, adapter)
    norms = A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4)
    scale = _read(layer.delora_lambda, adapter) / layer.r[adapter] / norms
    return A * _read(layer.delora_w_norm, adapter), B * scale


def _shared_vectors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """VB-LoRA and Uni-LoRA, whose A and B consist of shared vectors."""
    A, B = layer._get_lora_matrices(adapter)
    return A.detach().cpu().double(), B.detach().cpu().double()


def _tinylora(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    R = layer._compute_R(adapter).detach().cpu().double()
    return _read(layer.tinylora_A, adapter), _read(layer.tinylora_B, adapter) @ R


def _miss(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """The inputs are summed over blocks of r, so A repeats the identity."""
    if layer.miss_fn == "bat":
        raise _Full("multiplies blocks of the weights (init_weights='bat')")
    block = _read(layer.miss_block, adapter)
    block = block.repeat(1, layer.out_features // block.shape[1])
    A = torch.eye(len(block), dtype=block.dtype).repeat(1, -(-layer.in_features // len(block)))
    return A[:, : layer.in_features], block.T


def _hra(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """W (H₁ … H_r − I) with H = I − 2 u uᵀ. The product of the first i grows by the rank-1 matrix −2 H₁ … H_i u uᵀ."""
    U = _read(layer.hra_u, adapter)
    if layer.hra_apply_GS[adapter]:
        columns: list[Tensor] = []
        for u in U.T:
            for other in columns:
                u = u - (other @ u) * other
            columns.append(u / u.norm())
        U = torch.stack(columns, 1)
    U = U / U.norm(dim=0)
    added = torch.zeros_like(U)
    for i in range(U.shape[1]):
        added[:, i] = -2 * (U[:, i] + added[:, :i] @ (U[:, :i].T @ U[:, i]))
    return U.T, _weight(layer) @ added


def _deft(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    Q, right = (side.detach().cpu().double() for side in layer._project(layer.deft_P[adapter], adapter))
    A = -right.T @ _weight(layer)
    if not layer.deft_para[adapter]:
        A = A + layer.deft_scaling[adapter] * _read(layer.deft_R, adapter)
    return A, Q


def _psoft(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    A, B = (side.detach().cpu().double() for side in layer._get_psoft_ab_cache_buffers(adapter))
    R = layer._get_R_matrix(adapter).detach().cpu().double()
    return A, layer.scaling[adapter] * B @ (R - torch.eye(len(R), dtype=R.dtype))


def _adamss(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """The rows of the update fall into groups, each with factors of its own on one shared projection."""
    if layer.get_base_layer().bias is not None:
        raise _Never("also changes biases")
    inner, outer = ([f.detach().cpu().double() for f in side[adapter]] for side in (layer.adamss_A, layer.adamss_B))
    B = outer[0].new_zeros(layer.out_features, sum(factor.shape[1] for factor in outer))
    B[layer.scatter_index[adapter].cpu()] = torch.block_diag(*outer)
    return torch.cat(inner) @ _read(layer.adamss_newB, adapter), B


def _peanut(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """ΔW = B f(W)ᵀ, where a small network f maps every column of W to r values."""
    network = copy.deepcopy(layer).cpu().double()
    network.peanut_B[adapter] = nn.Identity()
    return network._compute_delta_weight(adapter, _weight(layer)).detach(), _read(layer.peanut_B, adapter)


METHODS: dict[str, Callable[[Any, str], tuple[Tensor, Tensor]]] = {
    "PERA": _pera,
    "LORA": _lora,
    "ADALORA": _adalora,
    "ADAMSS": _adamss,
    "DEFT": _deft,
    "DELORA": _delora,
    "GRALORA": _gralora,
    "HRA": _hra,
    "LOHA": _loha,
    "LOKR": _lokr,
    "MISS": _miss,
    "PEANUT": _peanut,
    "PSOFT": _psoft,
    "PVERA": _pvera,
    "TINYLORA": _tinylora,
    "UNILORA": _shared_vectors,
    "VBLORA": _shared_vectors,
    "VERA": _vera,
}
"""Functions of a layer and an adapter's name that return A ``(K, in)`` and B ``(out, K)`` with ΔW = B A, in float64."""

_OTHER_LAYERS = ("PERA", "LORA", "LOHA")
"""Methods whose function also takes convolutions, and embeddings or parameters where the method has them."""

FULL = {
    "BOFT": "rotates the weights",
    "C3A": "is block-circulant",
    "FOURIERFT": "is a sum of waves over the whole matrix",
    "FROD": "replaces the whole matrix",
    "GLORA": "rescales every weight",
    "HIRA": "multiplies every weight by a number of its own",
    "IA3": "rescales rows or columns of the weights",
    "OFT": "rotates the weights",
    "OSF": "changes most singular directions of the weights",
    "RANDLORA": "is a sum of random matrices up to full rank",
    "ROAD": "rotates pairs of rows of the weights",
    "SHIRA": "changes single weights all over the matrix",
    "SUPERTUNING": "changes single weights all over the matrix",
    "WAVEFT": "is a sum of wavelets over the whole matrix",
}
"""What the update of a method without factors of low rank does."""

_PROMPT = "adds inputs instead of changing weights"
NEVER = {
    "ADAPTION_PROMPT": _PROMPT,
    "BEFT": "changes biases only",
    "CARTRIDGE": _PROMPT,
    "CPT": _PROMPT,
    "LILY": "mixes its factors by the input",
    "LN_TUNING": "trains whole normalization layers",
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "POLY": "mixes its factors by the task",
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "SHADOW": "adds a network next to the base model",
    "TRAINABLE_TOKENS": "trains whole token embeddings",
    "XLORA": "mixes several LoRAs by the input",
}
"""What an adapter does that is not a fixed update of the weights."""
