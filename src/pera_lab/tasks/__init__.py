"""Tasks: examples with prompts and answers, and how an answer is judged.

A family of tasks is one class in one file. Packages register their families in the entry-point group ``pera.tasks``;
see docs/extending.md.
"""

from pera_lab.tasks.base import ClassificationTask, EvaluationSection, GenerationTask, Task
from pera_lab.tasks.examples import Example, LabelledText, Splits, Verdict, subsample
from pera_lab.tasks.registry import families, family_of, known_names, parse_task

__all__ = [
    "ClassificationTask",
    "EvaluationSection",
    "Example",
    "GenerationTask",
    "LabelledText",
    "Splits",
    "Task",
    "Verdict",
    "families",
    "family_of",
    "known_names",
    "parse_task",
    "subsample",
]
