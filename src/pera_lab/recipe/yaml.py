"""Recipes and studies from their files: reading, overriding one key, and one sentence for each mistake."""

from __future__ import annotations

import codecs
import math
import os
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from pera.errors import UserError, nearest
from pera_lab.files import user_path
from pera_lab.recipe.syntax import DEEPEST, LONGEST, read, read_value, walk
from pera_lab.sections import meant, name_alone
from pera_lab.shipped import Kind, shipped_files, shipped_text
from pera_lab.tasks import Task, family_of

M = TypeVar("M", bound=BaseModel)

WHOLE = 2**63
FLOAT32 = 3.4028234663852886e38
"""Bounds of the numbers in a recipe: what PyTorch's tensors can hold."""


def read_yaml(source: str, kind: str, shipped: Kind) -> tuple[str, dict[str, Any]]:
    """Name and content of a YAML file.

    Args:
        source: path of the file, or the name of a file that ships with pera.
        kind: what the file is, for messages: "recipe" or "study".
        shipped: which of the files that ship with pera.

    Raises:
        UserError: the file does not exist, is not YAML, or does not hold keys and values.
    """
    path = user_path(source)
    known = shipped_files(shipped)
    if os.path.isdir(path) and source not in known:
        raise UserError(
            f"{kind}: {source!r} is a folder; give a YAML file, or the name of a {kind} that ships with pera."
        )
    if os.path.isfile(path):
        text, name = _read(path, kind), path.stem
    elif source in known:
        text, name = shipped_text(shipped, source), source
    elif os.path.exists(path):
        raise UserError(f"{kind}: {source!r} is not a regular file; save the {kind} in a file.")
    elif path.suffix in (".yaml", ".yml") or "/" in source:
        raise UserError(f"{kind}: file {source!r} does not exist.")
    else:
        raise UserError(
            f"{kind}: {source!r} is neither a file nor a {kind} that ships with pera; {nearest(source, known)}"
        )
    try:
        content = read(text)
    except ValueError as error:
        raise UserError(f"{kind}: {source!r} is not valid YAML: {error}.") from error
    if not isinstance(content, dict):
        example = "model: smollm2-135m" if kind == "recipe" else "base: quickstart"
        raise UserError(f"{kind}: {source!r} should hold keys and values, such as {example}.")
    return name, content


def _read(path: Path, kind: str) -> str:
    try:
        if (size := path.stat().st_size) > 4 * LONGEST:
            raise UserError(f"{kind}: {str(path)!r} has {size:,} bytes, which no {kind} needs; give another file.")
        data = path.read_bytes()
        marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if marked else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{kind}: {str(path)!r} is not a text file in UTF-8 that can be read: {error}.") from error


def parse(model: type[M], content: dict[str, Any], kind: str) -> M:
    """``content`` as a pydantic model.

    Args:
        model: the class.
        content: keys and values, as read from YAML.
        kind: what the content is, for messages: "recipe" or "study".

    Raises:
        UserError: one sentence for each mistake.
    """
    for keys, value in walk(content):
        _check_number(".".join(keys), value)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError("; ".join(_sentence(e, model, content, kind) for e in error.errors())) from error


def _check_number(key: str, value: Any) -> None:
    if isinstance(value, int) and not -WHOLE <= value < WHOLE:
        raise UserError(f"{key}={_short(value)}: input should be a whole number from -2^63 to 2^63 - 1.")
    if isinstance(value, float) and not (math.isfinite(value) and abs(value) <= FLOAT32):
        raise UserError(f"{key}={value!r}: input should be a finite number from -3.4e38 to 3.4e38.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:60]} … {text[-30:]}"


_ALTERNATIVES = {"max_steps": "epochs", "warmup_steps": "warmup_ratio"}
_ALTERNATIVES |= {b: a for a, b in _ALTERNATIVES.items()}
"""Keys of a training section of which one replaces the other."""


def apply_overrides(content: dict[str, Any], overrides: list[str]) -> None:
    """Set keys of a recipe's content, as in :func:`apply_override`.

    An override of ``training.max_steps`` removes the content's own ``training.epochs``, and the other way round. If the
    overrides give both, both are kept. The same holds for ``warmup_steps`` and ``warmup_ratio``.
    """
    for override in overrides:
        apply_override(content, override)
    given = {override.partition("=")[0] for override in overrides}
    for key in given:
        parent, _, last = key.rpartition(".")
        if parent.rpartition(".")[2] != "training" or f"{parent}.{_ALTERNATIVES.get(last)}" in given:
            continue
        section: Any = content
        for name in parent.split("."):
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and section.get(last) is not None:
            section.pop(_ALTERNATIVES.get(last), None)


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one key of a recipe's content.

    Args:
        content: the content, which is changed in place.
        override: ``key.subkey=value``. The value is read by :func:`pera_lab.recipe.syntax.read_value`. ``data=`` means
            ``task.data=``, and ``task=NAME`` means ``task.name=NAME``.

    Raises:
        UserError: the override has another form, or a parent of the key is not a section.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} should have the form key.subkey=value.")
    *parents, last = ["task", "data"] if key == "data" else key.split(".")
    if len(parents) > DEEPEST:
        raise UserError(f"override {_short(override)}: the key is more than {DEEPEST} levels deep.")
    section = content
    for parent in parents:
        below = section.setdefault(parent, {})
        if parent in ("model", "task"):
            below = section[parent] = name_alone(below)
        if not isinstance(below, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section.")
        section = below
    try:
        new = read_value(value)
    except ValueError as error:
        raise UserError(
            f"override {_short(override)}: the value is not valid YAML: {error}. Put quotes around a text: "
            f"{key}='\"…\"'"
        ) from error
    if key == "task" and isinstance(new, str) and isinstance(section.get("task"), dict):
        section["task"]["name"] = new  # another task of the same recipe
    else:
        section[last] = new


def _sentence(error: Any, model: type[BaseModel], content: Any, kind: str) -> str:
    location = error["loc"]
    where = ".".join(map(str, location))
    if error["type"] == "extra_forbidden":
        return f"{where} is not a key of a {kind}; {_suggestion(model, content, location, kind)}"
    if error["type"] == "missing":
        return f"{where} is missing in the {kind}"
    message = error["msg"].removeprefix("Value error, ").partition(" or instance of ")[0]
    if error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if error["type"] in ("string_type", "model_type", "task") and isinstance(error["input"], (int, float)):
        message = f"{message}; put quotes around a text: {where}='\"…\"'"
    return f"{where}={_short(error['input'])}: {message[0].lower()}{message[1:]}"


def _suggestion(model: type[BaseModel], content: Any, location: tuple[Any, ...], kind: str) -> str:
    """What an unknown key was meant to be."""
    key = str(location[-1])
    sections = {} if location[:-1] else {name: field.annotation for name, field in model.model_fields.items()}
    inside = [f"{name}.{key}" for name, section in sections.items() if key in getattr(section, "model_fields", ())]
    found = meant(key) if kind == "recipe" else None
    if found is not None or inside:
        return f"did you mean {found or inside[0]!r}?"
    return nearest(key, _known_keys(model, content, location))


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
