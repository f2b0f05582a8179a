"""Makes PERA a method that PEFT knows, as if it had been built in.

PEFT has no plug-in mechanism: every method is a member of the enumeration ``PeftType``, and PEFT and
transformers read ``.value`` of it. So a member is added in place, once, and the method is registered
under it.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from pera.tuner.config import PeraConfig
from pera.tuner.model import PeraModel

NAME = "PERA"


def register() -> None:
    """Add PERA to PEFT's methods; a second call, or a second import of the package, does nothing."""
    if NAME not in PeftType.__members__:
        _add_member(NAME)
    if PeftType(NAME) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=PeraConfig, model_cls=PeraModel)


def _add_member(name: str) -> None:
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
