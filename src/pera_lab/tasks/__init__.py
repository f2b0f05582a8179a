"""Tasks: examples with prompts and answers, and how an answer is scored. One file for one family."""

from __future__ import annotations

from pera_lab.tasks.base import ClassificationTask, Example, GenerationTask, Labelled, Task, Verdict, divided
from pera_lab.tasks.commonsense import CommonsenseTask
from pera_lab.tasks.glue import GlueTask
from pera_lab.tasks.gsm8k import Gsm8kTask
from pera_lab.tasks.own import OwnTask
from pera_lab.tasks.reasoning import ReasoningTask

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
