"""What an adapter does: weight and effect of each kind of term, and spectra."""

from pera_lab.diagnose.callback import RatioCallback, high_order_ratios
from pera_lab.diagnose.effect import Effects, Part, effects, run_effects, zeroed
from pera_lab.diagnose.factors import LayerDiagnosis, diagnose_adapter, diagnose_layer

__all__ = [
    "Effects",
    "LayerDiagnosis",
    "Part",
    "RatioCallback",
    "diagnose_adapter",
    "diagnose_layer",
    "effects",
    "high_order_ratios",
    "run_effects",
    "zeroed",
]
