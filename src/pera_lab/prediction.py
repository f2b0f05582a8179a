"""A run answers the questions in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from pera.errors import UserError
from pera_lab.evaluation import Prediction, answer_batches, make_scorer
from pera_lab.files import Journal, disk_errors, json_line, write_atomic
from pera_lab.opening import locate_run, open_model
from pera_lab.recipe import GlueSection
from pera_lab.runs import Run
from pera_lab.tasks import Example, Labelled
from pera_lab.tasks.sources import read_file


def predict(
    run: Run,
    source: Path,
    target: Path,
    *,
    base: bool = False,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    console: Console | None = None,
) -> int:
    """Answer each row of a file, as the run's task puts its questions, and write the rows with ``prediction`` as JSON
    lines.

    A language model writes its answer; a row has ``prompt`` or ``messages``, or the field that the task itself has. A
    classifier gives the name of the class, or a number, and the logits; a row has the task's texts. ``shortened`` marks
    a row that was cut to the length of the model. What is answered
    is kept in ``<target>.partial``, so that the same call after an interruption answers only the rest.

    Args:
        source: a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file.
        target: the file to write.
        base: let the base model answer, without the adapter.
        max_new_tokens, batch_size: in the place of the recipe's.

    Returns:
        The number of rows.

    Raises:
        UserError: the run is unfinished, a row lacks a field, ``target`` is there already, or an option has no use.
    """
    recipe = run.recipe
    section = recipe.task
    classifies = isinstance(section, GlueSection)
    if target.exists():
        raise UserError(f"--output: {str(target)!r} exists; give another file or remove it.")
    if not base and not run.finished:
        raise UserError(f"{str(run.path)!r} is an unfinished run; resume it with: pera train {run.path} --resume")
    if classifies and base:
        raise UserError(f"--base: the base model of {section.name!r} has no trained head, so it can predict nothing.")
    if classifies and max_new_tokens is not None:
        raise UserError(f"--max-new-tokens={max_new_tokens}: a classifier writes nothing; leave it out.")
    content = read_file(source)
    if taken := next((key for row in content.rows for key in _ANSWER if key in row), None):
        raise UserError(f"--input: {str(source)!r} has a column {taken!r}, which the answer is written to; rename it.")
    rows: list[Example | Labelled] = content.convert(section.question)
    wanted: dict[str, Any] = {"scorer": "classification" if classifies else "exact_match"}
    wanted |= {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
    wanted |= {"batch_size": batch_size} if batch_size else {}
    spec = recipe.evaluation.model_copy(update=wanted)
    task = section.asked(rows)
    location = locate_run(run)._replace(adapter=None) if base else locate_run(run)
    model, tokenizer = open_model(location, recipe.model.dtype)
    key = {"input": content.sha256, "base": base, "recipe": recipe.to_yaml(), "evaluation": spec.model_dump()}
    journal = Journal(target.with_name(f"{target.name}.partial"), key)
    todo = [i for i in range(len(rows)) if i not in journal.found]
    max_length = recipe.training.max_length if classifies else None
    scorer = make_scorer(model, tokenizer, task, [rows[i] for i in todo], spec, max_length)
    for answered in answer_batches(scorer, "predicting", console):
        journal.add({todo[row]: _answer(prediction) for row, prediction in answered.items()})
    lines = [{**row, **answer} for row, answer in zip(content.rows, journal.rows(), strict=True)]
    with disk_errors(target):
        write_atomic(target, "".join(map(json_line, lines)))
    journal.close()
    return len(lines)


_ANSWER = ("prediction", "logits", "shortened")
"""The columns that an answer adds to its row."""


def _answer(prediction: Prediction) -> dict[str, Any]:
    number = prediction.correct is None  # a regression
    return {
        "prediction": float(prediction.output) if number else prediction.output,
        **({"logits": prediction.scores} if prediction.scores else {}),
        **({"shortened": True} if prediction.shortened else {}),
    }
