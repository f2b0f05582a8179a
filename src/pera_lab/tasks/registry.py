"""Finds the families of tasks, which packages register in the entry-point group ``pera.tasks``."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic_core import PydanticCustomError

from pera.errors import UserError, nearest
from pera_lab.plugins import check_unique, load_plugins
from pera_lab.sections import name_alone
from pera_lab.tasks.base import Task

GROUP = "pera.tasks"


@cache
def families() -> dict[str, type[Task]]:
    """The families of all installed packages, by the name of their entry point.

    Raises:
        UserError: a family cannot be loaded or is not a task, or two families declare one name.
    """
    found: dict[str, type[Task]] = {}
    owners: dict[str, str] = {}
    for plugin in load_plugins(GROUP):
        family = plugin.loaded
        if not (isinstance(family, type) and issubclass(family, Task)):
            raise UserError(
                f"{GROUP}: {plugin.value!r} of package {plugin.package!r} should be a class derived from Task."
            )
        for name in family.task_names:
            check_unique(GROUP, owners, plugin, name)
        found[plugin.name] = family
    return found


def declared_names() -> set[str]:
    """All names that a family lists in its ``task_names``."""
    return {name for family in families().values() for name in family.task_names}


def known_names() -> set[str]:
    """All names of tasks that can be suggested."""
    return {name for family in families().values() for name in family.known_names()}


def family_of(name: str) -> type[Task]:
    """The family that a task belongs to. A name in ``task_names`` comes before one that a family merely serves.

    Raises:
        UserError: no family, or more than one, serves the name.
    """
    known = families().values()
    found = [family for family in known if name in family.task_names] or [f for f in known if f.serves(name)]
    if not found:
        raise UserError(f"name={name!r} is not known; {nearest(name, known_names())}")
    if len(found) > 1:
        raise UserError(f"name={name!r} is served by both {found[0].__name__} and {found[1].__name__}.")
    return found[0]


class _Name(Task):
    """Checks ``task.name`` before the family is known."""

    @classmethod
    def serves(cls, name: str) -> bool:
        return True


def parse_task(value: Any) -> Task:
    """The ``task`` section of a recipe: a name alone, or a section with ``name`` and options of its family.

    Raises:
        ValidationError, ValueError: the section does not fit.
    """
    if isinstance(value, Task):
        return value
    value = name_alone(value)
    if not isinstance(value, dict):
        raise PydanticCustomError("task", "Input should be the name of a task, or a section with name and options")
    name = _Name.model_validate({key: value[key] for key in value if key == "name"}).name
    family = family_of(name)
    if "data" in value and "data" not in family.model_fields and name not in declared_names():
        raise ValueError(f"name={name!r} is not a task with data; {nearest(name, declared_names())}")
    return family.model_validate(value)
