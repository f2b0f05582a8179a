"""The layers of a saved PERA adapter, from its files alone, without the base model."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pera.errors import UserError
from pera.polynomial import Normalization, Terms, fixed_coefficients, num_coefficients
from pera.tuner.config import PeraConfig


class Factors(NamedTuple):
    """One layer: the arguments of :func:`pera.polynomial.lora_factors`."""

    A: Tensor
    B: Tensor
    h: Tensor
    terms: Terms
    normalization: Normalization
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
        UserError: there is no layer, or a tensor is missing or has a wrong shape.
    """
    layers: dict[str, Factors] = {}
    for key, A in weights.items():
        layer, found, _ = key.partition(".pera_A")
        if not found:
            continue
        r, alpha = config.layer_settings(layer.removeprefix("base_model.model."))
        h = weights.get(f"{layer}.pera_h") if config.learns_coefficients else fixed_coefficients(r, config.terms)
        B = weights.get(f"{layer}.pera_B")
        if B is None or h is None:
            raise UserError(f"the weights file lacks {layer}.{'pera_B' if B is None else 'pera_h'}.")
        experts, n = A.shape[:-2], num_coefficients(r, config.terms)
        fits = A.ndim == B.ndim and (*A.shape[:-1], *B.shape[:-2], *B.shape[-1:]) == (*experts, r, *experts, r)
        if not fits or len(experts) > 1 or h.shape not in ((n,), (*experts, n)):
            raise UserError(f"the weights of {layer} do not have the rank in adapter_config.json, {r}.")
        shared = config.terms, config.normalization, config.scaling(r, alpha)
        A, B, h = A.double(), B.double(), h.double()
        if A.ndim == 2:
            layers[layer] = Factors(A, B, h, *shared)
            continue
        for i, (A_i, B_i, h_i) in enumerate(zip(A, B, h.expand(len(A), -1), strict=True)):
            layers[f"{layer}.{i}"] = Factors(A_i, B_i, h_i, *shared)
    if not layers:
        raise UserError("the weights file has no PERA layer.")
    return layers
