"""Recipes: one YAML file describes a run completely, and nothing in it is ignored."""

from pera_lab.recipe.recipe import ModelSection, Recipe, difference, load_recipe, parse_recipe
from pera_lab.recipe.syntax import write, write_value
from pera_lab.recipe.training import TrainingSection
from pera_lab.recipe.yaml import apply_overrides, parse, read_yaml
from pera_lab.tasks import EvaluationSection

__all__ = [
    "EvaluationSection",
    "ModelSection",
    "Recipe",
    "TrainingSection",
    "apply_overrides",
    "difference",
    "load_recipe",
    "parse",
    "parse_recipe",
    "read_yaml",
    "write",
    "write_value",
]
