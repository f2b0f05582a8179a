"""The adapters that a recipe can name, under one set of words: r, alpha, dropout, target_modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

from peft import DeloraConfig, HiraConfig, LoraConfig, PeftConfig, TaskType
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from pera.errors import UserError, nearest
from pera.polynomial import expanded_rank
from pera.tuner import PeraConfig, check_alpha, check_names, check_rank


class Method(NamedTuple):
    """A PEFT configuration class, the names it gives to common words, and what it sets for this method; None keeps the
    class's default."""

    config: type[PeftConfig]
    words: dict[str, str]
    fixed: dict[str, Any]
    rank: Callable[[int], int] = int
    """The rank that is trained where a recipe asks for r."""

    @property
    def has_rank(self) -> bool:
        """Whether the method has a rank and target modules to choose."""
        return "r" not in self.fixed

    @property
    def options(self) -> set[str]:
        """What a recipe can set, in the common words and in the method's own."""
        return ({f.name for f in fields(self.config)} | set(self.words)) - set(self.fixed) - _FILLED_IN


def _pera(terms: str, normalization: str = "none", init_coefficients: float = 0.0, **fixed: Any) -> Method:
    method = {"terms": terms, "normalization": normalization, "init_coefficients": init_coefficients}
    return Method(PeraConfig, _PERA, {"coefficients": "learned", **method, **fixed})


_LORA = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
_PERA = {"alpha": "pera_alpha", "dropout": "pera_dropout"}

METHODS = {
    "pera": Method(PeraConfig, _PERA, {}),
    "lora": Method(LoraConfig, _LORA, {}),
    "lora-K": Method(LoraConfig, _LORA, {}, expanded_rank),
    "rslora": Method(LoraConfig, _LORA, {"use_rslora": True}),
    "dora": Method(LoraConfig, _LORA, {"use_dora": True}),
    "hira": Method(HiraConfig, {"dropout": "hira_dropout"}, {}),
    "delora": Method(DeloraConfig, {"dropout": "module_dropout"}, {}),
    "full": Method(
        LoraConfig, {}, {**dict.fromkeys(f.name for f in fields(LoraConfig)), "target_modules": DUMMY_TARGET_MODULES}
    ),
    "pera-published": _pera("all"),
    "pera-squares": _pera("square"),
    "pera-crosses": _pera("cross"),
    "pera-fixed": _pera("all", coefficients="fixed"),
    "pera-rms": _pera("all", "rms"),
    "pera-rms-0.3": _pera("all", "rms", 0.3),
    "pera-rms-squares": _pera("square", "rms", 0.3),
}
"""By the name that a recipe gives. A PERA with a name stays what it is, whatever the defaults of ``PeraConfig`` become:
"pera-published" is the paper's text, "pera-fixed" its published code, "pera-rms-0.3" starts h at 0.3. "lora-K" is the
LoRA of PERA's expanded rank K = r + r (r + 1) / 2. "full" trains every parameter of the model."""

ABSENT = {"mora": "MoRA is not in PEFT, so there is no implementation to compare with."}
"""Methods that the paper compares with and that are not here, and why."""


def peft_config(name: str, task_type: str = "CAUSAL_LM", /, **options: Any) -> PeftConfig:
    """The PEFT configuration of a method.

    Args:
        name: a key of :data:`METHODS`.
        task_type: PEFT's task type.
        options: options of the method's configuration class. ``alpha`` and ``dropout`` mean the same for
            every method that has them; without ``alpha`` the scale of LoRA and PERA is 1 (for rsLoRA √r), by each
            layer's own r where there is a ``rank_pattern``.

    Raises:
        UserError: unknown method, unknown option or a value that the method refuses.
    """
    if name in ABSENT:
        raise UserError(f"method.name={name!r} cannot be had: {ABSENT[name]}")
    if name not in METHODS:
        raise UserError(f"method.name={name!r} is not known; {nearest(name, METHODS)}")
    method = METHODS[name]
    for key in options:
        if key not in method.options:
            raise UserError(f"method.{key} {_not_an_option(key, name)}")
    for word, own in method.words.items():
        if word in options and own in options:
            raise UserError(f"method.{word} and method.{own} are one option of {name}; keep one.")
    renamed = {method.words.get(key, key): value for key, value in options.items()}
    fixed = {key: value for key, value in method.fixed.items() if value is not None}
    try:
        check_rank("r", renamed.get("r", 8))
        check_alpha("lora_alpha", renamed.get("lora_alpha", 1))
        if method.config is LoraConfig and method.has_rank:
            r, ranks = renamed.get("r", LoraConfig().r), dict(renamed.get("rank_pattern") or {})
            if method.rank is not int:
                r, ranks = method.rank(r), {key: method.rank(rank) for key, rank in ranks.items()}
            renamed |= {"r": r, "rank_pattern": ranks}
            if "lora_alpha" not in renamed:
                alphas = renamed.get("alpha_pattern") or {}  # its keys stay first; PEFT takes the first that matches
                renamed |= {"lora_alpha": r, "alpha_pattern": {**alphas, **ranks, **alphas}}
        return method.config(task_type=TaskType(task_type), **renamed, **fixed)
    except REFUSALS as error:
        raise refusal({"name": name, **options}, error) from error


REFUSALS = (ValueError, TypeError, AttributeError, NotImplementedError, LookupError)
"""What PEFT raises on options that it cannot take."""


def refusal(method: dict[str, Any], error: Exception) -> UserError:
    """The error for the section ``method`` of a recipe, on which PEFT or pera raised one of :data:`REFUSALS`."""
    said = " ".join(str(error).split())
    if not isinstance(error, ValueError):  # names no option
        said = f"PEFT cannot take {method}: {type(error).__name__}: {said}"
    return UserError(f"method: {said}")


def _not_an_option(key: str, name: str) -> str:
    """The end of a sentence about an option that the method ``name`` lacks."""
    if not METHODS[name].options:
        return f"is not an option of {name}, which has none; give the whole method, 'method={{name: {name}}}'."
    others = [other for other, method in METHODS.items() if key in method.options and key not in method.words.values()]
    if others:
        whole = f"'method={{name: {name}, …}}'"
        return f"is not an option of {name}, but of {others[0]}; give the whole method, such as {whole}."
    return f"is not an option of {name}; {nearest(key, METHODS[name].options)}"


def fit_to(model: nn.Module, config: PeftConfig) -> PeftConfig:
    """``config`` for ``model``: "full" takes every module that holds parameters, and the first of those that share one;
    a head that is tied to the embeddings stays as it was.

    Raises:
        UserError: as :func:`pera.tuner.check_names`.
    """
    if getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES:
        names = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
        vars(config)["modules_to_save"] = sorted({name.rpartition(".")[2] for name in names})
    else:
        check_names(model, config)
    return config


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
