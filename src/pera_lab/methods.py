"""The PEFT methods that a recipe can name, with common option names: r, alpha, dropout, target_modules."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from peft import DeloraConfig, HiraConfig, LoraConfig, PeftConfig, TaskType
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from pera.errors import UserError, nearest, one_line
from pera.polynomial import expanded_rank
from pera.tuner import PeraConfig, check_alpha, check_names, check_rank, check_ranks, resolve_all_linear
from pera_lab.plugins import check_unique, load_plugins
from pera_lab.sections import meant

GROUP = "pera.methods"
"""The entry-point group. Each entry point is a table of methods, such as :data:`BUILT_IN`."""

_FILLED_IN = {
    "task_type",
    "peft_type",
    "peft_version",
    "pera_version",
    "anchor_names",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
}
"""Fields of a configuration class that PEFT or pera fills in."""


@dataclass(frozen=True)
class Method:
    """A PEFT method as a recipe names it.

    Example: ``Method(VeraConfig, {"dropout": "vera_dropout"}, {"d_initial": 0.1})``.

    Args:
        config: the PEFT configuration class.
        aliases: common option names, each with the class's own name for it.
        fixed: options that this method sets. A recipe cannot change them. None keeps the class's default.
        rank: the rank to train, as a function of the recipe's r. Only for subclasses of ``LoraConfig``.
    """

    config: type[PeftConfig]
    aliases: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rank: Callable[[int], int] = int

    @property
    def options(self) -> set[str]:
        """The options that a recipe can set, under the common names and the class's own names."""
        return ({f.name for f in fields(self.config)} | set(self.aliases)) - set(self.fixed) - _FILLED_IN

    @property
    def has_rank(self) -> bool:
        """Whether a recipe can set the rank."""
        return "r" in self.options


def _pera(
    terms: str, normalization: str = "none", init_coefficients: float = 0.0, anchors: int = 0, **fixed: Any
) -> Method:
    variant = {"terms": terms, "normalization": normalization, "init_coefficients": init_coefficients}
    frozen = {"anchors": anchors} if anchors else {"anchors": 0, "anchor_seed": 0}  # a seed has no effect without them
    return Method(PeraConfig, _PERA, {"coefficients": "learned", **variant, **frozen, **fixed})


_LORA = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
_PERA = {"alpha": "pera_alpha", "dropout": "pera_dropout"}
_NOTHING_TO_SET = dict.fromkeys(f.name for f in fields(LoraConfig))

BUILT_IN = {
    "pera": Method(PeraConfig, _PERA),
    "lora": Method(LoraConfig, _LORA),
    "lora-K": Method(LoraConfig, _LORA, rank=expanded_rank),  # the expanded rank of PERA: K = r + r (r + 1) / 2
    "rslora": Method(LoraConfig, _LORA, {"use_rslora": True}),
    "dora": Method(LoraConfig, _LORA, {"use_dora": True}),
    "hira": Method(HiraConfig, {"dropout": "hira_dropout"}, {"rank_pattern": None}),  # PEFT 0.21 ignores it
    "delora": Method(DeloraConfig, {"dropout": "module_dropout"}),
    "full": Method(LoraConfig, fixed={**_NOTHING_TO_SET, "target_modules": DUMMY_TARGET_MODULES}),
    # Variants of PERA. They keep their meaning when the defaults of PeraConfig change.
    "pera-published": _pera("all"),  # as in the text of the paper
    "pera-squares": _pera("square"),
    "pera-crosses": _pera("cross"),
    "pera-fixed": _pera("all", coefficients="fixed"),  # as in the published code
    "pera-rms": _pera("all", "rms"),
    "pera-rms-0.3": _pera("all", "rms", 0.3),  # h starts at 0.3
    "pera-rms-squares": _pera("square", "rms", 0.3),
    "pera-anchors-1": _pera("none", anchors=1),  # no products
    "pera-anchors-4": _pera("none", anchors=4),
    "pera-anchors-16": _pera("none", anchors=16),
    "pera-anchors-64": _pera("none", anchors=64),
    "pera-anchors-4-all": _pera("all", "rms", 0.3, anchors=4),  # products as in pera-rms-0.3
}
"""The methods of this package. "full" trains every parameter of the model."""

