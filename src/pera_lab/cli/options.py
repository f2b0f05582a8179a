"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

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
Dtype = Literal["float32", "bfloat16", "float16"]
