"""What an adapter does: weight and effect of each kind of term, spectra, interaction strength."""

from pera.diagnose.effect import Effects, effects, zeroed
from pera.diagnose.factors import LayerDiagnosis, diagnose_adapter, diagnose_layer
from pera.diagnose.interaction import interaction_strength

__all__ = [
    "Effects",
    "LayerDiagnosis",
    "diagnose_adapter",
    "diagnose_layer",
    "effects",
    "interaction_strength",
    "zeroed",
]
