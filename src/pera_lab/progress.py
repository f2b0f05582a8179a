"""The progress bar of every long operation."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from pera_lab.text import visible


class ProgressBar:
    """A bar with a label, a count, a note and a time. Use it as a context manager.

    Args:
        label: what is done.
        console: where to show the bar; None shows nothing.
        time: the column with the time, by default the remaining time.
    """

    def __init__(self, label: str, console: Console | None, time: ProgressColumn | None = None) -> None:
        self.hidden = console is None
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            time or TimeRemainingColumn(),
            console=console or Console(quiet=True),
            disable=self.hidden,
        )
        self._task = self._bar.add_task(visible(label), total=None, note="")

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, error: type[BaseException] | None = None, *_: object) -> None:
        if error is not None and not self._bar.console.is_terminal:
            self._bar.live.transient = True  # a refusal is one line in a log
            self._bar.live.stop()
        else:
            self._bar.stop()

    def update(self, completed: int | None = None, total: int | None = None, note: str | None = None) -> None:
        """Set what is given, and keep the rest."""
        fields: dict[str, Any] = {} if note is None else {"note": visible(note)}
        self._bar.update(self._task, completed=completed, total=total, **fields)
