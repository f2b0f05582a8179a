"""Checks of targets, ranks and patterns, for the configuration of any PEFT method.

``check_lists`` needs the configuration alone. ``check_names`` compares it with the model that it is for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from pera.errors import UserError, nearest
from pera.polynomial import Terms, expanded_rank
from pera.tuner.behaviour import kind_of
from pera.tuner.expressions import check_speed
from pera.tuner.names import plain_name

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Heads that PEFT adds to ``modules_to_save``, by task type, whether or not the model has them."""


def is_number(value: Any) -> bool:
    """Whether ``value`` is an int or a float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


LARGEST_RANK = 2**20
"""No layer has a side above this, so a larger rank is refused before a model is loaded."""

LARGEST = 65504.0
"""Largest number of float16. Scales and coefficients beyond it overflow in a float16 model."""


def check_rank(key: str, r: Any, terms: Terms = "none") -> None:
    """Check the rank ``r`` that the option ``key`` sets for an adapter with these ``terms``.

    Args:
        key: name of the option, for the message.
        r: value to check.
        terms: products of the adapter; "cross" needs a rank of 2.

    Raises:
        UserError: ``r`` is not a whole number of at least 1, or leaves no product.
    """
    if not _is_whole(r) or r < 1:
        raise UserError(f"{key}={shown(r)} should be a whole number of at least 1.")
    if r > LARGEST_RANK:
        raise UserError(f"{key}={shown(r)} is above every side of any layer; use a rank such as 8.")
    if terms == "cross" and r == 1:
        raise UserError(f"{key}=1 with terms='cross' leaves no products; use r of at least 2, or terms='square'.")


def check_alpha(key: str, alpha: Any) -> None:
    """Raise a UserError unless ``alpha``, the value of the option ``key``, is a number that scales an update.

    With alpha = 0, ΔW would always be zero. Beyond the range of float16 the update vanishes or overflows.
    """
    if not (is_number(alpha) and 1 / LARGEST <= abs(alpha) <= LARGEST):
        raise UserError(
            f"{key}={shown(alpha)} should be a finite number other than 0, of size {1 / LARGEST:.1g} to {LARGEST:.0f}; "
            "leave it out to use the rank."
        )


def shown(value: Any) -> str:
    """A value for a message. Python refuses to print whole numbers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return f"a whole number of about {int(value.bit_length() * 0.30103) + 1} digits"
    return repr(value)


def check_lists(config: PeftConfig) -> None:
    """Check the types of all options that hold names, patterns or indices.

    Raises:
        UserError: an option holds something else; the message names the option.
    """
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, key, None)
        if isinstance(value, str):
            _check_expression(key, value)
        elif value is not None and not _is_list(value, _is_name):
            raise UserError(f"{key}={value!r} should be a list of names or a regular expression.")
    for key in ("target_parameters", "modules_to_save"):
        value = getattr(config, key, None)
        if value is not None and not _is_list(value, _is_name):
            raise UserError(f"{key}={value!r} should be a list of names.")
        for entry in value or ():
            _check_expression(key, entry)  # PEFT reads them as expressions
    indices = getattr(config, "layers_to_transform", None)
    if indices is not None and not _is_index(indices) and not _is_list(indices, _is_index):
        raise UserError(f"layers_to_transform={indices!r} should be a whole number or a list of whole numbers.")
    if indices == []:
        raise UserError("layers_to_transform=[] names no layer, but PEFT would adapt all; leave it out or name some.")
    tokens = getattr(config, "trainable_token_indices", None) or []
    if not all(_is_list(ids, _is_whole) for ids in (tokens.values() if isinstance(tokens, dict) else [tokens])):
        raise UserError(f"trainable_token_indices={tokens!r} should be a list of token ids or map names to lists.")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, key, None) or {}
        if not isinstance(patterns, dict) or not all(map(_is_name, patterns)):
            raise UserError(f"{key}={patterns!r} should map names or regular expressions to numbers.")
        for pattern in patterns:
            _check_expression(key, pattern)


def check_anchors(anchors: Any, seed: Any) -> None:
    """Raise a UserError unless ``anchors`` is a whole number of at least 0, and ``seed`` one from 0 to 2³² − 1."""
    if not _is_whole(anchors) or anchors < 0:
        raise UserError(f"anchors={shown(anchors)} should be a whole number of at least 0, which means none.")
    if anchors > LARGEST_RANK:
        raise UserError(f"anchors={shown(anchors)} is above every side of any layer; use a number such as 4.")
    if not _is_whole(seed) or not 0 <= seed < 2**32:
        raise UserError(f"anchor_seed={shown(seed)} should be a whole number from 0 to {2**32 - 1}.")


