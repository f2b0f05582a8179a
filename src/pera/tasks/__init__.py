"""Tasks: examples with prompts and answers, and how an answer is scored. One file for one family."""

from __future__ import annotations

from pera.tasks.base import Example, Task, divided
from pera.tasks.reasoning import ReasoningTask

__all__ = ["Example", "ReasoningTask", "Task", "divided"]
