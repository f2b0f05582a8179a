"""The engine that divides a training over processes, as ``accelerate launch`` chooses it: DDP, FSDP2 or DeepSpeed."""

from __future__ import annotations

import os
from typing import Any

from accelerate.utils import parse_flag_from_env

from pera.errors import UserError
from pera_lab import processes


def check(batch_size: int, quantization: str | None) -> None:
    """Check what torchrun and accelerate decide.

    Args:
        batch_size: the examples of a batch, over all processes.
        quantization: how the base model is quantized while it is loaded.

    Raises:
        UserError: the processes cannot share a batch, the engine cannot train on a quantized base, or accelerate has
            a setting that pera does not support.
    """
    for variable, what in (("MEGATRON_LM", "Megatron-LM"), ("PARALLELISM_CONFIG", "parallelism")):
        if parse_flag_from_env(f"ACCELERATE_USE_{variable}"):
            raise UserError(f"accelerate: {what} is not supported by pera train; configure DDP, FSDP or DeepSpeed.")
    if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION") or "no") != "no":
        raise UserError(
            f"accelerate: mixed_precision={precision} would change the dtype that the recipe gives; set it to no, and "
            "choose the dtype with model.dtype."
        )
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if (deepspeed or processes.fsdp()) and quantization is not None:  # packed weights would be divided: not tried
        raise UserError(
            f"model.quantization={quantization!r} is not supported with {'DeepSpeed' if deepspeed else 'FSDP'}; start "
            "the processes with torchrun, or leave quantization out."
        )
    gathers = parse_flag_from_env("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL")
    zero3 = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    if deepspeed and zero3 and not gathers:
        raise UserError("accelerate: zero_stage=3 saves no adapter without zero3_save_16bit_model=true; set it.")
    if processes.fsdp():
        _check_fsdp()
    if batch_size % processes.count():
        raise UserError(
            f"training.batch_size={batch_size} cannot be divided over {processes.count()} processes, which share "
            f"each batch; give a multiple of {processes.count()}."
        )


def _check_fsdp() -> None:
    """Raise UserError for settings of FSDP that would be ignored, or with which a training was not tried."""
    if processes.count() == 1:
        raise UserError("accelerate: FSDP divides weights over processes, and there is one; set num_processes.")
    for name, right, reason in (
        ("version", "2", "pera train supports FSDP2 only"),
        ("state_dict_type", "FULL_STATE_DICT", "its checkpoints have to be whole to be checked"),
        ("offload_params", "false", "offloading was not tried with it"),
        ("activation_checkpointing", "false", "the recipe decides it, with training.gradient_checkpointing"),
        ("ignored_modules", "", "adapters in ignored modules would differ between the processes"),
    ):
        value = os.environ.get(f"FSDP_{name.upper()}", "1" if name == "version" else right)
        if value.lower() != right.lower():
            remedy = f"set it to {right}" if right else "leave it out"
            raise UserError(f"accelerate: fsdp_{name}={value}: {reason}; {remedy}.")
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP":
        raise UserError(
            "accelerate: fsdp_auto_wrap_policy=SIZE_BASED_WRAP can divide the embeddings twice; set it to "
            "TRANSFORMER_BASED_WRAP."
        )


def check_units(model: Any) -> None:
    """Check that FSDP can make a unit of each module of the classes that accelerate wraps.

    Args:
        model: the base model.

    Raises:
        UserError: the model has no module of a class, or one of them holds the embeddings, which accelerate makes a
            unit of its own.
    """
    if not processes.fsdp() or os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() != "TRANSFORMER_BASED_WRAP":
        return
    given = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    wrapped = given.split(",") if given else list(model._no_split_modules or ())
    found = {type(module).__name__: module for module in model.modules()}
    table = model.get_input_embeddings()
    usable = [name for name in wrapped if name in found and all(table is not each for each in found[name].modules())]
    for name in wrapped:
        if name not in usable:
            reason = "holds the embeddings" if name in found else "is not in the model"
            raise UserError(
                f"accelerate: fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP: {name} {reason}; set "
                f"fsdp_transformer_layer_cls_to_wrap={','.join(usable) or '<class of the blocks>'}."
            )
