"""The ``pera`` command. No module here imports torch, transformers, peft or pera before a command runs."""

from pera_lab.cli.app import main

__all__ = ["main"]
