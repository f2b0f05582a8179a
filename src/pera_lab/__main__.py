"""The ``pera`` command, also as ``python -m pera_lab``."""

import sys


def main() -> None:
    """Run the command, or say what to install where the packages of the extra "lab" are missing."""
    try:
        from pera_lab import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("typer", "rich", "pydantic", "yaml"):
            raise
        sys.exit("pera: the command line needs further packages; install them with: pip install 'pera[lab]'")
    cli.main()


if __name__ == "__main__":
    main()
