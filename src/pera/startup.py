"""What libraries log while ``python -m pera`` imports them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
