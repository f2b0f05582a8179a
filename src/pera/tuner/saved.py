"""The weights of a saved PERA adapter: its layers without the base model, and checks before they are loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pera.anchors import Anchors, draw_anchors, names_digest
from pera.errors import UserError
from pera.polynomial import Normalization, Terms, expanded_rank, fixed_coefficients, num_coefficients
from pera.tuner.checks import check_sizes
from pera.tuner.config import PeraConfig
from pera.tuner.expressions import check_speed
from pera.tuner.names import plain_name


class Factors(NamedTuple):
    """One layer: the arguments of :func:`pera.polynomial.lora_factors`."""

    A: Tensor
    B: Tensor
    h: Tensor
    terms: Terms
    normalization: Normalization
    anchors: Anchors | None
    scaling: float


def saved_factors(weights: dict[str, Tensor], config: PeraConfig) -> dict[str, Factors]:
    """The factors of each layer in a PERA weights file, in float64, by the layer's name.

    Fused experts give one entry for each expert, named ``<layer>.<expert>``.

    Args:
        weights: tensors of the file: ``<layer>.pera_A`` ``(r, in)``, ``<layer>.pera_B`` ``(out, r)`` and, if it is
            learned, ``<layer>.pera_h``. Fused experts add a leading dimension. Other tensors are ignored.
        config: configuration of the adapter.

    Returns:
        The factors, with the expansion and the scale of the layer.

    Raises:
        UserError: there is no layer, a tensor is missing or has a wrong shape, the rank or the number of anchors is far
            above the sides of a layer, the layers were renamed, so that their anchors are unknown, or an expression of
            the configuration takes too long.
    """
    layers: dict[str, Factors] = {}
    names = set()
    check_speed((key.partition(".pera_A")[0].removeprefix("base_model.model.") for key in weights), config)
    for key, A in weights.items():
        layer, found, _ = key.partition(".pera_A")
        if not found:
            continue
        name, k = layer.removeprefix("base_model.model."), config.anchors
        r, alpha = config.layer_settings(name)
        h = weights.get(f"{layer}.pera_h") if config.learns_coefficients else fixed_coefficients(r, config.terms, k)
        B = weights.get(f"{layer}.pera_B")
        if B is None or h is None:
            raise UserError(f"the weights file lacks {layer}.{'pera_B' if B is None else 'pera_h'}.")
        experts, n = A.shape[:-2], num_coefficients(r, config.terms, k)
        fits = A.ndim == B.ndim and (*A.shape[:-1], *B.shape[:-2], *B.shape[-1:]) == (*experts, r, *experts, r)
        if not fits or len(experts) > 1 or h.shape not in ((n,), (*experts, n)):
            raise UserError(f"the weights of {layer} do not have the rank in adapter_config.json, {r}.")
        check_sizes(B.shape[-2], A.shape[-1], r, expanded_rank(r, config.terms, k), k)
        names.add(module_name := anchored_name(name))
        anchors = draw_anchors(k, config.anchor_seed, module_name, B.shape[-2], A.shape[-1])
        shared = config.terms, config.normalization, anchors, config.scaling(r, alpha)
        A, B, h = A.double(), B.double(), h.double()
        if A.ndim == 2:
            layers[layer] = Factors(A, B, h, *shared)
            continue
        for i, (A_i, B_i, h_i) in enumerate(zip(A, B, h.expand(len(A), -1), strict=True)):
            layers[f"{layer}.{i}"] = Factors(A_i, B_i, h_i, *shared)
    if not layers:
        raise UserError("the weights file has no PERA layer.")
    check_anchored_names(config, names)
    return layers


def anchored_name(name: str) -> str:
    """The name of a layer that its anchors are drawn from. Wrappers of parameters are nested under ``base_layer``."""
    return plain_name(name).replace(".base_layer", "")


def check_anchored_names(config: PeraConfig, names: Collection[str]) -> None:
    """Raise UserError if layers do not have the names, as of :func:`anchored_name`, that they were trained under.

    Their frozen rows, which are drawn from the names, would differ.
    """
    if config.anchors and config.anchor_names not in (None, names_digest(names)):
        raise UserError(
            f"anchors={config.anchors}: frozen rows follow from the names of the layers, such as {min(names)!r}, but "
            "the adapter was trained under other names; load it on the class of model it was trained on."
        )


def check_values(weights: Mapping[str, Tensor], *, indices: bool = False) -> None:
    """Raise UserError unless every tensor holds finite floating-point numbers, or with ``indices`` finite numbers."""
    for key, weight in weights.items():
        if not indices and not weight.is_floating_point():
            raise UserError(
                f"{key} has dtype {str(weight.dtype).removeprefix('torch.')}; the weights of an adapter should be "
                "floating-point numbers, such as float32."
            )
        values = weight.float() if weight.itemsize == 1 else weight  # float8 has no isfinite
        if not torch.isfinite(values).all():
            raise UserError(f"NaNs detected in the weights of {key}. The adapter seems to be broken.")


def check_loaded(weights: Mapping[str, Tensor], model: Mapping[str, Tensor], adapter_name: str) -> None:
    """Check that every saved weight has a place in the model, and every factor of the adapter has a saved weight.

    Args:
        weights: the saved weights, by their names in the model.
        model: the state of the model.
        adapter_name: name of the adapter that is loaded.

    Raises:
        UserError: a weight has no place, is missing, or has values that cannot be loaded.
    """
    remedy = "load the adapter on the base model that it was trained on."
    if unplaced := sorted(weights.keys() - model.keys()):
        raise UserError(f"the base model has no place for {_counted(unplaced, adapter_name)}; {remedy}")
    factors = {key for key in model if is_factor(key, adapter_name)}
    if missing := sorted(factors - weights.keys()):
        raise UserError(f"the weights file lacks {_counted(missing, adapter_name)}; {remedy}")
    check_values({key: weight for key, weight in weights.items() if model[key].is_floating_point()})


def is_factor(key: str, adapter_name: str) -> bool:
    """Whether a key in the state of a model is a factor of the adapter, or its coefficients."""
    return key.endswith(tuple(f".{factor}.{adapter_name}" for factor in ("pera_A", "pera_B", "pera_h")))


def _counted(keys: list[str], adapter_name: str) -> str:
    more = f" and {len(keys) - 1} more weights" if len(keys) > 1 else ""
    return repr(keys[0].removesuffix(f".{adapter_name}")) + more
