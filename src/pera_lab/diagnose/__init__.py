"""What an adapter does: weight and effect of each kind of term, spectra, interaction strength."""

from pera_lab.diagnose.callback import RatioCallback, high_order_ratios
from pera_lab.diagnose.effect import Effects, Part, effects, run_effects, zeroed
from pera_lab.diagnose.factors import LayerDiagnosis, diagnose_adapter, diagnose_layer
from pera_lab.diagnose.interaction import Interaction, interaction_strength, run_interaction

__all__ = [
    "Effects",
    "Interaction",
    "LayerDiagnosis",
    "Part",
    "RatioCallback",
    "diagnose_adapter",
    "diagnose_layer",
    "effects",
    "high_order_ratios",
    "interaction_strength",
    "run_effects",
    "run_interaction",
    "zeroed",
]
