"""Scores the adapter of a run, or its base model."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pera.errors import UserError, one_line
from pera_lab import processes
from pera_lab.card import card, write_card
from pera_lab.files import (
    Journal,
    check_output,
    checked,
    json_line,
    locked,
    parse_json,
    updated_object,
    write_atomic,
)
from pera_lab.opening import locate_run, open_model
from pera_lab.progress import say
from pera_lab.recipe import Recipe
from pera_lab.runs import Run
from pera_lab.scorers import Prediction, Score, answer_batches, make_scorer
from pera_lab.tasks import EvaluationSection, Splits, Task


def read_predictions(file: Path) -> list[Prediction]:
    """The answers in a file written by :func:`evaluate_run`; UserError if it cannot be read or holds something else."""
    try:
        lines = [parse_json(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{str(file)!r} cannot be read: {one_line(error)}.") from error
    return checked(lines, list[Prediction], repr(str(file)))


def evaluate_run(run: Run, *, base: bool = False, scorer: str | None = None) -> Score:
    """Score the adapter of a run, or its base model, on the held-out examples of its task.

    The score is written to ``scores.json`` under "adapter" or "base", and the answers to ``predictions/``. The name of
    a scorer other than the recipe's is added, as in "adapter-likelihood". Answers are saved as they come, so an
    interrupted evaluation resumes with the missing ones. Several processes share the batches.

    Args:
        run: the run.
        base: score the base model without the adapter.
        scorer: a scorer other than the recipe's.

    Raises:
        UserError: the scorer does not fit the task, the data changed since training, the base model cannot answer, or
            another process makes the same score.
    """
    recipe = run.recipe.with_scorer(scorer)
    task, splits, spec = recipe.task, recipe.build_splits(), recipe.evaluation
    run.check_data(splits.manifest)
    if base and task.base_refusal:
        raise UserError(f"--base: {task.base_refusal}")
    which = "base" if base else "adapter"
    name = which if spec.scorer == run.recipe.evaluation.scorer else f"{which}-{spec.scorer}"
    file = run.predictions / f"{name}.jsonl"
    check_output(file)
    run.scores()  # a broken file is refused before the work, also one that only the card needs
    if run.finished:
        card("adapter", locate_run(run))
    with processes.main_enters(locked(run.path / f".{name}.lock", file)):
        score = _evaluate_run(run, recipe, splits, which, name)
        processes.barrier()  # the files are complete
    return score


def _evaluate_run(run: Run, recipe: Recipe, splits: Splits, which: str, name: str) -> Score:
    """:func:`evaluate_run` while no other process makes the same score."""
    task, spec = recipe.task, recipe.evaluation
    model, tokenizer = open_model(locate_run(run, base=which == "base"), recipe.model.dtype)
    content = recipe.model_dump(mode="json", exclude={"name"})
    key = {"which": which, "recipe": content, "data": dict(splits.manifest)}
    with Journal(run.predictions / f"{name}.partial.jsonl", key) as journal:
        if journal.found:
            say(f"resuming after {len(journal.found)} of {len(splits.test)} answers")
        max_length = task.prompt_limit(recipe.training.max_length)
        score, predictions = evaluate(
            model, tokenizer, task, splits, spec, which, journal=journal, max_length=max_length
        )
        if score.memory is not None and which == "adapter":
            parameters, bits = sum(run.adapter.sizes.values()), score.memory.bits
            per_parameter = None if bits is None else bits / parameters
            memory = replace(score.memory, parameters=parameters, bits_per_parameter=per_parameter)
            score = replace(score, memory=memory)
        if processes.is_main():
            write_atomic(run.predictions / f"{name}.jsonl", "".join(json_line(asdict(p)) for p in predictions))
            with updated_object(run.scores_file) as scores:
                scores[name] = asdict(score)
            journal.close()
    if run.finished and processes.is_main():
        write_card(run.adapter.path, "adapter", locate_run(run))
    return score


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    splits: Splits,
    spec: EvaluationSection,
    label: str = "model",
    *,
    journal: Journal | None = None,
    max_length: int | None = None,
) -> tuple[Score, list[Prediction]]:
    """Answer the held-out examples of a task, and score the answers.

    Args:
        model: the model that answers.
        tokenizer: its tokenizer.
        task: the task.
        splits: its examples.
        spec: the recipe's ``evaluation`` section.
        label: what is scored, for the progress bar.
        journal: saves the answers as they come. Answers that it already has are not made again.
        max_length: longest input in tokens, if it is shorter than the model's.
    """
    start = time.perf_counter()
    found: dict[int, Prediction] = {i: Prediction(**row) for i, row in journal.found.items()} if journal else {}
    todo = [i for i in range(len(splits.test)) if i not in found]
    scorer = make_scorer(model, tokenizer, task, [splits.test[i] for i in todo], spec, max_length)
    for outputs in answer_batches(scorer, f"answering ({label})"):
        new = {todo[row]: scorer.judge(row, output) for row, output in outputs.items()}
        found |= new
        if journal:
            journal.add({i: asdict(prediction) for i, prediction in new.items()})
    predictions = [found[i] for i in range(len(splits.test))]
    return scorer.score(splits, predictions, round(time.perf_counter() - start, 1)), predictions
