"""Where the commands print, and the forms that several of them print in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from pera_lab.convert.verify import Agreement
    from pera_lab.runs import Run

__all__ = ["escape", "facts", "out", "print_agreement", "progress", "refreshed_report"]

out = Console(highlight=False)
progress = Console(stderr=True, highlight=False)


def facts(title: str | None = None) -> Table:
    """A table without a head, whose rows are a name and a value."""
    table = Table(title=title, show_header=False, box=None, title_justify="left", title_style="bold")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def print_agreement(agreement: Agreement, done: str) -> None:
    """Print what was done and how far the outputs agree.

    Raises:
        CheckFailed: the outputs differ.
    """
    from pera.errors import CheckFailed

    out.print(escape(done))
    out.print(agreement.sentence())
    if not agreement.agree:
        raise CheckFailed("the outputs differ.")


def refreshed_report(run: Run) -> str:
    """Write ``report.html`` of a run again and return its path."""
    from pera_lab.report.run import write_report

    file = run.path / "report.html"
    write_report([run], file)
    return str(file)
