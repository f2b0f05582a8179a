"""Where the commands print, and the forms that several of them print in."""

from __future__ import annotations

import codecs
import json
import locale
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from pera_lab.text import visible

if TYPE_CHECKING:
    from pera_lab.convert.verify import Agreement
    from pera_lab.runs import Run

__all__ = [
    *("Facts", "accept_any_text", "held_warnings", "messages", "out", "print_agreement", "print_json", "progress"),
    *("refreshed_report", "silence", "stdout_for_json"),
]


class _Plain(Console):
    """A console that prints strings as they are: without markup, on one line, and with control characters as codes.

    A command continues if nobody reads what it prints, as in ``pera inspect RUN | head -1``.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn each printed string, also in the cell of a table, into text."""
        return super().render_str(visible(text), **options)

    def on_broken_pipe(self) -> None:
        """Drop what is printed from now on."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


_AS_IT_IS: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
out = _Plain(**_AS_IT_IS)
"""Results, on standard output."""
progress = _Plain(stderr=True, **_AS_IT_IS)
"""Progress, on standard error. ``--quiet`` turns it off for a command."""
messages = _Plain(stderr=True, **_AS_IT_IS)
"""Warnings and errors, on standard error."""


def silence(silent: bool = True) -> None:
    """Print nothing from now on, as in every process but the main one; False prints again."""
    out.quiet = progress.quiet = messages.quiet = silent


@contextmanager
def stdout_for_json() -> Iterator[None]:
    """Keep standard output for what ``out`` prints, and send what libraries print there to standard error."""
    out.file = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        out.file = None  # type: ignore[assignment]  # standard output as it is when something is printed


def print_json(content: dict[str, Any]) -> None:
    """Print a result as one JSON document. Numbers that JSON lacks, such as infinity, become null."""
    out.out(json.dumps(_finite(content), indent=2, default=str), highlight=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(content) for content in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def accept_any_text() -> None:
    """Print question marks for characters that the encoding of the console lacks, and read any bytes as text.

    Libraries open their files in the encoding of the locale, so a locale that is not UTF-8 is replaced. A stream that
    is closed would give its number to the next file, so it is opened on nothing.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8":
        with suppress(locale.Error):  # not every system has it
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a closed stream is None
            stream.reconfigure(errors="replace")


@contextmanager
def held_warnings() -> Iterator[None]:
    """Silence what libraries log, and print warnings after the block. If the block is refused, print none."""
    held: dict[str, None] = {}

    def hold(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if not issubclass(category, (FutureWarning, DeprecationWarning, PendingDeprecationWarning)):
            held.setdefault(" ".join(str(message).split()))

    show, level = warnings.showwarning, logging.root.manager.disable
    warnings.showwarning = hold
    logging.disable(logging.WARNING)
    code = 0
    try:
        yield
    except BaseException as error:
        code = getattr(error, "exit_code", 2)
        raise
    finally:
        warnings.showwarning = show
        logging.disable(level)
        for message in held if code < 2 else ():
            messages.print("warning:", style="yellow", end=" ")
            messages.print(message)


class Facts:
    """Lines of a name and a value, below an optional title. Values are not wrapped, so that a path can be copied."""

    def __init__(self, title: str | None = None) -> None:
        self._title = title
        self._rows: list[tuple[str, str | Text]] = []

    def add_row(self, name: str, value: str | Text) -> None:
        """Add a line. Further lines of the value are indented."""
        self._rows.append((name, value))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = [(visible(name, inline=True), value) for name, value in self._rows]
        width = max((cell_len(name) for name, _ in rows), default=0)
        if self._title is not None:
            yield console.render_str(self._title, style="bold")
        for name, value in rows:
            for line in (console.render_str(value) if isinstance(value, str) else value).split("\n"):
                yield Text.assemble((name, "dim"), " " * (width + 2 - cell_len(name)), line)
                name = ""


def print_agreement(agreement: Agreement, done: str, content: dict[str, Any] | None = None) -> None:
    """Print what was done and how far the outputs agree.

    Args:
        agreement: the comparison.
        done: what was done.
        content: what to print as JSON instead, before the comparison.

    Raises:
        CheckFailed: the outputs differ.
    """
    from pera.errors import CheckFailed

    if content is not None:
        print_json({**content, "agreement": agreement.record()})
    else:
        out.print(done)
        out.print(agreement.sentence())
    if not agreement.agree:
        raise CheckFailed("the outputs differ.")


def refreshed_report(run: Run) -> str:
    """Write ``report.html`` of a run again and return its path."""
    from pera_lab.report.run import write_report

    file = run.path / "report.html"
    write_report([run], file)
    return str(file)
