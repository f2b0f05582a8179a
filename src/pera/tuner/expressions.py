"""Regular expressions in an adapter's configuration, which may come from a stranger."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND

from pera.errors import UserError

SECONDS = 2.0
"""Time in which an expression must be matched against all names of a model. Usual ones take milliseconds."""


def check_speed(names: Iterable[str], config: PeftConfig) -> None:
    """Check that matching the expressions of a configuration ends soon.

    An expression such as ``(.*)*(.*)*x`` takes longer than the age of the universe on a name of 40 letters. Python can
    interrupt one only in the main thread, and not on Windows; elsewhere nothing is checked.

    Args:
        names: names of modules.
        config: configuration of any PEFT method.

    Raises:
        UserError: an expression takes longer than :data:`SECONDS`; the message names its option.
    """
    names = list(names)
    for key, expression in _expressions(config):
        with _limited(key, expression):
            for name in names:
                re.match(expression, name)


def _expressions(config: PeftConfig) -> Iterator[tuple[str, str]]:
    """Each option with an expression, in the form in which PEFT matches it."""
    for key in ("target_modules", "exclude_modules"):
        value: Any = getattr(config, key, None)
        if isinstance(value, str) and value != INCLUDE_LINEAR_LAYERS_SHORTHAND:
            yield key, rf"(?:{value})\Z"
    for key in ("rank_pattern", "alpha_pattern"):
        for value in getattr(config, key, None) or ():
            yield key, rf"(.*\.)?({value})$"
    patterns = getattr(config, "layers_pattern", None) or ()
    for value in [patterns] if isinstance(patterns, str) else patterns:
        yield "layers_pattern", rf".*\.{value}\.(\d+)\."


@contextmanager
def _limited(key: str, expression: str) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    handler, timer = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    except TimeoutError as error:
        raise UserError(
            f"{key}: the regular expression {expression!r:.200} takes more than {SECONDS:g} s; write it without "
            "repetitions inside repetitions."
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