def check_sizes(rows: int, columns: int, r: int, K: int, anchors: int = 0) -> None:
    """Check a rank against the weight that it is for, before anything is allocated.

    Args:
        rows: number of rows of ΔW.
        columns: number of columns of ΔW.
        r: rank.
        K: expanded rank.
        anchors: number of anchors.

    Raises:
        UserError: r or the number of anchors is above both sides and above 64 (up to 64 is cheap, and for r a warning),
            or an expansion would have more entries than PyTorch can index.
    """
    if r > max(rows, columns, 64):
        raise UserError(
            f"r={r} is above both sides of a ({rows}, {columns}) weight (K={K}); use r of at most "
            f"{min(rows, columns)}, or leave the layer out."
        )
    if anchors > max(rows, columns, 64):
        raise UserError(
            f"anchors={anchors} is above both sides of a ({rows}, {columns}) weight; use at most {min(rows, columns)}, "
            "or leave the layer out."
        )
    if K * min(rows, columns) >= 2**31:
        fewer = "r or fewer anchors" if anchors else "r"
        raise UserError(
            f"r={r} expands to K={K} on a ({rows}, {columns}) weight, which is too large; use a smaller {fewer}."
        )


def check_ranks(model: nn.Module, config: PeftConfig) -> None:
    """Check the rank of every target of any PEFT method, before PEFT allocates anything.

    ``target_modules`` must be resolved.

    Raises:
        UserError: as for :func:`check_sizes`; the message names the layer.
    """
    targets: Any = getattr(config, "target_modules", None)
    r: Any = getattr(config, "r", None)
    if targets is None or not _is_whole(r):
        return
    patterns: Any = getattr(config, "rank_pattern", None) or {}
    for name, module in model.named_modules():
        name = plain_name(name)
        kind = kind_of(module)
        if kind is None or not check_target_module_exists(config, name):
            continue
        weight: Any = module.weight
        rank: int = patterns.get(get_pattern_key(list(patterns), name), r)
        columns = weight[0].numel() if weight.ndim > 1 else 1
        anchors: int = getattr(config, "anchors", 0)
        try:
            K = expanded_rank(rank, getattr(config, "terms", "none"), anchors)
            check_sizes(len(weight), columns, rank, K, anchors)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error


def check_effects(names: Collection[str], config: PeftConfig) -> None:
    """Check that the patterns, the biases and targets that are also in ``modules_to_save`` have an effect.

    Args:
        names: the modules that are adapted.
        config: the configuration of any PEFT method.

    Raises:
        UserError: an entry has no effect.
    """
    targets = getattr(config, "target_modules", None)
    for wanted in sorted(targets) if not isinstance(targets, str) and targets else ():
        saved = [m for m in getattr(config, "modules_to_save", None) or () if f".{wanted}.".endswith(f".{m}.")]
        if saved and not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            raise UserError(
                f"modules_to_save: {saved[0]!r} is also in target_modules; it is trained in full or adapted, so remove "
                "it from one of them."
            )
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key, None) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                raise UserError(f"{key}: {pattern!r} fits no adapted module; {_nearest_ending(pattern, set(names))}")


def check_names(model: nn.Module, config: PeftConfig) -> None:
    """Check that the model has every module, parameter, layer and token that the configuration names.

    Raises:
        UserError: one of these matches nothing in the model: a name in ``target_modules``, ``exclude_modules``,
            ``modules_to_save`` or ``target_parameters``, a regular expression, an entry of ``rank_pattern`` or
            ``alpha_pattern``, an index in ``layers_to_transform``, or a token in ``trainable_token_indices``. The
            message gives the nearest name. Also for everything that :func:`check_lists` refuses.
    """
    check_lists(config)
    parameters = {name.replace(".base_layer", "") for name, _ in model.named_parameters() if ".pera_" not in name}
    named = {plain_name(name): module for name, module in model.named_modules()}
    check_speed(named, config)
    modules = {name: module for name, module in named.items() if ".pera_" not in name and "base_layer" not in name}
    _check_excluded(modules, config)
    for key, known, allowed in (
        ("target_modules", set(modules), ()),
        ("exclude_modules", set(modules), ()),
        ("modules_to_save", set(modules), HEADS.get(config.task_type or "", ())),
        ("target_parameters", parameters, ()),
    ):
        names = getattr(config, key, None)
        if isinstance(names, str):
            shorthand = key == "target_modules" and names == INCLUDE_LINEAR_LAYERS_SHORTHAND
            if not shorthand and not any(re.fullmatch(names, module) for module in modules):
                raise UserError(f"{key}: the regular expression {names!r} matches no module; give a list of names.")
            continue
        for wanted in sorted(set(names or ()) - set(allowed)):
            if wanted == INCLUDE_LINEAR_LAYERS_SHORTHAND:
                raise UserError(f"{key} lists {wanted!r} among names; give it alone, as a string.")
            if not any(name == wanted or name.endswith(f".{wanted}") for name in known):
                raise UserError(f"{key}: {wanted!r} not found in the base model; {_nearest_ending(wanted, known)}")
    _check_patterns(modules.keys() | (parameters if getattr(config, "target_parameters", None) else set()), config)
    _check_layers(set(modules), config)
    _check_tokens(model, config)


