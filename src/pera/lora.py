"""PERA adapters of a model in memory as the LoRA they equal; needs torch and PEFT alone."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor
from torch.nn.functional import pad

from pera.errors import UserError, nearest
from pera.polynomial import lora_factors
from pera.tuner import ParamWrapper, PeraConfig, PeraLayer, PeraModel, adapted_layers


class Folded(NamedTuple):
    """A layer and the LoRA on it: A ``(K, columns)`` and B ``(rows, K)`` in float64, each with a leading dimension
    for fused experts."""

    layer: PeraLayer
    A: Tensor
    B: Tensor


def factored_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of B A, computed from the factors in O((m + n) K² + K³).

    With B = Q_B R_B and Aᵀ = Q_A R_A, only the K × K matrix R_B R_Aᵀ is decomposed. Its singular vectors are
    multiplied by Q_B and Q_A.

    Args:
        A: ``(..., K, n)``.
        B: ``(..., m, K)``.

    Returns:
        U ``(..., m, k)``, singular values ``(..., k)`` in descending order, and Vᵀ ``(..., k, n)``, with
        k = min(K, m, n).
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.mT


def balanced_factors(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors √S Vᵀ ``(..., rank, n)`` and U √S ``(..., m, rank)`` of the leading ``rank`` singular directions."""
    root = S[..., :rank].sqrt()
    return root.unsqueeze(-1) * Vh[..., :rank, :], U[..., :rank] * root.unsqueeze(-2)


