"""What is kept for the length of one call of a model.

In generation every step needs the same expansions, and in evaluation mode nothing changes them between
two steps. They are kept from the second step to the end of the call, and belong to the call, not to a
layer: the next call starts with nothing, so whatever happens to an adapter between two calls is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

_kept: ContextVar[dict[Hashable, Any] | None] = ContextVar("pera_kept", default=None)


@contextmanager
def one_call() -> Iterator[None]:
    """A call of a model, of this thread; a call within a call belongs to the outer one."""
    if _kept.get() is not None:
        yield
        return
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def keep(key: Hashable, compute: Callable[[], T]) -> T:
    """``compute()``, kept under ``key`` if it is asked for a second time in one call, so that a single forward
    pass keeps nothing; outside a call, computed every time."""
    kept = _kept.get()
    if kept is None:
        return compute()
    if key not in kept:
        kept[key] = None
        return compute()
    if kept[key] is None:
        kept[key] = compute()
    value: T = kept[key]
    return value
