"""The PEFT plug-in: configuration, layers and model, and their registration with PEFT."""

from pera.tuner.config import PeraConfig
from pera.tuner.layers import PeraConv1DLinear, PeraLayer, PeraLinear
from pera.tuner.model import PeraModel, check_names
from pera.tuner.registration import register

__all__ = ["PeraConfig", "PeraConv1DLinear", "PeraLayer", "PeraLinear", "PeraModel", "check_names", "register"]