def truncate_factors(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of B A of a given rank (Eckart and Young).

    Args:
        A: ``(..., K, n)``.
        B: ``(..., m, K)``.
        rank: the new rank. Above k = min(K, m, n) the factors have rank k and their product equals B A.

    Returns:
        A′ ``(..., rank, n)`` and B′ ``(..., m, rank)``.
    """
    return balanced_factors(*factored_svd(A, B), rank)


def to_lora(model: PeftModel, adapter_names: list[str] | None = None) -> PeftModel:
    """The model with each PERA adapter replaced by the LoRA of rank K that it equals.

    Exact: h, normalization and scale are folded into the factors, in float64, and r = lora_alpha = K. The base model
    goes over to the result, as with ``unload``: use only what is returned. Saving it gives an adapter that loads
    without pera.

    Args:
        model: a model with PERA adapters, none of them merged.
        adapter_names: the adapters to convert; None means all. The others are gone from the result.

    Returns:
        The LoRA model, with the same adapter active if it was converted.

    Raises:
        UserError: it is no PERA model, an adapter is unknown or merged, or LoRA lacks a kind of layer.
    """
    _check(model, adapter_names)
    names = list(model.peft_config) if adapter_names is None else adapter_names
    if not names:
        raise UserError("adapter_names=[] names no adapter; leave it out for all.")
    return _replaced(model, {name: fold(model, name) for name in names})


def combine(model: PeftModel, weights: dict[str, float], adapter_name: str = "combined") -> PeftModel:
    """The model with its PERA adapters replaced by one LoRA, their weighted sum: Σ w ΔW.

    Exact: the folded factors of all adapters, put side by side, so that the rank is the sum of theirs. The base model
    goes over to the result, as with ``unload``: use only what is returned.

    Args:
        model: a model with PERA adapters, none of them merged.
        weights: a finite weight for each adapter to take part.
        adapter_name: name of the LoRA.

    Raises:
        UserError: as :func:`to_lora`; a weight is no finite number; an adapter trains more than its factors
            (``modules_to_save``, ``bias``, ``trainable_token_indices``), which has no weighted sum.
    """
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"weights={weights!r} names no adapter; give one or more as {{name: weight}}.")
    _check(model, list(weights))
    if "." in adapter_name:
        raise UserError(f"adapter_name={adapter_name!r} is the name of a module in the result; leave out the dot.")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise UserError(f"weights[{name!r}]={weight!r} should be a finite number.")
        config: Any = model.peft_config[name]
        for key in ("modules_to_save", "trainable_token_indices"):
            if getattr(config, key):
                raise UserError(f"{key}={getattr(config, key)!r} of adapter {name!r} has no weighted sum.")
        if config.bias != "none":
            raise UserError(f"bias={config.bias!r} of adapter {name!r} has no weighted sum.")
    folded = folded_layers(model, weights)
    configs: list[Any] = [model.peft_config[name] for name in weights]
    targets = {
        "target_modules": [name for name, (layer, *_) in folded.items() if not isinstance(layer, ParamWrapper)],
        "target_parameters": sorted({name for c in configs for name in c.target_parameters or ()}),
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
    }
    config = lora_config(configs[0], _rank(folded), **targets)
    return _replaced(model, {adapter_name: (config, _state(folded))})


def fold(model: PeftModel, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration and weights, as PEFT saves them, of the LoRA that equals a PERA adapter.

    Args:
        model: a model with the adapter.
        adapter_name: name of the adapter.

    Returns:
        The configuration, with r = lora_alpha = K, the largest expanded rank of all layers, and float32 weights:
        ``<layer>.lora_A.weight`` ``(K, in)``, ``<layer>.lora_B.weight`` ``(out, K)`` or what LoRA calls and shapes them
        for other kinds of layer, and whatever else the adapter trains, as it is.

    Raises:
        UserError: LoRA computes something else for a layer of this kind.
    """
    folded = folded_layers(model, {adapter_name: 1.0})
    return lora_of(model, folded, adapter_name)


def lora_of(model: PeftModel, folded: dict[str, Folded], adapter_name: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """:func:`fold` with the layers as they are given, such as truncated ones."""
    config: Any = model.peft_config[adapter_name]
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    others = {key: weight.clone() for key, weight in saved.items() if ".pera_" not in key}  # tied ones share memory
    return lora_config(config, _rank(folded)), _state(folded) | others


def lora_config(config: PeraConfig, rank: int, **changed: Any) -> LoraConfig:
    """The configuration of the LoRA of rank K that equals a PERA adapter: same modules, r = lora_alpha = K.

    Tied layers have weights of their own in it: LoRA's tie is not kept by a merge, nor read by servers.
    """
    carried: dict[str, Any] = {
        key: getattr(config, key)
        for key in (
            "task_type",
            "base_model_name_or_path",
            "revision",
            "target_parameters",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "trainable_token_indices",
        )
    }
    targets, tied = config.target_modules, sorted(getattr(config, "target_modules_to_tie", None) or ())
    if isinstance(targets, str):
        carried["target_modules"] = "|".join([f"(?:{targets})", *map(re.escape, tied)])
    else:
        carried["target_modules"] = sorted({*(targets or ()), *tied})
    saved = {*(config.modules_to_save or ()), *(getattr(config, "modules_to_tie", None) or ())}
    carried["modules_to_save"] = sorted(saved) or None
    bias = "lora_only" if config.bias == "pera_only" else config.bias
    return LoraConfig(r=rank, lora_alpha=rank, bias=bias, **{**carried, **changed})


def _check(model: PeftModel, adapter_names: list[str] | None) -> None:
    if not isinstance(getattr(model, "base_model", None), PeraModel):
        raise UserError(f"model is a {type(model).__name__}; give a PeftModel with PERA adapters.")
    if isinstance(adapter_names, str):
        raise UserError(f"adapter_names={adapter_names!r} should be a list of names.")
    for name in adapter_names or ():
        if name not in model.peft_config:
            raise UserError(f"adapter {name!r} is not in the model; {nearest(name, model.peft_config)}")
    for name in model.peft_config:
        layers = adapted_layers(model, name).values()
        if not layers:
            raise UserError(
                f"adapter {name!r} is in no layer of the model; use what unload, to_lora or combine returned."
            )
        if any(name in layer.merged_adapters for layer in layers):
            raise UserError(f"adapter {name!r} is merged; call unmerge_adapter first.")


def folded_layers(model: PeftModel, weights: dict[str, float]) -> dict[str, Folded]:
    """The layers of a weighted sum of adapters, by their name in the base model, each as the LoRA it equals, on the
    CPU, since not every accelerator has float64.

    Raises:
        UserError: LoRA computes something else for a layer of this kind.
    """
    sums: dict[str, Folded] = {}
    for adapter, weight in weights.items():
        for name, layer in adapted_layers(model.get_base_model(), adapter).items():
            layer.check_lora(name)
            A, B, h = (factor.detach().cpu().double() for factor in layer.factors(adapter))
            A, B = lora_factors(A, B, h, *layer.expansion[adapter], weight * layer.scaling[adapter])
            if name in sums:
                A, B = torch.cat([sums[name].A, A], -2), torch.cat([sums[name].B, B], -1)
            sums[name] = Folded(layer, A, B)
    return sums


def _rank(folded: dict[str, Folded]) -> int:
    return max(A.shape[-2] for _, A, _ in folded.values())


def _state(folded: dict[str, Folded]) -> dict[str, Tensor]:
    """The weights as PEFT saves them, those of smaller rank padded with zeros."""
    state = {}
    for name, (layer, A, B) in folded.items():
        missing = _rank(folded) - A.shape[-2]
        for key, weight in layer.as_lora(pad(A, (0, 0, 0, missing)), pad(B, (0, missing))).items():
            state[f"base_model.model.{name}.{key}"] = weight.float().contiguous()
    return state


def _factor_names(state: dict[str, Tensor]) -> set[str]:
    return {key for key in state if ".lora_" in key}


def _replaced(model: PeftModel, adapters: dict[str, tuple[LoraConfig, dict[str, Tensor]]]) -> PeftModel:
    first, *others = adapters
    active = [name for name in model.active_adapters if name in adapters] or [first]
    training = model.training
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):  # else unloading would leave its module in the base model
            module.set_adapter([])
    lora: Any = get_peft_model(model.unload(), adapters[first][0], adapter_name=first)
    for name in others:
        lora.add_adapter(name, adapters[name][0])
    for name, (_, state) in adapters.items():
        set_peft_model_state_dict(lora, state, adapter_name=name)
        made = get_peft_model_state_dict(lora, adapter_name=name, save_embedding_layers=False)
        assert _factor_names(made) == _factor_names(state), "PEFT adapts other layers than the factors are for"
    lora.base_model.set_adapter(active)
    lora.active_adapter = active[0]
    lora.train(training)
    return lora  # type: ignore[no-any-return]
