"""PERA: Polynomial Expansion Rank Adaptation as a PEFT method.

``import pera`` registers the method with PEFT, so that ``get_peft_model``, ``PeftModel.from_pretrained``
and ``AutoPeftModel…`` know it.
"""

from pera.errors import PeraError, UserError
from pera.linear import pera_linear
from pera.lora import combine, to_lora
from pera.optim import parameter_groups
from pera.tuner import PeraConfig, PeraModel, hotswap_adapter, register

__version__ = "0.1.0"
__all__ = [
    "PeraConfig",
    "PeraError",
    "PeraModel",
    "UserError",
    "combine",
    "hotswap_adapter",
    "parameter_groups",
    "pera_linear",
    "to_lora",
]

register()
