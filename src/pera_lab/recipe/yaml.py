"""Recipes as YAML: reading, writing, overriding one key, and one sentence for each mistake."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pera.errors import UserError, nearest, one_line
from pera_lab.sections import name_alone
from pera_lab.tasks import Task, family_of

M = TypeVar("M", bound=BaseModel)


def read_yaml(source: str, kind: str, shipped: str) -> tuple[str, dict[str, Any]]:
    """Name and content of a YAML file.

    Args:
        source: path of the file, or the name of a file that ships with pera.
        kind: what the file is, for messages: "recipe" or "study".
        shipped: folder of pera_lab with the files that ship.

    Raises:
        UserError: the file does not exist, is not YAML, or does not hold keys and values.
    """
    path = Path(source)
    known = shipped_files(shipped)
    if os.path.isfile(path):
        text, name = _read(path, kind), path.stem
    elif source in known:
        text, name = (resources.files("pera_lab") / shipped / f"{source}.yaml").read_text(encoding="utf-8"), source
    elif path.suffix in (".yaml", ".yml") or "/" in source:
        raise UserError(f"{kind}: file {source!r} does not exist.")
    else:
        raise UserError(
            f"{kind}: {source!r} is neither a file nor a {kind} that ships with pera; {nearest(source, known)}"
        )
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{kind}: {source!r} is not valid YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        example = "model: smollm2-135m" if kind == "recipe" else "base: quickstart"
        raise UserError(f"{kind}: {source!r} should hold keys and values, such as {example}.")
    return name, content


def _read(path: Path, kind: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{kind}: {str(path)!r} is not a text file that can be read: {error}.") from error


def parse(model: type[M], content: dict[str, Any], kind: str) -> M:
    """``content`` as a pydantic model.

    Args:
        model: the class.
        content: keys and values, as read from YAML.
        kind: what the content is, for messages: "recipe" or "study".

    Raises:
        UserError: one sentence for each mistake.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError("; ".join(_sentence(e, model, content, kind) for e in error.errors())) from error


def shipped_files(folder: str) -> list[str]:
    """Names of the YAML files in a folder of pera_lab."""
    return sorted(f.name.removesuffix(".yaml") for f in (resources.files("pera_lab") / folder).iterdir())


class _Loader(yaml.SafeLoader):
    """Safe YAML with three differences.

    1e-3 is a number, as in YAML 1.2. A repeated key is an error. So is ``{boolq:1}``, which YAML reads as the key
    "boolq:1" without a value.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, value in node.value:
            if value.value == "" and value.style is key.style is None and ":" in key.value:
                raise yaml.YAMLError(f"{key.value!r} has no value; put a space after its colon")
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is given twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one key of a recipe's content.

    Args:
        content: the content, which is changed in place.
        override: ``key.subkey=value``. The value is read as YAML. ``data=`` means ``task.data=``, and ``task=NAME``
            means ``task.name=NAME``.

    Raises:
        UserError: the override has another form, or a parent of the key is not a section.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} should have the form key.subkey=value.")
    *parents, last = ["task", "data"] if key == "data" else key.split(".")
    section = content
    for parent in parents:
        below = section.setdefault(parent, {})
        if parent in ("model", "task"):
            below = section[parent] = name_alone(below)
        if not isinstance(below, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section.")
        section = below
    try:
        new = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or error
        raise UserError(f"override {override!r}: the value is not valid YAML: {reason}.") from error
    if key == "task" and isinstance(new, str) and isinstance(section.get("task"), dict):
        section["task"]["name"] = new  # another task of the same recipe
    else:
        section[last] = new


def _sentence(error: Any, model: type[BaseModel], content: Any, kind: str) -> str:
    location = error["loc"]
    where = ".".join(map(str, location))
    if error["type"] == "extra_forbidden":
        return f"{where} is not a key of a {kind}; {nearest(str(location[-1]), _known_keys(model, content, location))}"
    if error["type"] == "missing":
        return f"{where} is missing in the {kind}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}={error['input']!r}: {message[0].lower()}{message[1:]}"


def _known_keys(model: type[BaseModel], content: Any, location: tuple[Any, ...]) -> list[str]:
    """The keys of the section that ``location`` is in."""
    section: Any = model
    for part in location[:-1]:
        content = content[part]
        if not isinstance(part, int):  # an index in a list
            section = section.model_fields[part].annotation
        section = next(iter(get_args(section)), section)
        if section is Task:
            section = family_of(content["name"])
    return list(section.model_fields)
