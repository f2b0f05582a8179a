"""The YAML of recipes and studies. One set of rules serves reading and writing, so what is written reads back the same.

The rules of YAML 1.1 apply, as in PyYAML, with these differences:

- ``1e-4`` is a number, as in YAML 1.2.
- Dates, times and numbers with a leading zero are text, and so are all keys.
- A repeated key is an error. So is ``{boolq:1}``, which YAML reads as the key "boolq:1" without a value.
- The tags of other types than JSON's, such as ``!!binary``, are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import yaml

from pera.errors import one_line

LONGEST = 1_000_000
"""Maximum number of characters of a file, also after its aliases are replaced by what they stand for."""

DEEPEST = 50
"""Maximum number of sections and lists around a value."""

LONGEST_NUMBER = 1000
"""Maximum number of characters of a number."""

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"

_BREAKS = ("\n", "\r", "\x85", "\u2028", "\u2029")
_BOOLEAN = r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"
_DIGITS = "[0-9]+(_[0-9]+)*"
_INTEGER = r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*|0b[01]+|0x[0-9a-fA-F]+)"
_FLOAT = rf"[-+]?(({_DIGITS})?\.{_DIGITS}|{_DIGITS}\.|{_DIGITS}(?=[eE]))([eE][-+]?[0-9]+)?"
_NOT_FINITE = r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"


class _Loader(yaml.SafeLoader):
    """Reads plain scalars by the rules of this module."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def construct_mapping(self, node: yaml.Node, deep: bool = True) -> dict[Any, Any]:
        """The keys and values of a section. Its own keys come before the keys of ``<<``; the first of several wins."""
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, value in _pairs(node):
            if value.value == "" and value.style is key.style is None and ":" in key.value:
                raise yaml.YAMLError(f"{key.value!r} has no value; put a space after its colon")
            if key.value in own or (key.tag == _MERGE and merged):
                raise yaml.YAMLError(f"the key {key.value!r} is given twice")
            content = self.construct_object(value, deep=True)
            if key.tag != _MERGE:
                own[key.value] = content
                continue
            for section in content if isinstance(content, list) else [content]:
                if not isinstance(section, dict):
                    raise yaml.YAMLError("'<<' should name a section or a list of sections, such as *defaults")
                merged = {**section, **merged}
        return {**merged, **own}


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes where :class:`_Loader` would read something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if len(data.splitlines()) > 1 or data.endswith(_BREAKS) else None  # PyYAML loses breaks elsewhere
        return self.represent_scalar(f"{_TAG}str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _pairs(node: yaml.Node) -> Iterator[tuple[yaml.ScalarNode, Any]]:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.YAMLError(f"{node.value[:40]!r} is not a section")
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.YAMLError("a key should be text, not a list or a section")
        yield key, value


def _refuse(_: yaml.SafeLoader, node: yaml.Node) -> Any:
    raise yaml.YAMLError(f"{node.tag.replace(_TAG, '!!')!r} is not a type of a recipe's values; leave it out")


def _scalar(construct: Callable[[yaml.SafeLoader, Any], Any], kind: str) -> Callable[[yaml.SafeLoader, Any], Any]:
    def checked(loader: yaml.SafeLoader, node: Any) -> Any:
        try:
            if len(node.value) > LONGEST_NUMBER:
                raise ValueError
            return construct(loader, node)
        except (ValueError, LookupError) as error:  # from a tag such as !!int, or from too many digits
            raise yaml.YAMLError(f"{node.value[:40]!r} is not {kind}") from error

    return checked


for _name, _pattern, _first in (
    ("bool", _BOOLEAN, "yYnNtTfFoO"),
    ("int", _INTEGER, "-+0123456789"),
    ("float", f"{_FLOAT}|{_NOT_FINITE}", "-+.0123456789"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"(?:{_pattern})\Z"), list(_first))
for _name, _construct in {
    "bool": _scalar(yaml.SafeLoader.construct_yaml_bool, "true or false"),
    "int": _scalar(yaml.SafeLoader.construct_yaml_int, "a whole number that can be read"),
    "float": _scalar(yaml.SafeLoader.construct_yaml_float, "a number that can be read"),
    "null": yaml.SafeLoader.construct_yaml_null,
    "str": yaml.SafeLoader.construct_yaml_str,
    "merge": yaml.SafeLoader.construct_yaml_str,
    "map": lambda loader, node: loader.construct_mapping(node),
    "seq": lambda loader, node: loader.construct_sequence(node, deep=True),
}.items():
    _Loader.add_constructor(f"{_TAG}{_name}", _construct)
_Loader.add_constructor(None, _refuse)


def read(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: the text is not valid, or it is too long or too deep.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text):,} characters, and at most {LONGEST:,} are read")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(_reason(error, text)) from error
    except RecursionError:
        raise ValueError(f"it is more than {DEEPEST} levels deep") from None
    length = 0
    for key, part in walk(value):
        length += 1 + (len(part) if isinstance(part, str) else 0)
        if len(key) > DEEPEST:
            raise ValueError(f"{key[0]} is more than {DEEPEST} levels deep")
        if length > LONGEST:
            raise ValueError(f"its aliases expand to more than {LONGEST:,} characters")
    return value


def _reason(error: yaml.YAMLError, text: str) -> str:
    problem = getattr(error, "problem", None) or one_line(error)
    if problem.startswith("but "):
        problem = f"{getattr(error, 'context', '')}, {problem}"
    mark = getattr(error, "problem_mark", None)
    return f"{problem}, line {mark.line + 1}" if mark is not None and "\n" in text else problem


def read_value(text: str) -> Any:
    """The value in an override: YAML in brackets or quotes, a number, true, false or null; else the text as it is."""
    if text.lstrip()[:1] in ("[", "{", "'", '"'):
        return read(text)
    loader, plain = _Loader(""), text.strip()
    tag = loader.resolve(yaml.ScalarNode, plain, (True, False))  # type: ignore[no-untyped-call]
    if tag in (f"{_TAG}str", _MERGE):
        return text
    try:
        return loader.construct_document(yaml.ScalarNode(tag, plain))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def walk(value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value in nested sections and lists with the keys that lead to it, ``value`` itself first."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while waiting:
        keys, found = waiting.pop()
        yield keys, found
        if isinstance(found, (dict, list)):
            below = found.items() if isinstance(found, dict) else enumerate(found)
            waiting += [((*keys, str(key)), part) for key, part in below]


def write(content: Any) -> str:
    """``content`` as YAML, one line for each key."""
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def write_value(value: Any) -> str:
    """A value as :func:`read_value` reads it."""
    text: str = yaml.dump(
        [value], Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=2 * LONGEST
    )
    return text.removeprefix("[").removesuffix("]\n")
