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


def name_alone(value: Any) -> Any:
    """The section that a bare name stands for: ``model: smollm2-135m`` means ``model: {name: smollm2-135m}``."""
    return {"name": value} if isinstance(value, str) else value
