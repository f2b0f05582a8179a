"""Before pera is imported: the version of PEFT, and what libraries log while ``python -m pera`` imports them."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from packaging.version import Version

OLDEST_PEFT = "0.21"
OLDEST_IMPORTABLE_PEFT = "0.20"  # older versions lack names that pera imports


def check_peft() -> None:
    """Refuse a PEFT that pera cannot import, and warn of one that is older than pera asks for.

    ``pip install --no-deps`` allows both.
    """
    installed = version("peft")
    if Version(installed).release < Version(OLDEST_IMPORTABLE_PEFT).release:
        raise ImportError(
            f"pera does not work with peft {installed}; install peft>={OLDEST_PEFT}, or peft "
            f"{OLDEST_IMPORTABLE_PEFT} if another package allows no newer one"
        )
    if Version(installed).release < Version(OLDEST_PEFT).release:
        warnings.warn(
            f"pera needs peft>={OLDEST_PEFT}; peft {installed} does not save trained biases, loads damaged files of an "
            "adapter without an error, and cannot convert adapters with modules_to_save",
            stacklevel=3,  # the line that imports pera
        )


@contextmanager
def held_logs() -> Iterator[None]:
    """Drop what libraries log while the block imports them, if ``python -m`` runs this package.

    Python imports the package before the command can hold back anything. A refusal of the command is a single line.
    ``PERA_DEBUG=1`` shows what is logged.
    """
    level = logging.root.manager.disable
    if sys.argv[:1] == ["-m"] and os.environ.get("PERA_DEBUG", "0") in ("", "0"):  # argv of a package that runs
        logging.disable(logging.WARNING)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when it is imported
    try:
        yield
    finally:
        logging.disable(level)
