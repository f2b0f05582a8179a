"""``python -m pera`` runs the installed ``pera`` command without importing ``pera_lab`` here."""

from importlib.metadata import entry_points

(command,) = entry_points(group="console_scripts", name="pera")
command.load()()
