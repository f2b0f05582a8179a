"""The configuration of a PERA adapter, written to ``adapter_config.json``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import MISSING, InitVar, dataclass, field, fields
from itertools import combinations
from typing import Any, Literal, get_args

from peft import LoraConfig, PeftConfig
from peft.utils import PeftType

from pera.errors import UserError, nearest
from pera.polynomial import Coefficients, Normalization, Terms

LAYOUT_VERSION = 1
"""Version of the names, shapes and order of the saved parameters (docs/architecture.md)."""


_RETIRED = {
    "random_signs": "it changed only the start of training, so remove it from the configuration",
    "recompute": "layers decide it themselves, so remove it from the configuration",
    "normalization": "use 'rms' and train again, or merge this adapter with the version of pera that trained it",
}
"""What to do about a value that earlier versions could save."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class PeraConfig(PeftConfig):
    """Configuration of Polynomial Expansion Rank Adaptation (arXiv 2604.11841).

    The update of a weight is ΔW = s B̂ Â with s = α / r, where B̂ and Â are B and A with element-wise
    products of their columns and rows appended (see :mod:`pera.polynomial`). The defaults are the
    published method.

    Args:
        r: rank of the trained factors, at least 1. The merged update has rank up to
            K = r + r(r+1)/2 for ``terms="all"``.
        pera_alpha: scale numerator α; None means the layer's own r, so that s = 1. Raise it only if
            you also lower the learning rate.
        pera_dropout: probability in [0, 1) of dropping an entry of the adapter's input while training.
        use_rslora: scale by α / sqrt(r) instead of α / r. Has no effect when ``pera_alpha`` is None
            and r = 1; otherwise use it to keep one learning rate over several ranks.
        target_modules: names (or endings of names) of the modules to adapt, a regular expression for
            the full name, or "all-linear". None takes PEFT's choice for the architecture. Every name
            of a list has to match a module.
        exclude_modules: names, or a regular expression, of modules to leave out.
        target_parameters: names (or endings of names) of single parameters to adapt, such as the fused experts
            "mlp.experts.gate_up_proj". Each forward builds their whole update, so use it where there is no layer
            to name in ``target_modules``. They take ``r`` and ``pera_alpha``, and no dropout; ``exclude_modules`` and
            ``layers_to_transform`` do not act on them.
        terms: products that take part: "all", "square" (K = 2r, cheapest), "cross" (needs r ≥ 2), or
            "none", which is LoRA.
        coefficients: "learned" trains one coefficient h for each product; "fixed" keeps 1 for squares
            and 2 for crosses, so that ΔW = s (BA + (BA) ⊙ (BA)) for ``terms="all"`` without normalization.
        init_coefficients: the value learned coefficients start at. ΔW is zero at the start either way.
        normalization: "none" as published; the products are then orders of magnitude below the factors
            and hardly take part. "rms" divides a product by the root mean square of its factor, which
            wakes them; use it when the high-order terms are what you want to study or use. "centred" is "rms" with
            every square less its mean, so that squares have no constant part in common; without squares it is "rms".
        bias: which biases to train: "none", "all", or "pera_only" (those of adapted modules).
        modules_to_save: further modules to train in full and save, such as a classification head.
        trainable_token_indices: rows of the input embedding to train in full, as token ids, or by the name of an
            embedding; use it for a few new tokens.
        ensure_weight_tying: one adapter for the input embedding and the layers that share its weight. Use it when
            you target either in a model with tied embeddings; otherwise a merge separates them.
        init_weights: True starts with ΔW = 0 (A Kaiming-uniform, B zero). "gaussian" does so with A normal of standard
            deviation 1 / r, as LoRA's of that name, embeddings apart: a larger A, which brings products nearer to the
            factors without normalization. False draws B and h at random as well, for tests only.
        layers_to_transform: index or indices of the layers to adapt; the others are left alone. Not
            together with a regular expression.
        layers_pattern: name of the list of layers, if it is not found by itself.
        rank_pattern: rank by module name or regular expression, where it differs from ``r``.
        alpha_pattern: α by module name or regular expression, where it differs from ``pera_alpha``.
        pera_version: version of the saved layout; filled in.

    Raises:
        UserError: a value that cannot work, named with what would be right.
    """

    r: int = _option(8, "Rank of the trained factors. Raise it when the task is far from the base model's training.")
    pera_alpha: float | None = _option(
        None, "Scale numerator; None means the layer's own rank, so that the scale alpha / r is 1."
    )
    pera_dropout: float = _option(0.0, "Dropout on the adapter's input while training. Use it on small data sets.")
    use_rslora: bool = _option(False, "Scale by alpha / sqrt(r). Use it to keep one learning rate over several ranks.")
    target_modules: list[str] | str | None = _option(
        None, "Module names, a regular expression, or 'all-linear'. None takes PEFT's choice for the architecture."
    )
    exclude_modules: list[str] | str | None = _option(None, "Module names or a regular expression to leave out.")
    target_parameters: list[str] | None = _option(
        None, "Names of single parameters to adapt, such as fused experts. Only where there is no layer to name."
    )
    terms: Terms = _option(
        "all", "Products that take part: 'all', 'square' (cheapest), 'cross' (needs r of 2 or more), 'none' (LoRA)."
    )
    coefficients: Coefficients = _option(
        "learned", "'learned' trains one coefficient for each product; 'fixed' keeps 1 for squares and 2 for crosses."
    )
    init_coefficients: float = _option(
        0.0, "Value that learned coefficients start at; the update starts at zero anyway."
    )
    normalization: Normalization = _option(
        "none",
        "'none' as published; 'rms' gives a product the scale of one factor and so wakes the high-order terms; "
        "'centred' also subtracts the mean from each square.",
    )
    bias: Literal["none", "all", "pera_only"] = _option(
        "none", "Biases to train: 'none', 'all', 'pera_only'. With biases trained, disabling is not the base model."
    )
    modules_to_save: list[str] | None = _option(None, "Further modules to train in full and save, such as a new head.")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = _option(
        None, "Token ids whose embeddings are trained in full, or such by name of the embedding. For a few new tokens."
    )
    ensure_weight_tying: bool = _option(
        False, "One adapter for tied input and output embeddings. Without it a merge separates them."
    )
    init_weights: bool | Literal["gaussian"] = _option(
        True,
        "True starts with a zero update, as does 'gaussian', with A normal of deviation 1 / r. False, where B and h "
        "are random, is for tests only.",
    )
    layers_to_transform: list[int] | int | None = _option(None, "Indices of the layers to adapt. None adapts all.")
    layers_pattern: list[str] | str | None = _option(None, "Name of the list of layers, with layers_to_transform only.")
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Rank by module name or regular expression, where it differs from r."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Alpha by module name or regular expression, where it differs."}
    )
    pera_version: int = _option(LAYOUT_VERSION, "Version of the saved layout; filled in, not to be set.")

    random_signs: InitVar[bool] = False  # this and the next are read from old adapters alone
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
        self.peft_type = PeftType("PERA")
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        self._check()
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    @classmethod
    def published(cls, **options: Any) -> PeraConfig:
        """The method of the paper, whatever the defaults become: all terms, learned coefficients started at 0,
        no normalization. ``options`` set the rest (r, target_modules, …); s is 1 unless they set ``pera_alpha``.

        Raises:
            UserError: an option that the paper fixes.
        """
        method: dict[str, Any] = {
            "terms": "all",
            "coefficients": "learned",
            "init_coefficients": 0.0,
            "normalization": "none",
        }
        for key in method.keys() & options.keys():
            raise UserError(f"{key}={options[key]!r} is not for published(), which sets it to {method[key]!r}.")
        return cls(**options, **method)

    @classmethod
    def from_lora(cls, lora_config: LoraConfig, **options: Any) -> PeraConfig:
        """Carry a LoRA configuration over to PERA; ``options`` are PERA's own (terms, normalization, …).

        Raises:
            UserError: it is no LoRA configuration, it uses an option of LoRA that PERA does not have (DoRA, LoftQ,
                another initialisation, …), or patterns that PERA may read in another order.
        """
        if not isinstance(lora_config, LoraConfig):
            raise UserError(f"from_lora takes a LoraConfig of PEFT, not a {type(lora_config).__name__}.")
        for key in ("rank_pattern", "alpha_pattern"):  # PEFT takes the first that matches, PERA the longest name
            patterns = getattr(lora_config, key) or {}
            for first, second in combinations(patterns, 2):
                if patterns[first] == patterns[second]:
                    continue
                if first.endswith(f".{second}") or second.endswith(f".{first}"):
                    raise UserError(f"{key}: {first!r} and {second!r} match the same modules and disagree; keep one.")
                if _is_plain(second) and not _is_plain(first):
                    raise UserError(
                        f"{key}: LoRA takes {first!r} before {second!r}, and PERA a name before an expression; "
                        "put the name first, or keep one."
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
            elif f.name not in _LORA_WITHOUT_COUNTERPART and value != _default(f):
                raise UserError(f"{f.name}={value!r} has no counterpart in PERA; leave it at {_default(f)!r}.")
        return cls(**{**renamed, **options})

    @property
    def learns_coefficients(self) -> bool:
        """Whether the adapter has an h to train."""
        return self.coefficients == "learned" and self.terms != "none"

    def scaling(self, r: int, alpha: float | None) -> float:
        """s = α / r, or α / sqrt(r) with ``use_rslora``, for a layer of rank ``r``; α None means r."""
        alpha = r if alpha is None else alpha
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def layer_settings(self, name: str) -> tuple[int, float | None]:
        """Rank and α (or None) of the module ``name``, after ``rank_pattern`` and ``alpha_pattern``.

        Raises:
            UserError: two entries of a pattern match the module and disagree.
        """
        r: int = _lookup("rank_pattern", self.rank_pattern, name, self.r)
        return r, _lookup("alpha_pattern", self.alpha_pattern, name, self.pera_alpha)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain, ordered values, so that equal configurations are equal files."""
        values: dict[str, Any] = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}

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
        check_lists(self)
        check_rank("r", self.r, self.terms)
        for pattern, rank in self.rank_pattern.items():
            check_rank(f"rank_pattern[{pattern!r}]", rank, self.terms)
        for key, alpha in [("pera_alpha", self.pera_alpha)] + [
            (f"alpha_pattern[{pattern!r}]", alpha) for pattern, alpha in self.alpha_pattern.items()
        ]:
            if alpha is not None:
                check_alpha(key, alpha)
        if not (_is_number(self.pera_dropout) and 0 <= self.pera_dropout < 1):
            raise UserError(f"pera_dropout={self.pera_dropout!r} should be at least 0 and below 1.")
        if not (_is_number(self.init_coefficients) and math.isfinite(self.init_coefficients)):
            raise UserError(f"init_coefficients={self.init_coefficients!r} should be a finite number.")
        if self.init_coefficients and self.terms == "none":
            raise UserError(f"init_coefficients={self.init_coefficients} needs terms other than 'none'; leave it at 0.")
        if self.init_coefficients and self.coefficients == "fixed":
            raise UserError(
                f"init_coefficients={self.init_coefficients} has no effect with coefficients='fixed'; leave it at 0."
            )
        if not _is_initialisation(self.init_weights):
            raise UserError(f"init_weights={self.init_weights!r} should be True, False or 'gaussian'.")
        for key in ("use_rslora", "ensure_weight_tying"):
            if not isinstance(getattr(self, key), bool):
                raise UserError(f"{key}={getattr(self, key)!r} should be True or False.")
        if isinstance(self.target_modules, str):
            for key in ("layers_to_transform", "layers_pattern"):
                if getattr(self, key) is not None:
                    raise UserError(f"{key} needs a list of names in target_modules, not {self.target_modules!r}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError(f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform.")
        if not isinstance(self.pera_version, int):
            raise UserError(f"pera_version={self.pera_version!r} should be a whole number, now {LAYOUT_VERSION}.")
        if self.pera_version > LAYOUT_VERSION:
            raise UserError(
                f"pera_version={self.pera_version} is a newer adapter layout than this pera reads ({LAYOUT_VERSION}); "
                "upgrade with: pip install -U pera"
            )


# Options of LoRA that need nothing in PERA: the layout of Conv1D weights is found by itself, and the rest
# says how other methods are run, not what is trained.
_LORA_WITHOUT_COUNTERPART = {
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


def _lookup(key: str, pattern: dict[str, Any], name: str, default: Any) -> Any:
    """The value for module ``name``: of the longest plain name that matches, else of the regular expression.

    PEFT takes the first match, and the order of the entries is lost when a configuration is saved.
    """
    matching = [k for k in pattern if re.match(rf"(.*\.)?({k})$", name)]
    plain = [k for k in matching if _is_plain(k)]
    if plain:
        return pattern[max(plain, key=len)]
    values = {pattern[k] for k in matching}
    if len(values) > 1:
        raise UserError(f"{key}: {' and '.join(map(repr, matching))} both match {name!r} and disagree; keep one.")
    return values.pop() if values else default


def _is_plain(pattern: str) -> bool:
    return re.fullmatch(r"[\w.]+", pattern) is not None


def _is_list(value: Any, each: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple, set)) and all(map(each, value))


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_index(value: Any) -> bool:
    return _is_whole(value) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_expression(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is not a regular expression: {error}.") from error


def _is_initialisation(value: Any) -> bool:
    return isinstance(value, bool) or value == "gaussian"


def check_rank(key: str, r: Any, terms: Terms = "none") -> None:
    """Raise UserError if ``r``, the value of ``key``, is no rank, or none for ``terms``."""
    if not _is_whole(r) or r < 1:
        raise UserError(f"{key}={r!r} should be a whole number of at least 1.")
    if terms == "cross" and r == 1:
        raise UserError(f"{key}=1 with terms='cross' leaves no products; use r of at least 2, or terms='square'.")


def check_alpha(key: str, alpha: Any) -> None:
    """Raise UserError if ``alpha``, the value of ``key``, is no numerator of a scale; with 0, ΔW is always zero."""
    if not (_is_number(alpha) and math.isfinite(alpha) and alpha):
        raise UserError(f"{key}={alpha!r} should be a finite number, not 0; leave it out for the layer's own rank.")


def check_lists(config: PeftConfig) -> None:
    """Refuse, in a configuration of any PEFT method, what is no list of names or of indices and no pattern.

    Raises:
        UserError: such a value, by the name of its option.
    """
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, key, None)
        if isinstance(value, str):
            _check_expression(key, value)
        elif value is not None and not _is_list(value, _is_name):
            raise UserError(f"{key}={value!r} should be a list of names, or a regular expression.")
    for key in ("target_parameters", "modules_to_save"):
        value = getattr(config, key, None)
        if value is not None and not _is_list(value, _is_name):
            raise UserError(f"{key}={value!r} should be a list of names.")
    indices = getattr(config, "layers_to_transform", None)
    if indices is not None and not _is_index(indices) and not _is_list(indices, _is_index):
        raise UserError(f"layers_to_transform={indices!r} should be a whole number or a list of them.")
    if indices == []:
        raise UserError("layers_to_transform=[] names no layer, and PEFT takes it for all; leave it out, or name some.")
    tokens = getattr(config, "trainable_token_indices", None) or []
    if not all(_is_list(ids, _is_whole) for ids in (tokens.values() if isinstance(tokens, dict) else [tokens])):
        raise UserError(
            f"trainable_token_indices={tokens!r} should be a list of token ids, or map names to such lists."
        )
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, key, None) or {}
        if not isinstance(patterns, dict) or not all(map(_is_name, patterns)):
            raise UserError(f"{key}={patterns!r} should map names, or regular expressions, to numbers.")
        for pattern in patterns:
            _check_expression(key, pattern)
