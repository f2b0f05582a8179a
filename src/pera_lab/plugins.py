"""Loads what installed packages register in the entry-point groups of pera."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any, NamedTuple

from pera.errors import UserError


class Plugin(NamedTuple):
    """One entry point: its name, the package that registers it, and the object it refers to."""

    name: str
    package: str
    value: str
    """Module and name of the object."""
    loaded: Any


def load_plugins(group: str) -> list[Plugin]:
    """The entry points of ``group``, by name.

    Raises:
        UserError: an object cannot be loaded, or there are no entry points, not even pera's own.
    """
    found = []
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        package = entry.dist.name if entry.dist else entry.value
        try:
            found.append(Plugin(entry.name, package, entry.value, entry.load()))
        except Exception as error:  # code of another package
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"{group}: {entry.value!r} of package {package!r} cannot be loaded ({said}); "
                "repair or uninstall the package."
            ) from error
    if not found:
        raise UserError(f"{group}: pera's own entry points are not registered; reinstall pera.")
    return found


def check_unique(group: str, owners: dict[str, str], plugin: Plugin, name: str) -> None:
    """Enter in ``owners`` that a plugin defines ``name``.

    Args:
        group: the entry-point group.
        owners: the package that defines each name.
        plugin: the plugin.
        name: the name.

    Raises:
        UserError: another package defines the name, too.
    """
    if (owner := owners.setdefault(name, plugin.package)) != plugin.package:
        raise UserError(
            f"{group}: packages {owner!r} and {plugin.package!r} both define {name!r}; uninstall one of them."
        )
