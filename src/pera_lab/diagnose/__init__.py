"""What an adapter does: weight and effect of each kind of term, and spectra."""

from pera_lab.diagnose.callback import RatioCallback, high_order_ratios
from pera_lab.diagnose.cuts import Cuts
from pera_lab.diagnose.effect import Effects, Part, adapter_effects, effects, run_effects, zeroed
from pera_lab.diagnose.factors import Layer, LayerDiagnosis, by_kind, diagnose_adapter, diagnose_layer, place_layers
from pera_lab.diagnose.fullness import Fullness, Learned, fullness

__all__ = [
    "Cuts",
    "Effects",
    "Fullness",
    "Layer",
    "LayerDiagnosis",
    "Learned",
    "Part",
    "RatioCallback",
    "adapter_effects",
    "by_kind",
    "diagnose_adapter",
    "diagnose_layer",
    "effects",
    "fullness",
    "high_order_ratios",
    "place_layers",
    "run_effects",
    "zeroed",
]
