"""What an adapter does: weight and effect of each kind of term, and spectra."""

from pera_lab.diagnose.callback import RatioCallback, high_order_ratios
from pera_lab.diagnose.effect import Effects, Part, effects, run_effects, zeroed
from pera_lab.diagnose.factors import Layer, LayerDiagnosis, by_kind, diagnose_adapter, diagnose_layer, place_layers

__all__ = [
    "Effects",
    "Layer",
    "LayerDiagnosis",
    "Part",
    "RatioCallback",
    "by_kind",
    "diagnose_adapter",
    "diagnose_layer",
    "effects",
    "high_order_ratios",
    "place_layers",
    "run_effects",
    "zeroed",
]
