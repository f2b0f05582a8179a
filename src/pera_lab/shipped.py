"""The recipes and studies that ship with pera."""

from __future__ import annotations

from importlib import resources
from typing import Literal

Kind = Literal["recipes", "studies"]


def shipped_files(kind: Kind) -> list[str]:
    """Their names."""
    return sorted(f.name.removesuffix(".yaml") for f in (resources.files("pera_lab") / kind).iterdir())


def shipped_text(kind: Kind, name: str) -> str:
    """The YAML of one of them."""
    return (resources.files("pera_lab") / kind / f"{name}.yaml").read_text(encoding="utf-8")


def shipped_summary(kind: Kind, name: str) -> str:
    """Its first comment, which says what it is for."""
    return shipped_text(kind, name).partition("\n")[0].removeprefix("# ")
