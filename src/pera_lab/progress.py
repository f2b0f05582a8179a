"""What long operations show: bars on a terminal, plain lines in a log. Nothing is shown outside of :func:`showing`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from threading import Event, Thread
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from pera_lab.text import visible

SLOW = 2.0
"""Seconds after which an operation is worth a line."""

PERIOD = 30.0
"""Longest time in seconds without a line in a log."""

POLL = 0.5
"""Seconds between looks at whether a line is due."""

_console: ContextVar[Console | None] = ContextVar("console", default=None)


@contextmanager
def showing(console: Console | None) -> Iterator[None]:
    """Show the progress of the operations in the block on ``console``. None shows nothing."""
    token = _console.set(console)
    try:
        yield
    finally:
        _console.reset(token)


def say(text: str, *, warning: bool = False) -> None:
    """Print a line where progress is shown. A warning is not lost if the console is quiet."""
    if (console := _console.get()) is None:
        return
    if warning and console.quiet:
        warnings.warn(text, stacklevel=2)  # which a command prints at its end
    else:
        console.print(Text.assemble(("warning: ", "yellow") if warning else "", visible(text)), soft_wrap=True)


@contextmanager
def stage(label: str) -> Iterator[None]:
    """Say that the block runs if it takes more than two seconds, and again every 30 seconds.

    Args:
        label: what the block does, such as "loading the model".
    """
    if _console.get() is None:
        yield
        return
    start, ended = time.perf_counter(), Event()

    def report() -> None:
        if not ended.wait(SLOW):
            say(f"{label} …")
        while not ended.wait(PERIOD):
            say(f"{label} … ({about(time.perf_counter() - start)})")

    thread = Thread(target=copy_context().run, args=(report,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class ProgressBar:
    """Progress of an operation of many steps. Use it as a context manager.

    A terminal shows a bar with the count, a note and the time. A log gets a plain line every 10 % or 30 seconds, unless
    the operation takes less than two seconds. An error ends the lines.

    Args:
        label: what is done.
        share: share of the steps after which a log gets a line. With 1, :meth:`line` prints them.
        remaining: estimate the remaining time from the speed. Otherwise a bar shows the elapsed time.
    """

    def __init__(self, label: str, *, share: float = 0.1, remaining: bool = True) -> None:
        console = _console.get()
        self.hidden = console is None
        self._logs = console is not None and not console.is_interactive
        self._label, self._share, self._remaining = visible(label), share, remaining
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column()),  # wrapped on a narrow terminal
            TimeRemainingColumn() if remaining else TimeElapsedColumn(),
            console=console or Console(quiet=True),
            disable=self.hidden or self._logs,
            speed_estimate_period=600,  # a step can take longer than the 30 seconds of rich
        )
        self._task = self._bar.add_task(self._label, total=None, note="")
        self._note, self._completed, self._total = "", 0, 0
        self._begun = self._shown = 0  # steps completed before this operation, and at the last line
        self._start = self._said = time.perf_counter()
        self._ended = Event()
        self._reporter = Thread(target=copy_context().run, args=(self._report,), daemon=True)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        if self._logs:
            self._reporter.start()
        return self

    def __exit__(self, error: type[BaseException] | None = None, *_: object) -> None:
        self._bar.stop()
        self._ended.set()
        if self._logs:
            self._reporter.join()
            if error is None and self._is_due():
                self.line()

    def update(self, completed: int | None = None, total: int | None = None, note: str | None = None) -> None:
        """Set what is given, and keep the rest. The first ``completed`` is where the operation starts."""
        fields: dict[str, Any] = {} if note is None else {"note": visible(note)}
        self._bar.update(self._task, completed=completed, total=total, **fields)
        self._note = self._note if note is None else visible(note)
        self._completed = self._completed if completed is None else completed
        if total is not None:
            if not self._total:
                self._begun = self._shown = self._completed
                self._start = self._said = time.perf_counter()
            self._total = total

    def line(self) -> None:
        """Print a line in a log."""
        if self._logs:
            parts = [f"{self._label} {self._completed:,} of {self._total:,}", self._note, self._time()]
            say(" · ".join(filter(None, parts)))
            self._shown, self._said = self._completed, time.perf_counter()

    def seconds(self, steps: int) -> float | None:
        """The expected seconds of a number of steps. None before the first step."""
        done = self._completed - self._begun
        return (time.perf_counter() - self._start) / done * steps if done else None

    def _report(self) -> None:
        while not self._ended.wait(POLL):
            if self._is_due():
                self.line()

    def _is_due(self) -> bool:
        now = time.perf_counter()
        if self._completed >= self._total:
            return self._shown < self._completed and now - self._start > SLOW
        enough = self._share < 1 and self._completed - self._shown >= self._share * self._total
        return now - self._said > (SLOW if enough else PERIOD)

    def _time(self) -> str:
        left = self.seconds(self._total - self._completed) if self._remaining else None
        return f"{about(left)} left" if left else ""


def about(seconds: float) -> str:
    """A rough duration: 40 s, 6 min or 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
