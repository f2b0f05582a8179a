"""Where the commands print, and the forms that several of them print in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pera_lab.text import visible

if TYPE_CHECKING:
    from pera_lab.convert.verify import Agreement
    from pera_lab.runs import Run

__all__ = ["facts", "out", "print_agreement", "progress", "refreshed_report"]


class _Plain(Console):
    """A console that prints strings as they are: without markup, and with control characters as their codes."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn each printed string, also in the cell of a table, into text."""
        return super().render_str(visible(text), **options)


_AS_IT_IS: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
out = _Plain(**_AS_IT_IS)
progress = _Plain(stderr=True, **_AS_IT_IS)


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

    out.print(done, soft_wrap=True)
    out.print(agreement.sentence(), soft_wrap=True)
    if not agreement.agree:
        raise CheckFailed("the outputs differ.")


def refreshed_report(run: Run) -> str:
    """Write ``report.html`` of a run again and return its path."""
    from pera_lab.report.run import write_report

    file = run.path / "report.html"
    write_report([run], file)
    return str(file)
