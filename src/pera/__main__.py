"""``python -m pera`` runs the installed ``pera`` command through its entry point, without an import of pera_lab."""

from importlib.metadata import entry_points

(command,) = entry_points(group="console_scripts", name="pera")
command.load()()