ABSENT = {"mora": "MoRA is not in PEFT, so there is no implementation to compare with."}
"""Methods that the paper compares with and that are missing here, with the reason."""


@cache
def known_methods() -> dict[str, Method]:
    """The methods of all installed packages, by name: the tables of the entry-point group ``pera.methods``.

    Raises:
        UserError: a table cannot be loaded or is not a table of methods, or two packages define one name.
    """
    found: dict[str, Method] = {}
    owners: dict[str, str] = {}
    for plugin in load_plugins(GROUP):
        table = plugin.loaded
        if not isinstance(table, Mapping) or not all(isinstance(method, Method) for method in table.values()):
            raise UserError(
                f"{GROUP}: {plugin.value!r} of package {plugin.package!r} should be a table of Method objects by name."
            )
        for name in table:
            check_unique(GROUP, owners, plugin, name)
        found |= table
    return found


def find_method(name: str) -> Method:
    """The method that a recipe calls ``name``.

    Raises:
        UserError: there is no such method.
    """
    if name in ABSENT:
        raise UserError(f"method.name={name!r} is not available: {ABSENT[name]}")
    if name not in known_methods():
        raise UserError(f"method.name={name!r} is not known; {nearest(name, known_methods())}")
    return known_methods()[name]


def peft_config(name: str, task_type: str = "CAUSAL_LM", /, **options: Any) -> PeftConfig:
    """The PEFT configuration of a method.

    ``alpha`` and ``dropout`` mean the same for every method that has them. Without ``alpha`` the scale of LoRA and PERA
    is 1, and that of rsLoRA √r. With a ``rank_pattern`` this holds for each layer's own r.

    Args:
        name: a name in :func:`known_methods`.
        task_type: PEFT's task type.
        options: options of the method, under the common names or the configuration class's own names.

    Raises:
        UserError: the method or an option is unknown, or the method rejects a value.
    """
    method = find_method(name)
    for key in options:
        if key not in method.options:
            raise UserError(f"method.{key} {_not_an_option(key, name)}")
    for alias, own in method.aliases.items():
        if alias in options and own in options:
            raise UserError(f"method.{alias} and method.{own} are the same option of {name}; keep one of them.")
    if not repeatable(init := options.get("init_lora_weights")):
        raise UserError(
            f"method.init_lora_weights={init!r} changes the base model in a way that loading the adapter cannot "
            "repeat; use 'pissa', 'olora' or 'gaussian'."
        )
    renamed = {method.aliases.get(key, key): value for key, value in options.items()}
    fixed = {key: value for key, value in method.fixed.items() if value is not None}
    try:
        check_rank("r", renamed.get("r", 8))
        check_alpha("lora_alpha", renamed.get("lora_alpha", 1))
        _check_dropout(method, renamed)
        _check_booleans(method, renamed)
        if issubclass(method.config, LoraConfig) and method.has_rank:
            renamed |= _lora_ranks(method, renamed)
        return method.config(task_type=TaskType(task_type), **renamed, **fixed)
    except REFUSALS as error:
        raise refusal({"name": name, **options}, error) from error


