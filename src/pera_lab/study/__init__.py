"""Many runs: a fair comparison of methods, from a grid to statistics."""

from pera_lab.study.spec import Cell, Study, Trial, load_study

__all__ = ["Cell", "Study", "Trial", "load_study"]