def _is_list(value: Any, each: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple, set)) and all(map(each, value))


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_index(value: Any) -> bool:
    return _is_whole(value) and value >= 0


def _check_expression(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{key}: {pattern!r} is not a regular expression: {error}.") from error


def _check_excluded(modules: dict[str, nn.Module], config: PeftConfig) -> None:
    excluded = getattr(config, "exclude_modules", None) or ()
    adapted = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    for wanted in [excluded] if isinstance(excluded, str) else sorted(excluded):
        pattern = wanted if isinstance(excluded, str) else rf"(.*\.)?{re.escape(wanted)}"  # PEFT's rule
        found = [module for name, module in modules.items() if re.fullmatch(pattern, name)]
        if found and all(_only_contains_layers(m) and not isinstance(m, adapted) for m in found):
            raise UserError(
                f"exclude_modules: {wanted!r} contains layers but is not a layer, so nothing would be excluded; name "
                r"the layers, or give an expression such as '.*\.mlp\..*'."
            )


def _only_contains_layers(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and not any(True for _ in module.parameters(recurse=False))


def _nearest_ending(wanted: str, names: set[str]) -> str:
    endings = {ending for name in names if not (ending := name.rpartition(".")[2]).isdigit()}
    return nearest(wanted.rpartition(".")[2], endings - {""})


def _check_patterns(names: set[str], config: PeftConfig) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key, None) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):  # PEFT's rule
                raise UserError(
                    f"{key}: {pattern!r} matches nothing in the base model; {_nearest_ending(pattern, names)}"
                )


def _check_layers(modules: set[str], config: PeftConfig) -> None:
    indices = getattr(config, "layers_to_transform", None)
    if indices is None:
        return
    patterns = getattr(config, "layers_pattern", None) or ()
    lists = [rf"(?:^|.*?\.){pattern}" for pattern in ([patterns] if isinstance(patterns, str) else patterns)]
    found = {
        int(match["index"])
        for start in lists or [r".*?\.[^.]*"]  # PEFT's rule
        for name in modules
        if (match := re.match(rf"{start}\.(?P<index>\d+)\.", name))
    }
    for index in [indices] if isinstance(indices, int) else indices:
        if found and index not in found:
            raise UserError(f"layers_to_transform: the model has no layer {index}, only {min(found)} to {max(found)}.")


def _check_tokens(model: Any, config: PeftConfig) -> None:
    key, wanted = "trainable_token_indices", getattr(config, "trainable_token_indices", None) or ()
    embeddings: list[tuple[str, Any, list[int]]] = []
    if isinstance(wanted, dict):
        modules = list(model.named_modules())
        for ending, tokens in wanted.items():  # PEFT's rule
            embeddings += [(f"{key}[{ending!r}]", module, tokens) for name, module in modules if name.endswith(ending)]
    elif wanted and hasattr(model, "get_input_embeddings"):
        embeddings = [(key, model.get_input_embeddings(), wanted)]
    for place, embedding, tokens in embeddings:
        if not isinstance(weight := getattr(embedding, "weight", None), Tensor) or weight.dim() != 2:
            raise UserError(f"{place} is not an embedding or a linear layer; name one, such as 'embed_tokens'.")
        rows = len(weight)
        if outside := [token for token in tokens if not 0 <= token < rows]:
            raise UserError(f"{place}: token {outside[0]} is not in the vocabulary, 0 to {rows - 1}.")
