"""``python -m pera`` runs the installed ``pera`` command, so that this package need not import ``pera_lab``."""

from importlib.metadata import entry_points

(command,) = entry_points(group="console_scripts", name="pera")
command.load()()
