"""Lets the cases of ``../shared/cases`` that were written before issue 20 find the modules that it moved."""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.util import spec_from_loader

MOVED = {
    "pera.cli": "pera_lab.cli",
    "pera.recipe": "pera_lab.recipe",
    "pera.tasks": "pera_lab.tasks",
    "pera.tasks.prompts": "pera_lab.tasks.encoding",
    "pera.tasks.sources": "pera_lab.tasks.sources",
}


class Moved(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        return spec_from_loader(name, self) if name in MOVED else None

    def exec_module(self, module):
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


sys.meta_path.append(Moved())
