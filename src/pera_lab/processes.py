"""The processes of one command, which torchrun or accelerate started. Usually there is one.

Torch is imported only where several processes meet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

GRACE = timedelta(seconds=10)
"""How long a failed process waits for the main process to report an error."""


def count() -> int:
    """The number of processes."""
    return _number("WORLD_SIZE", 1)


def index() -> int:
    """The number of this process, from 0."""
    return _number("RANK", 0) if count() > 1 else 0


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else default


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return index() == 0


def fsdp() -> bool:
    """Whether ``accelerate launch`` asks for FSDP, which divides the weights of a training over the processes."""
    return _flag("ACCELERATE_USE_FSDP")


def loads_base() -> bool:
    """Whether this process loads the weights of a base model. Without ``fsdp_cpu_ram_efficient_loading``, all do."""
    efficient = count() > 1 and fsdp() and _flag("FSDP_CPU_RAM_EFFICIENT_LOADING")
    return not efficient or _number("LOCAL_RANK", 0) == 0


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"  # as accelerate reads it


def connect() -> None:
    """Let the processes communicate, and give each its own device."""
    if count() == 1:
        return
    if fsdp():
        os.environ.setdefault("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")  # decides how the processes communicate
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    if not (torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")):
        os.environ["ACCELERATE_USE_CPU"] = "true"  # otherwise accelerate starts no processes without an accelerator
    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), backend=backend(), timeout=timedelta(minutes=30))


def backend() -> str | None:
    """The library that the processes communicate with; None lets accelerate choose it for the accelerator."""
    import torch

    return None if count() == 1 or torch.accelerator.is_available() else "gloo"


def disconnect() -> None:
    """Let the processes end, each at its own time."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def gathered(value: T) -> list[T]:
    """The ``value`` of every process, in their order. Every process has to call this."""
    if count() == 1:
        return [value]
    from torch import distributed

    connect()
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every process is here."""
    gathered(None)


@contextmanager
def together() -> Iterator[None]:
    """Fail in every process if the block fails in one. In the block, no process may wait for another."""
    if count() == 1:
        yield
        return
    from pera.errors import PeraError, UserError

    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    kind = "" if isinstance(failure, PeraError) else f"unexpected {type(failure).__name__}: "
    messages = gathered(None if failure is None else f"{kind}{failure}")
    if failure is not None:
        raise failure
    if message := next(filter(None, messages), None):
        raise UserError(message)


def on_main(function: Callable[[], T]) -> T:
    """The result of ``function``, which only the main process calls. It has to be picklable."""
    results: list[T] = []
    with together():
        if is_main():
            results.append(function())
    return gathered(results)[0][0]


@contextmanager
def main_enters(context: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter a context, such as a lock, in the main process alone. If that fails, every process fails."""
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(context)

        on_main(enter)
        yield


@contextmanager
def reporting() -> Iterator[bool]:
    """Yield whether this process prints its error, so that each error is printed once.

    This is the main process. If it reports nothing for ten seconds, because it waits for a process that failed alone,
    another process reports.
    """
    if count() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        yield True
        return
    from torch import distributed

    attempt = f"pera/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(*address, is_master=False, timeout=GRACE)  # type: ignore[attr-defined]
        if not is_main():
            with suppress(RuntimeError):  # nothing was reported in time
                store.wait([f"{attempt}/reported"], GRACE)
        first = store.add(f"{attempt}/reports", 1) == 1
    except RuntimeError:  # torchrun is gone
        yield True
        return
    yield first
    with suppress(RuntimeError):
        store.set(f"{attempt}/reported", "1")
