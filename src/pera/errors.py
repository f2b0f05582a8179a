"""The mistakes a user can make, and the exit code of each.

Every message is one sentence that names the key, the value and what would be right.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST = 40
"""So many known names a message lists."""


class PeraError(Exception):
    """Anything pera refuses or reports; ``exit_code`` is what the command line leaves with."""

    exit_code = 2


class UserError(PeraError, ValueError):
    """A mistake in the call, the recipe, the data or a file. Exit code 2."""


class CheckFailed(PeraError):
    """A check was made and failed, such as outputs that differ after a merge. Exit code 1."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown ``name``: the closest known one, or all of them, if they are not too many
    to read."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known[:MOST])}" + (f" and {len(known) - MOST} more." if len(known) > MOST else ".")


def missing_extra(package: str, extra: str) -> UserError:
    """The error for an optional package that is not installed."""
    return UserError(f"this needs the package {package!r}; install it with: pip install 'pera[{extra}]'")
