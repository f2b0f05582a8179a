"""A cache for the duration of one call of a model.

In generation every step needs the same expansions, and in evaluation mode they do not change between steps. The cache
keeps them from the second step to the end of the call. It belongs to the call and not to a layer, so the next call
starts empty and sees every change to an adapter.
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
    """Mark a call of a model in this thread. A call within a call belongs to the outer one."""
    if _kept.get() is not None:
        yield
        return
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def keep(key: Hashable, compute: Callable[[], T]) -> T:
    """Return ``compute()``, and from its second use in a call on keep it under ``key``.

    A single forward pass therefore keeps nothing. Outside a call the value is always computed.
    """
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
