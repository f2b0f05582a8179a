"""Studies: fair comparisons of methods, from a grid of runs to statistics."""

from pera_lab.study.spec import Cell, Study, Trial, load_study

__all__ = ["Cell", "Study", "Trial", "load_study"]
