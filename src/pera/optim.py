"""Parameter groups: separate learning rates and weight decays for A, B and h."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pera.errors import UserError, nearest

GROUPS = ("A", "B", "h", "other")

_BIAS_OR_NORM = re.compile(r"bias|layernorm|rmsnorm|(^|\.|_)norm(\.|$)")
"""Matches the lower-case names of parameters that transformers' Trainer does not decay, besides ``nn.LayerNorm``."""


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    lr_ratio: Mapping[str, float] | None = None,
    weight_decay: float | Mapping[str, float] = 0.0,
) -> list[dict[str, Any]]:
    """The trainable parameters of an adapted model as parameter groups, for any optimizer of torch.

    The groups are "A", "B" and "h", for the factors of any PEFT method (``pera_A``, ``lora_B``, …), and "other" for
    heads, biases and magnitudes. LoRA+ (arXiv 2402.12354) trains B at a higher rate than A::

        parameter_groups(model, lr=1e-4)                                 # one rate
        parameter_groups(model, lr=1e-4, lr_ratio={"B": 16})             # LoRA+: A 1e-4, B 1.6e-3
        parameter_groups(model, lr=1e-4, lr_ratio={"B": 16, "h": 10}, weight_decay={"A": 0.01, "B": 0.01})

    Args:
        model: model from ``get_peft_model``, or loaded with ``is_trainable=True``.
        lr: learning rate of A and of every group without a ratio.
        lr_ratio: learning rate of "B", "h" or "other" divided by ``lr``. With 0, the group does not change.
        weight_decay: weight decay of all groups, or by group. Groups that are not named have 0. Biases and norms never
            decay, as in transformers' Trainer. AdamW subtracts rate · decay, so a ratio multiplies the decay too.

    Returns:
        Dictionaries with ``name``, ``params``, ``lr`` and ``weight_decay``, in the order A, B, h, other. A group in
        which only some parameters decay is split into two dictionaries with the same name. Each trainable parameter is
        in exactly one dictionary.

    Raises:
        UserError: a value is not a finite number of at least 0, a group is unknown or has no parameters in this model,
            or the model has nothing to train.
    """
    lr_ratio = {} if lr_ratio is None else lr_ratio
    _check_number("lr", lr)
    check_groups(lr_ratio, weight_decay)
    group_of = _factors(model)
    norms = {p for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter not in norms and not _BIAS_OR_NORM.search(name.lower())
            members.setdefault((group_of.get(parameter, "other"), decays), []).append(parameter)
    if not members:
        raise UserError("the model has nothing to train; load an adapter with is_trainable=True to train it.")

    _check_present("lr_ratio", lr_ratio, {group for group, _ in members})
    if isinstance(weight_decay, Mapping):
        _check_present("weight_decay", weight_decay, {group for group, decays in members if decays})
    else:
        weight_decay = dict.fromkeys(GROUPS, weight_decay)
    return [
        {
            "name": group,
            "params": members[group, decays],
            "lr": float(lr) * float(lr_ratio.get(group, 1)),
            "weight_decay": float(weight_decay.get(group, 0)) if decays else 0.0,
        }
        for group in GROUPS
        for decays in (True, False)
        if (group, decays) in members
    ]


def check_groups(lr_ratio: Any, weight_decay: Any) -> None:
    """Check the values of ``lr_ratio`` and ``weight_decay`` without a model.

    Raises:
        UserError: a value is not a finite number of at least 0, or a group is unknown.
    """
    if not isinstance(lr_ratio, Mapping):
        raise UserError(f"lr_ratio={lr_ratio!r} should map groups to ratios, such as {{'B': 16}}.")
    if not isinstance(weight_decay, Mapping):
        _check_number("weight_decay", weight_decay)
        weight_decay = {}
    for key, values, known in (("lr_ratio", lr_ratio, GROUPS[1:]), ("weight_decay", weight_decay, GROUPS)):
        for group, value in values.items():
            if group not in known:
                raise UserError(f"{key}[{group!r}] cannot be set; {nearest(group, known)}")
            _check_number(f"{key}[{group!r}]", value)


def _check_number(key: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise UserError(f"{key}={value!r} should be a finite number of at least 0.")


def _check_present(key: str, asked: Mapping[str, float], present: set[str]) -> None:
    for group in asked:
        if group not in present:
            there = ", ".join(name for name in GROUPS if name in present)
            raise UserError(f"{key}[{group!r}] applies to no trained parameter; this model has the groups {there}.")


def _factors(model: nn.Module) -> dict[nn.Parameter, str]:
    """The group of each factor: the last letter of the attribute that holds it, such as ``pera_A``."""
    return {
        parameter: name[-1]
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for name in layer.adapter_layer_names
        if name.endswith(("_A", "_B", "_h"))
        for parameter in getattr(layer, name).parameters()
    }
