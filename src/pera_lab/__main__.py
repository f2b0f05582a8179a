"""The entry point of the ``pera`` command, also as ``python -m pera_lab``."""

import sys
from importlib.util import find_spec

from pera_lab.extras import install_command

PACKAGES = ("filelock", "jinja2", "matplotlib", "pydantic", "rich", "scipy", "sklearn", "typer", "yaml")
"""The packages of the extra "lab", by the name they are imported by."""


def main() -> None:
    """Run the command, or name the packages of the extra "lab" that are missing."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        print(  # noqa: T201
            f"pera: the command line needs {', '.join(missing)}; install the extra: {install_command('lab')}",
            file=sys.stderr,
        )
        sys.exit(2)
    from pera_lab.cli import main as run

    run()


if __name__ == "__main__":
    main()
