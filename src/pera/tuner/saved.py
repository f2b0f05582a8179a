"""The layers of a saved PERA adapter, read without the model they belong to."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pera.errors import UserError
from pera.polynomial import Normalization, Terms, fixed_coefficients, num_coefficients
from pera.tuner.config import PeraConfig


class Factors(NamedTuple):
    """One layer: what :func:`pera.polynomial.lora_factors` and :func:`pera_lab.diagnose.diagnose_layer` take."""

    A: Tensor
    B: Tensor
    h: Tensor
    terms: Terms
    normalization: Normalization
    scaling: float


def saved_factors(weights: dict[str, Tensor], config: PeraConfig) -> dict[str, Factors]:
    """The factors of each layer in a PERA weights file, by the layer's name, in float64; those of fused experts by
    the name and the number of the expert.

    Args:
        weights: ``<layer>.pera_A`` ``(r, in_features)``, ``<layer>.pera_B`` ``(out_features, r)``,
            ``<layer>.pera_h`` unless fixed or absent, each with a leading dimension for fused experts; other
            tensors are passed over.
        config: the adapter's configuration.

    Raises:
        UserError: there is no layer, or a tensor is missing or of the wrong shape.
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
            raise UserError(f"the weights of {layer} do not have the rank of adapter_config.json, {r}.")
        shared = config.terms, config.normalization, config.scaling(r, alpha)
        A, B, h = A.double(), B.double(), h.double()
        if A.ndim == 2:
            layers[layer] = Factors(A, B, h, *shared)
            continue
        for i, (A_i, B_i, h_i) in enumerate(zip(A, B, h.expand(len(A), -1), strict=True)):
            layers[f"{layer}.{i}"] = Factors(A_i, B_i, h_i, *shared)
    if not layers:
        raise UserError("the weights file holds no PERA layer.")
    return layers