def other_options(given: Mapping[str, Any], config: PeftConfig) -> dict[str, Any]:
    """The options of a method that a recipe does not set, with their values, under the common names.

    Args:
        given: the recipe's section ``method``.
        config: its PEFT configuration.
    """
    method = find_method(given["name"])
    names = {own: alias for alias, own in method.aliases.items()}
    hidden = _FILLED_IN | {own for alias, own in method.aliases.items() if alias in given} | given.keys()
    values = {names.get(f.name, f.name): getattr(config, f.name) for f in fields(config) if f.name not in hidden}
    plain = json.dumps(values, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    found: dict[str, Any] = json.loads(plain)
    return found if method.options else {}


def repeatable(init: Any) -> bool:
    """Whether loading a LoRA repeats what its initialization ``init_lora_weights`` did to the base model.

    PiSSA and OLoRA decompose each weight, with equal results each time. The others draw numbers or need data.
    """
    return not str(init).lower().startswith(("pissa_niter", "corda", "loftq", "lora_ga"))


def _check_dropout(method: Method, options: dict[str, Any]) -> None:
    """Raise UserError for a dropout that PEFT would ignore, such as -1."""
    key = method.aliases.get("dropout", "dropout")
    value = options.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"{key}={value!r} should be at least 0 and less than 1.")


def _check_booleans(method: Method, options: dict[str, Any]) -> None:
    """Raise UserError for a text such as 'no', which would count as true."""
    for field_ in fields(method.config):
        if field_.type in (bool, "bool") and not isinstance(options.get(field_.name, True), bool):
            raise UserError(f"{field_.name}={options[field_.name]!r} should be true or false.")


def _lora_ranks(method: Method, options: dict[str, Any]) -> dict[str, Any]:
    """Ranks and alphas of a LoRA, with an alpha that gives every layer the scale 1 unless the options set one."""
    r, ranks = options.get("r", LoraConfig().r), dict(options.get("rank_pattern") or {})
    if method.rank is not int:
        r, ranks = method.rank(r), {key: method.rank(rank) for key, rank in ranks.items()}
    if "lora_alpha" in options:
        return {"r": r, "rank_pattern": ranks}
    alphas = options.get("alpha_pattern") or {}  # its keys stay first, because PEFT takes the first match
    return {"r": r, "rank_pattern": ranks, "lora_alpha": r, "alpha_pattern": {**alphas, **ranks, **alphas}}


REFUSALS = (ValueError, TypeError, AttributeError, NotImplementedError, LookupError, ArithmeticError, ImportError)
"""What PEFT raises for options that it cannot use."""


def refusal(method: dict[str, Any], error: Exception) -> UserError:
    """The error to raise when PEFT or pera raised one of :data:`REFUSALS` for the recipe's section ``method``."""
    said = one_line(error)
    if not isinstance(error, ValueError):  # such a message does not name the option
        said = f"PEFT cannot use {method}: {type(error).__name__}: {said}"
    return UserError(f"method: {said}")


def _not_an_option(key: str, name: str) -> str:
    """The end of a sentence about an option that the method ``name`` does not have."""
    known = known_methods()
    found = meant(key)
    if found is not None and (not found.startswith("method.") or found.removeprefix("method.") in known[name].options):
        return f"is not an option of {name}; did you mean {found!r}?"
    if not known[name].options:
        return f"is not an option of {name}, which has none; give the whole method, 'method={{name: {name}}}'."
    others = [other for other, method in known.items() if key in method.options and key not in method.aliases.values()]
    if others:
        whole = f"'method={{name: {name}, …}}'"
        return f"is an option of {others[0]}, not of {name}; give the whole method, such as {whole}."
    return f"is not an option of {name}; {nearest(key, known[name].options)}"


def resolve_targets(model: nn.Module, config: PeftConfig) -> PeftConfig:
    """``config`` with its targets resolved for ``model``.

    For "full" they become every module that holds parameters. If modules share a parameter, the first of them is
    taken. A head that is tied to the embeddings stays tied. Every other configuration is checked, and "all-linear" is
    resolved.

    Raises:
        UserError: as :func:`pera.tuner.check_names`.
    """
    if getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES:
        names = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
        vars(config)["modules_to_save"] = sorted({name.rpartition(".")[2] for name in names})
    else:
        check_names(model, config)
        resolve_all_linear(model, config)
        check_ranks(model, config)
    return config
