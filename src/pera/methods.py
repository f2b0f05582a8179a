"""The adapters that a recipe can name, under one set of words: r, alpha, dropout, target_modules."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

from peft import DeloraConfig, HiraConfig, LoraConfig, PeftConfig, TaskType

from pera.errors import UserError, nearest
from pera.tuner import PeraConfig


class Method(NamedTuple):
    """A PEFT configuration class, the names it gives to common words, and what it sets for this method."""

    config: type[PeftConfig]
    words: dict[str, str]
    fixed: dict[str, Any]


_LORA = {"alpha": "lora_alpha", "dropout": "lora_dropout"}

METHODS = {
    "pera": Method(PeraConfig, {"alpha": "pera_alpha", "dropout": "pera_dropout"}, {}),
    "lora": Method(LoraConfig, _LORA, {}),
    "rslora": Method(LoraConfig, _LORA, {"use_rslora": True}),
    "dora": Method(LoraConfig, _LORA, {"use_dora": True}),
    "hira": Method(HiraConfig, {"dropout": "hira_dropout"}, {}),
    "delora": Method(DeloraConfig, {"dropout": "module_dropout"}, {}),
}


def peft_config(name: str, task_type: str = "CAUSAL_LM", /, **options: Any) -> PeftConfig:
    """The PEFT configuration of a method.

    Args:
        name: a key of :data:`METHODS`.
        task_type: PEFT's task type.
        options: options of the method's configuration class. ``alpha`` and ``dropout`` mean the same for
            every method that has them; without ``alpha`` the scale of LoRA and PERA is 1 (for rsLoRA √r).

    Raises:
        UserError: unknown method, unknown option or a value that the method refuses.
    """
    if name not in METHODS:
        raise UserError(f"method.name={name!r} is not known; {nearest(name, METHODS)}")
    method = METHODS[name]
    known = ({f.name for f in fields(method.config)} | set(method.words)) - set(method.fixed) - _FILLED_IN
    for key in options:
        if key not in known:
            raise UserError(f"method.{key} is not an option of {name}; {nearest(key, known)}")
    for word, own in method.words.items():
        if word in options and own in options:
            raise UserError(f"method.{word} and method.{own} are one option of {name}; keep one.")
    renamed = {method.words.get(key, key): value for key, value in options.items()}
    if method.config is LoraConfig:
        renamed.setdefault("lora_alpha", renamed.get("r", LoraConfig().r))
    try:
        return method.config(task_type=TaskType(task_type), **renamed, **method.fixed)
    except (ValueError, TypeError) as error:
        raise UserError(f"method: {error}") from error


_FILLED_IN = {
    "task_type",
    "peft_type",
    "peft_version",
    "pera_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
}
