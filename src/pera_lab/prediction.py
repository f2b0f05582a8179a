"""Answers the questions in a file with the model of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pera.errors import UserError
from pera_lab import processes
from pera_lab.files import Journal, check_journal, json_line, reserved, write_atomic
from pera_lab.opening import locate_run, open_model
from pera_lab.runs import Run
from pera_lab.scorers import Output, answer_batches, make_scorer
from pera_lab.tasks.sources import read_file
from pera_lab.text import quoted


def predict(
    run: Run,
    source: Path,
    target: Path,
    *,
    base: bool = False,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
) -> int:
    """Answer each row of a file, and write the rows with ``prediction`` as JSON Lines.

    A language model writes text. Its rows have ``prompt`` or ``messages``, or the task's own field. A classifier gives
    the name of the class and the logits, or a number. Its rows have the task's texts. ``shortened`` marks a row whose
    prompt was truncated. Answers are saved in ``<target>.partial`` as they come, so an interrupted call resumes with
    the missing rows. Several processes share the batches.

    Args:
        run: the run whose adapter answers.
        source: a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file.
        target: the file to write.
        base: let the base model answer, without the adapter.
        max_new_tokens: longest answer in tokens; the recipe's by default.
        batch_size: rows answered at a time; the recipe's by default.

    Returns:
        The number of rows.

    Raises:
        UserError: the run is unfinished, a row lacks a field, ``target`` exists or another process
            writes it, or an option has no use.
    """
    journal = target.with_name(f"{target.name}.partial")
    with processes.main_enters(reserved(target)):
        processes.on_main(lambda: _check_target(target, journal))
        number = _predict(run, source, target, journal, base, max_new_tokens, batch_size)
        processes.barrier()  # the file is complete
    return number


def _check_target(target: Path, journal: Path) -> None:
    check_journal(journal)
    if target.exists():
        journal.unlink(missing_ok=True)  # left by a kill after the last answer
        raise UserError(f"--output: {str(target)!r} exists; give another file or remove it.")


def _predict(
    run: Run,
    source: Path,
    target: Path,
    partial: Path,
    base: bool,
    max_new_tokens: int | None,
    batch_size: int | None,
) -> int:
    """:func:`predict` to a file that does not exist and that no other process writes."""
    recipe, task = run.recipe, run.recipe.task
    if not base and not run.finished:
        raise UserError(
            f"{str(run.path)!r} is an unfinished run; resume it with: pera train {quoted(run.path)} --resume"
        )
    if base and task.base_refusal:
        raise UserError(f"--base: {task.base_refusal}")
    if max_new_tokens is not None and task.text_refusal:
        raise UserError(f"--max-new-tokens={max_new_tokens}: {task.text_refusal}; leave it out.")
    content = read_file(source)
    if taken := next((key for row in content.rows if isinstance(row, dict) for key in _ANSWER if key in row), None):
        raise UserError(f"--input: {str(source)!r} has a column {taken!r}, which is an output column; rename it.")
    rows = content.convert(task.question)
    given = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value}
    spec = recipe.evaluation.model_copy(update={"scorer": task.scorers[0], **changes})
    model, tokenizer = open_model(locate_run(run, base=base), recipe.model.dtype)
    key = {"input": content.sha256, "base": base, "recipe": recipe.to_yaml(), "evaluation": spec.model_dump()}
    with Journal(partial, key) as journal:
        todo = [i for i in range(len(rows)) if i not in journal.found]
        max_length = task.prompt_limit(recipe.training.max_length)
        scorer = make_scorer(model, tokenizer, task, [rows[i] for i in todo], spec, max_length)
        for outputs in answer_batches(scorer, "predicting"):
            journal.add({todo[row]: _columns(output) for row, output in outputs.items()})
        lines = [{**row, **answer} for row, answer in zip(content.rows, journal.rows(), strict=True)]
        if processes.is_main():
            write_atomic(target, "".join(map(json_line, lines)))
            journal.close()
    return len(lines)


_ANSWER = ("prediction", "logits", "shortened")
"""Columns that an answer adds to its row."""


def _columns(output: Output) -> dict[str, Any]:
    return {
        "prediction": output.answer,
        **({"logits": output.scores} if output.scores else {}),
        **({"shortened": True} if output.shortened else {}),
    }
