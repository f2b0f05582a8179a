"""Tasks: examples with prompts and answers, and how an answer is scored. One file for one family."""

from __future__ import annotations

from pera.tasks.base import ClassificationTask, Example, GenerationTask, Labelled, Task, Verdict, divided
from pera.tasks.commonsense import CommonsenseTask
from pera.tasks.glue import GlueTask
from pera.tasks.gsm8k import Gsm8kTask
from pera.tasks.own import OwnTask
from pera.tasks.reasoning import ReasoningTask

__all__ = [
    "ClassificationTask",
    "CommonsenseTask",
    "Example",
    "GenerationTask",
    "GlueTask",
    "Gsm8kTask",
    "Labelled",
    "OwnTask",
    "ReasoningTask",
    "Task",
    "Verdict",
    "divided",
]
