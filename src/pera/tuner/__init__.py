"""The PEFT plug-in: configuration, layers, model and registration."""

from pera.tuner.behaviour import resolve_all_linear
from pera.tuner.checks import check_alpha, check_lists, check_names, check_rank, check_ranks
from pera.tuner.config import PeraConfig
from pera.tuner.expressions import check_speed
from pera.tuner.hotswap import hotswap_adapter
from pera.tuner.layers import (
    ParamWrapper,
    PeraConv1DLinear,
    PeraConvolution,
    PeraEmbedding,
    PeraLayer,
    PeraLinear,
    adapted_layers,
)
from pera.tuner.model import PeraModel
from pera.tuner.registration import register

__all__ = [
    "ParamWrapper",
    "PeraConfig",
    "PeraConv1DLinear",
    "PeraConvolution",
    "PeraEmbedding",
    "PeraLayer",
    "PeraLinear",
    "PeraModel",
    "adapted_layers",
    "check_alpha",
    "check_lists",
    "check_names",
    "check_rank",
    "check_ranks",
    "check_speed",
    "hotswap_adapter",
    "register",
    "resolve_all_linear",
]
