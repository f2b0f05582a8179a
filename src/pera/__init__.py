"""PERA: Polynomial Expansion Rank Adaptation as a PEFT method.

``import pera`` registers the method with PEFT. Then ``get_peft_model``, ``PeftModel.from_pretrained`` and the
``AutoPeftModel`` classes accept it::

    model = get_peft_model(base, pera.PeraConfig(r=8, target_modules="all-linear"))  # train it like LoRA
    lora = pera.to_lora(model)                                                       # the equivalent LoRA of rank 44
"""

from pera.startup import check_peft, held_logs

check_peft()
with held_logs():
    from pera.errors import PeraError, UserError
    from pera.linear import pera_linear
    from pera.lora import combine, from_lora, to_lora
    from pera.optim import parameter_groups
    from pera.tuner import PeraConfig, PeraModel, hotswap_adapter, register

__version__ = "0.2.0.dev0"
__all__ = [
    "PeraConfig",
    "PeraError",
    "PeraModel",
    "UserError",
    "combine",
    "from_lora",
    "hotswap_adapter",
    "parameter_groups",
    "pera_linear",
    "to_lora",
]

register()
