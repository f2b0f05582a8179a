"""``python -m pera`` is the ``pera`` command."""

from pera.cli import main

main()
