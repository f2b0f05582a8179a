"""How a base model computes attention, and on which devices its layers are."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import utils

from pera.errors import UserError, one_line
from pera_lab import processes
from pera_lab.environment import device

Attention = Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"]
"""The kinds of attention that transformers can be asked for without code from the hub."""

DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
"""The ways in which accelerate divides the layers of a model over devices."""


def check_attention(kind: Attention, name: str, config: Any, auto_class: Any, trust_remote_code: bool) -> None:
    """Check that a model can compute attention in one way. The model is built on the meta device.

    Args:
        kind: the kind of attention.
        name: the name of the model in messages.
        config: its configuration.
        auto_class: the class of transformers that loads it.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: the model does not support it, or this machine lacks a package or a device that it needs.
    """
    reason: str | None
    if kind.startswith("flash") and not getattr(utils, f"is_flash_attn_{kind[-1]}_available", bool)():
        reason = "its package is not installed, or does not support the devices of this machine"
    else:
        try:
            with torch.device("meta"):
                model = auto_class.from_config(config, attn_implementation=kind, trust_remote_code=trust_remote_code)
            found = model.config.get_text_config()._attn_implementation
            reason = None if found == kind else f"transformers uses {found} instead"
        except (ImportError, ValueError) as error:
            reason = one_line(error).rstrip(".")
    if reason is not None:
        raise UserError(
            f"model.attn_implementation={kind!r} is not available for {name!r}: {reason}; give another, such as eager "
            "or sdpa, or leave it out."
        )


def check_computed(kind: Attention | None, name: str, model: Any) -> None:
    """Raise UserError if the dtype of a model is not one that its attention computes in."""
    if kind is not None and kind.startswith("flash") and model.dtype not in (torch.bfloat16, torch.float16):
        raise UserError(
            f"model.attn_implementation={kind!r} computes in bfloat16 or float16, and {name!r} is in "
            f"{str(model.dtype).removeprefix('torch.')}; set model.dtype=bfloat16."
        )


def check_trainable(kind: Attention | None) -> None:
    """Raise UserError if this machine computes attention in one way, but not its gradient."""
    if kind == "flex_attention" and device().type == "cpu":
        raise UserError(
            f"model.attn_implementation={kind!r} has no gradient on a CPU; give another, such as eager or sdpa, or use "
            "a GPU."
        )


def check_map(device_map: DeviceMap | None) -> None:
    """Raise UserError if several processes would each place the whole model on all accelerators."""
    if device_map is not None and processes.count() > 1:
        raise UserError(
            f"model.device_map={device_map!r} divides the model of one process over all accelerators, and there are "
            f"{processes.count()} processes; start one, or leave device_map out."
        )


def check_placed(device_map: DeviceMap | None, name: str, model: Any) -> None:
    """Raise UserError if a device map left layers off the accelerators, in memory of the CPU or on a disk."""
    places = getattr(model, "hf_device_map", {})
    for layer, place in places.items():
        if device_map is not None and (place == "disk" or (place == "cpu" and len(set(places.values())) > 1)):
            raise UserError(
                f"model.device_map={device_map!r} leaves {layer} of {name!r} on the {place}, because the accelerators "
                "are too small; add model.quantization, or use more of them."
            )
