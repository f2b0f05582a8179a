"""The errors of pera, with the exit code that the command line gives each.

A message is one sentence. It names the option, the value, what is wrong and what would be right.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LISTED = 40
"""Maximum number of known names in a message."""


class PeraError(Exception):
    """Base class of the errors of pera. The command line exits with ``exit_code``."""

    exit_code = 2


class UserError(PeraError, ValueError):
    """A mistake in a call, a recipe, data or a file. Exit code 2."""


class CheckFailed(PeraError):
    """A check ran and failed, such as outputs that differ after a merge. Exit code 1."""

    exit_code = 1


def one_line(error: Exception) -> str:
    """The message of an error of another library on one line."""
    return " ".join(str(error).split())


def nearest(name: str, known: Iterable[str]) -> str:
    """End of a message about an unknown ``name``: the closest known name, or all known names if none is close.

    >>> nearest("q_prj", ["q_proj", "v_proj"])
    "did you mean 'q_proj'?"
    >>> nearest("x", ["q_proj", "v_proj"])
    'known: q_proj, v_proj.'
    """
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return f"known: {', '.join(known[:LISTED])}{more}."
