"""The configuration of a PERA adapter, saved as ``adapter_config.json``."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, InitVar, dataclass, field, fields
from functools import wraps
from inspect import signature
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from peft import LoraConfig, PeftConfig
from peft.utils import PeftType

from pera.errors import UserError, nearest
from pera.polynomial import Coefficients, Normalization, Terms
from pera.tuner.card import saved_config, update_card
from pera.tuner.checks import LARGEST, check_alpha, check_anchors, check_lists, check_rank, is_number, shown

LAYOUT_VERSION = 2
"""Latest version of the names, shapes and order of the saved parameters (docs/architecture.md).

An adapter without anchors has version 1, so that 0.1.0 still reads it.
"""


_RETIRED = {
    "random_signs": "it changed only the start of training, so remove it from the configuration",
    "recompute": "layers decide it themselves, so remove it from the configuration",
    "normalization": "use 'rms' and train again, or merge this adapter with the version of pera that trained it",
}
"""Remedies for values that 0.1.0 could save."""


_MEANT = {
    **dict.fromkeys(("alpha", "lora_alpha"), "pera_alpha"),
    **dict.fromkeys(("dropout", "lora_dropout"), "pera_dropout"),
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), "r"),
    **dict.fromkeys(("normalisation", "normalize", "normalise"), "normalization"),
    "init_lora_weights": "init_weights",
}
"""Options by what other methods or spellings call them."""

C = TypeVar("C")


def _names_the_right_option(cls: type[C]) -> type[C]:
    """Class decorator: add the option that was meant to the TypeError about an unknown one.

    PEFT finds the options of a newer version in a saved adapter by the first words of this error.
    """
    init: Any = cls.__init__

    @wraps(init)
    def checked(self: C, *arguments: Any, **options: Any) -> None:
        known = signature(init).parameters
        for key in options:
            if key not in known:
                names = [f.name for f in fields(PeraConfig)]
                hint = f"did you mean {_MEANT[key]!r}?" if key in _MEANT else nearest(key, names)
                raise TypeError(f"{cls.__name__}.__init__() got an unexpected keyword argument {key!r}; {hint}")
        init(self, *arguments, **options)

    cls.__init__ = checked  # type: ignore[assignment,method-assign]
    return cls


@_names_the_right_option
@dataclass
class PeraConfig(PeftConfig):
    """Configuration of Polynomial Expansion Rank Adaptation (arXiv 2604.11841).

    The update of a weight is ΔW = s B̂ Â with s = α / r. B̂ is B with element-wise products of its columns appended, and
    Â is A with the products of its rows (see :mod:`pera.polynomial`). The defaults are the published method.

    Args:
        r: rank of the trained factors. The expanded rank is K = r + r(r+1)/2 for ``terms="all"``. Raise r when the
            task needs more capacity. Lower it when you want to serve the adapter as a LoRA of rank K.
        pera_alpha: numerator α of the scale. None means the rank of the layer, so that s = 1. Set it to carry over
            settings from LoRA. With a larger α, lower the learning rate.
        pera_dropout: probability in [0, 1) of zeroing an entry of the adapter's input in training. Use it on small data
            sets. It must be 0 with ``target_parameters``.
        use_rslora: scale by α / sqrt(r) instead of α / r. Use it with ``pera_alpha`` to keep one learning rate over
            several ranks. With ``pera_alpha=None`` it multiplies the scale by sqrt(r).
        target_modules: modules to adapt: a list of names or endings of names, a regular expression for the full name,
            or "all-linear". None takes PEFT's choice for the architecture. Every name in a list must match.
        exclude_modules: modules to leave out of ``target_modules``: a list of names or a regular expression.
        target_parameters: single parameters to adapt, by name or ending, such as "mlp.experts.gate_up_proj". Use it for
            fused experts. Do not use it where there is a layer to target: it builds the whole ΔW in every forward.
            Parameters take ``r`` and ``pera_alpha``; ``exclude_modules``, ``layers_to_transform``, the patterns and
            dropout do not apply to them.
        terms: products to append: "all", "square" (the cheapest, K = 2r), "cross" (needs r ≥ 2), or "none" (LoRA). Use
            "none" as a baseline.
        coefficients: "learned" trains one coefficient h for each product. "fixed" keeps h at 1 for squares and 2 for
            crosses, so that ΔW = s (BA + (BA) ⊙ (BA)) without normalization.
        init_coefficients: initial value of learned coefficients. With 0, the products start without effect. With a
            normalization, use about 0.3 to make them take part from the start. ΔW starts at zero either way.
        normalization: scale of the products. With "none", as published, products are orders of magnitude smaller than
            the factors and have almost no effect. "rms" divides each product by the root mean square of its factor; use
            it when the high-order terms should take part. "centred" also subtracts the mean from each square.
        anchors: number k of frozen rows of random signs, U and V, whose crosses with the learned rows take part:
            without products, ΔW = s (BA) ⊙ (1 1ᵀ + U diag(h) V / √k). They raise the expanded rank by r k at the cost
            of k parameters, in ``pera_h``, which start at 1. Use about 4 to 16 when the task needs more rank than r, as
            in memorizing facts. 0 means none.
        anchor_seed: seed of the frozen rows, a whole number. The rows follow from the seed, the layer's name in the
            base model and its shape alone, on every machine and version, and are not saved. An adapter whose layers
            have other names than in training is refused.
        bias: biases to train: "none", "all", or "pera_only" (biases of adapted modules). With trained biases,
            disabling the adapter does not restore the base model.
        modules_to_save: other modules to train in full and save with the adapter, such as a new classification head.
        trainable_token_indices: token ids whose embeddings are trained in full, or such lists by the name of the
            embedding. Use it for a few new tokens. For many, use ``modules_to_save``.
        ensure_weight_tying: train one adapter for the input embedding and all layers that share its weight. Use it when
            you target tied embeddings; otherwise a merge gives them separate weights.
        init_weights: True initializes A with Kaiming-uniform(a=√5) and B with zeros. "gaussian" draws A from a normal
            distribution with standard deviation 1 / r instead, which is larger for large layers. False also draws B
            and h at random; it is for tests, because training does not start at the base model.
        layers_to_transform: indices of the layers to adapt, such as [0, 1]. None adapts all layers. It needs a list of
            names in ``target_modules``, not a regular expression.
        layers_pattern: name of the module list that ``layers_to_transform`` counts, such as "layers". Set it only if
            PEFT does not find the list.
        rank_pattern: rank by module name or regular expression, where it differs from ``r``. If several names match a
            module, the longest wins (PEFT: the first). An entry that matches nothing is an error.
        alpha_pattern: α by module name or regular expression, where it differs from ``pera_alpha``, by the same rule.
        pera_version: version of the saved layout. It is filled in; do not set it.
        anchor_names: digest of the names that the frozen rows are drawn from. It is filled in; do not set it.

    Raises:
        UserError: an option has a value that cannot work. The message names the option and what would be right.

    Example::

        PeraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")  # as published
        PeraConfig(r=8, target_modules="all-linear", normalization="rms", init_coefficients=0.3)  # terms take part
        PeraConfig(r=8, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4})
    """

    r: int = 8
    pera_alpha: float | None = None
    pera_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    terms: Terms = "all"
    coefficients: Coefficients = "learned"
    init_coefficients: float = 0.0
    normalization: Normalization = "none"
    anchors: int = 0
    anchor_seed: int = 0
    bias: Literal["none", "all", "pera_only"] = "none"
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    init_weights: bool | Literal["gaussian"] = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    pera_version: int = 1
    anchor_names: str | None = None

    random_signs: InitVar[bool] = False  # this and recompute are only read from adapters of 0.1.0
    recompute: InitVar[bool | None] = None

    def __post_init__(self, random_signs: bool, recompute: bool | None) -> None:
        super().__post_init__()
        for key, value, retired in (
            ("random_signs", random_signs, random_signs is not False),
            ("recompute", recompute, recompute is not None),
            ("normalization", self.normalization, str(self.normalization) == "column"),
        ):
            if retired:
                raise UserError(f"{key}={value!r} is no longer supported; {_RETIRED[key]}.")
        loaded = self.peft_type is not None  # an adapter that was saved with an idle option still loads
        self.peft_type = PeftType("PERA")
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        self._check()
        self.pera_version = max(self.pera_version, 2 if self.anchors else 1)
        if not loaded:
            self._check_idle()
        self.checks_effects = not loaded
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    @classmethod
    def published(cls, **options: Any) -> PeraConfig:
        """The method of the paper, independent of the defaults of this class.

        It has all terms, learned coefficients that start at 0, no normalization and no anchors. ``options`` set
        everything else, such as ``r`` and ``target_modules``.

        Raises:
            UserError: ``options`` set something that the paper fixes.
        """
        method: dict[str, Any] = {
            "terms": "all",
            "coefficients": "learned",
            "init_coefficients": 0.0,
            "normalization": "none",
            "anchors": 0,
        }
        for key in method.keys() & options.keys():
            raise UserError(f"{key}={options[key]!r} is not for published(), which sets it to {method[key]!r}.")
        return cls(**options, **method)

    @classmethod
    def from_lora(cls, lora_config: LoraConfig, **options: Any) -> PeraConfig:
        """The configuration of LoRA as one of PERA. ``options`` add PERA's own, such as ``normalization``.

        Raises:
            UserError: ``lora_config`` is not a LoraConfig, it uses an option that PERA does not have (DoRA, LoftQ,
                PiSSA, …), or PERA reads its patterns in a different order.
        """
        if not isinstance(lora_config, LoraConfig):
            raise UserError(f"from_lora takes a LoraConfig of PEFT, not a {type(lora_config).__name__}.")
        for key in ("rank_pattern", "alpha_pattern"):  # PEFT takes the first match, PERA the longest name
            patterns = getattr(lora_config, key) or {}
            for first, second in combinations(patterns, 2):
                if patterns[first] == patterns[second]:
                    continue
                if first.endswith(f".{second}") or second.endswith(f".{first}"):
                    raise UserError(f"{key}: {first!r} and {second!r} match the same modules and differ; keep one.")
                if _is_name(second) and not _is_name(first):
                    raise UserError(
                        f"{key}: LoRA takes {first!r} before {second!r}, but PERA takes names before expressions; "
                        "put the name first, or keep one of them."
                    )
        renamed = {"pera_alpha": lora_config.lora_alpha, "pera_dropout": lora_config.lora_dropout}
        own = {f.name for f in fields(cls)}
        for f in fields(LoraConfig):
            value = getattr(lora_config, f.name)
            if f.name in own and f.name not in ("peft_type", "peft_version", "bias", "pera_version"):
                renamed[f.name] = value
            elif f.name == "bias":
                renamed["bias"] = {"lora_only": "pera_only"}.get(value, value)
            elif f.name == "init_lora_weights":
                if not _is_initialisation(value):
                    raise UserError(
                        f"init_lora_weights={value!r} has no counterpart in PERA; use True, False or 'gaussian'."
                    )
                renamed["init_weights"] = value
            elif f.name not in _LORA_ONLY and value != _default(f):
                raise UserError(f"{f.name}={value!r} has no counterpart in PERA; leave it at {_default(f)!r}.")
        return cls(**{**renamed, **options})

    @property
    def learns_coefficients(self) -> bool:
        """Whether the adapter trains coefficients h."""
        return self.coefficients == "learned" and (self.terms != "none" or self.anchors > 0)

    def scaling(self, r: int, alpha: float | None) -> float:
        """s = α / r, or α / sqrt(r) with ``use_rslora``, for a layer of rank ``r``. ``alpha=None`` means r."""
        alpha = r if alpha is None else alpha
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def layer_settings(self, name: str) -> tuple[int, float | None]:
        """Rank and α (or None) of the module ``name``, from the patterns or else from ``r`` and ``pera_alpha``.

        Raises:
            UserError: two regular expressions of a pattern match the module and give different values.
        """
        r: int = _lookup("rank_pattern", self.rank_pattern, name, self.r)
        return r, _lookup("alpha_pattern", self.alpha_pattern, name, self.pera_alpha)

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values. Sets become sorted lists, so that equal configurations give equal files."""
        values: dict[str, Any] = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration. If PEFT saves an adapter with it, PEFT's model card becomes one of PERA."""
        folder = Path(save_directory)
        before = saved_config(folder, type(self))
        super().save_pretrained(save_directory, **kwargs)
        update_card(folder, self, before)

    def _check(self) -> None:
        for key, choices in (
            ("terms", get_args(Terms)),
            ("coefficients", get_args(Coefficients)),
            ("normalization", get_args(Normalization)),
            ("bias", ("none", "all", "pera_only")),
        ):
            value = getattr(self, key)
            if value not in choices:
                raise UserError(f"{key}={value!r} is not known; {nearest(value, choices)}")
        check_anchors(self.anchors, self.anchor_seed)
        if self.anchor_names is not None and not isinstance(self.anchor_names, str):
            raise UserError(f"anchor_names={self.anchor_names!r} should be a string; leave it out.")
        check_lists(self)
        check_rank("r", self.r, self.terms)
        for pattern, rank in self.rank_pattern.items():
            check_rank(f"rank_pattern[{pattern!r}]", rank, self.terms)
        for key, alpha in [("pera_alpha", self.pera_alpha)] + [
            (f"alpha_pattern[{pattern!r}]", alpha) for pattern, alpha in self.alpha_pattern.items()
        ]:
            if alpha is not None:
                check_alpha(key, alpha)
        if not (is_number(self.pera_dropout) and 0 <= self.pera_dropout < 1):
            raise UserError(f"pera_dropout={shown(self.pera_dropout)} should be at least 0 and less than 1.")
        if not (is_number(self.init_coefficients) and abs(self.init_coefficients) <= LARGEST):
            raise UserError(
                f"init_coefficients={shown(self.init_coefficients)} should be a finite number of size at most "
                f"{LARGEST:.0f}."
            )
        if self.init_coefficients and self.terms == "none":
            raise UserError(f"init_coefficients={self.init_coefficients} needs terms other than 'none'; leave it at 0.")
        if self.init_coefficients and self.coefficients == "fixed":
            raise UserError(
                f"init_coefficients={self.init_coefficients} has no effect with coefficients='fixed'; leave it at 0."
            )
        if not _is_initialisation(self.init_weights):
            raise UserError(f"init_weights={self.init_weights!r} should be True, False or 'gaussian'.")
        for key in ("use_rslora", "ensure_weight_tying", "inference_mode"):
            if not isinstance(getattr(self, key), bool):
                raise UserError(f"{key}={getattr(self, key)!r} should be True or False.")
        if isinstance(self.target_modules, str):
            for key in ("layers_to_transform", "layers_pattern"):
                if getattr(self, key) is not None:
                    raise UserError(f"{key} needs a list of names in target_modules, not {self.target_modules!r}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError(f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform.")
        if not isinstance(self.pera_version, int) or isinstance(self.pera_version, bool) or self.pera_version < 1:
            raise UserError(f"pera_version={self.pera_version!r} should be a whole number; leave it out.")
        if self.pera_version > LAYOUT_VERSION:
            raise UserError(
                f"pera_version={shown(self.pera_version)} is newer than the layout that this pera reads, "
                f"{LAYOUT_VERSION}; install a newer pera."
            )

    def _check_idle(self) -> None:
        """Raise UserError if an option has no effect next to the others."""
        for key, default, anchored in (("normalization", "none", False), ("coefficients", "learned", self.anchors > 0)):
            if self.terms == "none" and not anchored and getattr(self, key) != default:
                raise UserError(
                    f"{key}={getattr(self, key)!r} has no effect with terms='none'; leave it at {default!r}."
                )
        if self.anchor_seed and not self.anchors:
            raise UserError(f"anchor_seed={self.anchor_seed} has no effect without anchors; leave it at 0.")


# Options of LoRA that PERA ignores. It detects the layout of Conv1D weights itself. The others say how other methods
# run, not what they train.
_LORA_ONLY = {
    "peft_type",
    "peft_version",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
}


def _default(f: Any) -> Any:
    return f.default if f.default is not MISSING else f.default_factory()


def _is_initialisation(value: Any) -> bool:
    return isinstance(value, bool) or value == "gaussian"


def _lookup(key: str, pattern: dict[str, Any], name: str, default: Any) -> Any:
    """The value of ``pattern`` for the module ``name``: from the longest name that matches, else from an expression.

    PEFT takes the first match. Saving a configuration does not keep the order of the entries, so PERA cannot.
    """
    matching = [k for k in pattern if re.match(rf"(.*\.)?({k})$", name)]
    names = [k for k in matching if _is_name(k)]
    if names:
        return pattern[max(names, key=len)]
    values = {pattern[k] for k in matching}
    if len(values) > 1:
        raise UserError(f"{key}: {' and '.join(map(repr, matching))} both match {name!r} and differ; keep one.")
    return values.pop() if values else default


def _is_name(pattern: str) -> bool:
    return re.fullmatch(r"[\w.]+", pattern) is not None
