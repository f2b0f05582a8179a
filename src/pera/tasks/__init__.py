"""Tasks: examples with prompts and answers, and how an answer is scored. One file for one family."""

from __future__ import annotations

from pera.tasks.base import ClassificationTask, Example, GenerationTask, Labelled, Task, Verdict, divided
from pera.tasks.glue import GlueTask
from pera.tasks.reasoning import ReasoningTask

__all__ = [
    "ClassificationTask",
    "Example",
    "GenerationTask",
    "GlueTask",
    "Labelled",
    "ReasoningTask",
    "Task",
    "Verdict",
    "divided",
]
