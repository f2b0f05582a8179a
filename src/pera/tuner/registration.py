"""Registers PERA with PEFT, so that it works like a built-in method.

PEFT has no plug-in mechanism: every method is a member of the enumeration ``PeftType``, and PEFT and transformers read
its ``.value``. This module therefore adds a member to the enumeration and registers the method under it.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from pera.tuner.config import PeraConfig
from pera.tuner.model import PeraModel

NAME = "PERA"


def register() -> None:
    """Add PERA to PEFT's methods. Further calls do nothing."""
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
