"""What the sections of recipes and studies share: strict keys and values, and paths that hold from everywhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_serializer,
)
from pydantic_core import PydanticCustomError

from pera_lab.files import user_path


class Section(BaseModel):
    """A part of a recipe or of a study. Unknown keys are errors, and so are booleans in place of numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _reject_booleans_as_numbers(cls, value: Any, known: ValidatorFunctionWrapHandler) -> Any:
        found = known(value)
        if _boolean_became_number(value, found):
            raise PydanticCustomError("number", "Input should be a number")
        return found


class GrownSection(Section):
    """A section with keys that are newer than recipes and studies which must keep their text."""

    newer: ClassVar[tuple[str, ...]]
    """Keys that are left out of what is written if they have no value, which is None or false."""

    @model_serializer(mode="wrap")
    def _without_newer_keys(self, known: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in known(self).items() if value or key not in self.newer}


def _boolean_became_number(given: Any, found: Any) -> bool:
    if isinstance(given, list) and isinstance(found, list):
        return any(map(_boolean_became_number, given, found))
    return isinstance(given, bool) and found is not given


def absolute_path(*words: str) -> AfterValidator:
    """Make an existing path absolute, so that it holds from every working folder.

    Args:
        words: values with a meaning of their own, which are kept even if a file of that name exists.
    """

    def convert(name: str) -> str:
        path = user_path(name)
        return os.path.abspath(path) if name and name not in words and os.path.exists(path) else name

    return AfterValidator(convert)


def one_message(sentence: str) -> WrapValidator:
    """Replace the messages of a union, one for each member, by one sentence."""

    def check(value: Any, known: ValidatorFunctionWrapHandler) -> Any:
        try:
            return known(value)
        except ValidationError as error:
            raise PydanticCustomError("either", sentence) from error

    return WrapValidator(check)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key, such as ``{"training.seed": 42}``. An empty section is a value."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


_MEANT = {
    "training.learning_rate": ("lr", "rate"),
    "training.max_steps": ("steps", "num_steps", "num_train_steps"),
    "training.epochs": ("epoch", "num_epochs", "num_train_epochs"),
    "training.batch_size": ("batch", "bs", "train_batch_size", "micro_batch_size", "per_device_train_batch_size"),
    "training.gradient_accumulation_steps": ("accumulation", "grad_accum", "gradient_accumulation"),
    "training.lr_scheduler": ("scheduler", "schedule", "lr_scheduler_type"),
    "training.warmup_ratio": ("warmup",),
    "training.max_grad_norm": ("grad_clip", "gradient_clipping", "clip_grad_norm"),
    "training.max_length": ("max_len", "max_seq_len", "max_seq_length", "seq_len", "sequence_length", "cutoff_len"),
    "model.name": ("base_model", "model_name", "model_id", "model_name_or_path"),
    "model.dtype": ("torch_dtype", "precision", "mixed_precision"),
    "model.dtype=bfloat16": ("bf16",),
    "model.dtype=float16": ("fp16", "half"),
    "model.quantization=nf4": ("load_in_4bit", "4bit"),
    "model.quantization=int8": ("load_in_8bit", "8bit"),
    "model.attn_implementation": ("attention", "flash_attention", "use_flash_attention_2"),
    "method.r": ("rank", "lora_r", "lora_rank"),
    "method.alpha": ("lora_alpha",),
    "method.dropout": ("lora_dropout",),
    "method.target_modules": ("targets", "modules", "lora_target_modules"),
    "method.normalization": ("normalisation", "norm"),
    "task.data": ("dataset", "dataset_name", "train_file"),
}
"""Keys of a recipe, or overrides, by what other tools call them."""

_KEYS = {slip: key for key, slips in _MEANT.items() for slip in slips}


def meant(key: str) -> str | None:
    """The key of a recipe, with its section, that another tool calls ``key``: "training.learning_rate" for "lr"."""
    return _KEYS.get(key)


def name_alone(value: Any) -> Any:
    """The section that a bare name stands for: ``model: smollm2-135m`` means ``model: {name: smollm2-135m}``."""
    return {"name": value} if isinstance(value, str) else value
