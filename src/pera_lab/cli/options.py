"""Arguments and options that several commands share, and what a shell completes them with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pera_lab.shipped import Kind, shipped_files


def shipped(kind: Kind) -> Any:
    """Completes the name of a recipe or study that ships with pera."""
    return lambda: shipped_files(kind)


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe to override, such as method.r=4."),
]
Source = Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="Run folder or adapter folder.")]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")]
Output = Annotated[Path, typer.Option(help="Output folder. It must be empty or not exist.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base model (default: refuse).")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document, for scripts.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show no progress, only results, warnings and errors (default: show it).")
]
"""Read by :class:`pera_lab.cli.app.Command`."""
Dtype = Literal["float32", "bfloat16", "float16"]
