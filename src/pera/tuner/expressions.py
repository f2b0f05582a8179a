"""Regular expressions of strangers: refused if matching them could take more than a moment.

``re`` tries every way to match, and ``(a+)+$`` has exponentially many. This module counts the ways for one name without
trying them: it keeps, for each position in the name, how many ways lead there.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from peft import PeftConfig
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND

from pera.errors import UserError

try:
    _parser: Any = importlib.import_module("re._parser")
except ImportError:  # Python 3.10
    _parser = importlib.import_module("sre_parse")

LIMIT = 100_000
"""Maximum number of steps to match one name, some milliseconds."""


class _TooMany(Exception):
    pass


def check_speed(names: Iterable[str], config: PeftConfig) -> None:
    """Check that matching the expressions of a configuration ends soon.

    Args:
        names: names of modules.
        config: configuration of any PEFT method.

    Raises:
        UserError: an expression takes more than :data:`LIMIT` steps for a name; the message gives its option.
    """
    expressions = list(_expressions(config))
    for name in names if expressions else ():
        for key, expression in expressions:
            check_cost(key, expression, name)


def check_cost(key: str, pattern: str, name: str) -> None:
    """Raise UserError if matching ``pattern``, the value of the option ``key``, with ``name`` takes too many steps."""
    try:
        _walk(_parsed(pattern), Counter({0: 1}), name, [0])
    except (_TooMany, RecursionError) as error:
        raise UserError(
            f"{key}: the regular expression {pattern!r:.200} takes too long to match {name!r:.100}; write it without "
            "repetitions inside repetitions."
        ) from error


def _expressions(config: PeftConfig) -> Iterator[tuple[str, str]]:
    """Each option with an expression, in the form in which PEFT matches it."""
    for key in ("target_modules", "exclude_modules"):
        value: Any = getattr(config, key, None)
        if isinstance(value, str) and value != INCLUDE_LINEAR_LAYERS_SHORTHAND:
            yield key, rf"(?:{value})\Z"
    for key in ("rank_pattern", "alpha_pattern"):
        for value in getattr(config, key, None) or ():
            yield key, rf"(.*\.)?({value})$"
    patterns = getattr(config, "layers_pattern", None) or ()
    for value in [patterns] if isinstance(patterns, str) else patterns:
        yield "layers_pattern", rf".*\.{value}\.(\d+)\."
    for value in getattr(config, "modules_to_save", None) or ():
        yield "modules_to_save", rf"(^|.*\.){value}($|\..*)"


@lru_cache(maxsize=1024)
def _parsed(pattern: str) -> Any:
    return _parser.parse(pattern)


def _walk(items: Any, ways: Counter[int], text: str, spent: list[int]) -> Counter[int]:
    """The number of ways to each position after ``items``, from those before; ``spent`` adds up the steps."""
    for operation, argument in items:
        spent[0] += ways.total()
        if spent[0] > LIMIT:
            raise _TooMany
        kind = str(operation)
        if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            found = {i + 1: n for i, n in ways.items() if i < len(text) and _matches(kind, argument, text[i])}
            ways = Counter(found)
        elif kind == "BRANCH":
            ways = sum((_walk(branch, ways, text, spent) for branch in argument[1]), Counter())
        elif kind in ("SUBPATTERN", "ATOMIC_GROUP"):
            ways = _walk(argument[-1] if kind == "SUBPATTERN" else argument, ways, text, spent)
        elif kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            ways = _repeated(argument, ways, text, spent)
        elif kind in ("ASSERT", "ASSERT_NOT"):
            _walk(argument[1], ways, text, spent)
        elif kind != "AT":  # references to groups have no bound
            raise _TooMany
    return ways


def _repeated(repeat: Any, ways: Counter[int], text: str, spent: list[int]) -> Counter[int]:
    least, most, item = repeat
    total = Counter(ways) if not least else Counter()
    count = 0
    while ways and count < most:
        spent[0] += 1
        ways, count = _walk(item, ways, text, spent), count + 1
        if count >= least:
            total += ways
    return total


def _matches(kind: str, argument: Any, character: str) -> bool:
    """Whether an element matches a character. Flags are unknown here, so letters match in either case."""
    if kind == "LITERAL":
        return chr(argument).lower() == character.lower()
    if kind == "NOT_LITERAL":
        return chr(argument) != character
    if kind == "ANY":
        return True
    negated = str(argument[0][0]) == "NEGATE"
    return negated != any(_in(str(op), value, character, negated) for op, value in argument[negated:])


def _in(kind: str, value: Any, character: str, exact: bool) -> bool:
    variants = {character} if exact else {character, character.lower(), character.upper()}
    if kind == "LITERAL":
        return chr(value) in variants
    if kind == "RANGE":
        return any(len(c) == 1 and value[0] <= ord(c) <= value[1] for c in variants)
    known = {
        "DIGIT": character.isdigit(),
        "WORD": character.isalnum() or character == "_",
        "SPACE": character.isspace(),
    }
    return known.get(str(value).removeprefix("CATEGORY_"), not exact)
