"""``python -m pera`` runs the ``pera`` command that is installed with this package."""

from importlib.metadata import entry_points

(command,) = entry_points(group="console_scripts", name="pera")
command.load()()
