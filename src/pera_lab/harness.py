"""EleutherAI's evaluation harness, lm-eval, on the model of a run: its own tasks, prompts and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pera.errors import UserError, missing_extra, nearest
from pera_lab.files import read_object, write_json
from pera_lab.opening import locate_run, open_model
from pera_lab.runs import Run


def run_harness(
    run: Run,
    tasks: list[str],
    *,
    base: bool = False,
    limit: int | None = None,
    include_path: Path | None = None,
) -> dict[str, Any]:
    """Score the adapter of a run, or its base model, on tasks of lm-eval.

    The results go to ``lm_eval.json`` under "adapter" or "base" and the task's name, apart from pera's own scores: the
    harness has other prompts (BoolQ with its passage) and ranks other continuations.

    Args:
        tasks: names of tasks.
        limit: rows of each task at most.
        include_path: a folder with further tasks, as lm-eval's own option.

    Returns:
        The results by task, with ``n`` and ``shots``.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, its data cannot be had, or there is no such folder.
    """
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path={str(include_path)!r} is not a folder; give one with tasks for lm-eval.")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise missing_extra("lm-eval", "lm-eval") from error
    recipe = run.recipe
    if recipe.task.text_refusal:
        raise UserError(f"--lm-eval: {recipe.task.text_refusal}; lm-eval scores language models.")
    before = read_object(run.lm_eval_file) if run.lm_eval_file.is_file() else {}
    which = "base" if base else "adapter"
    if not isinstance(before.get(which, {}), dict):
        raise UserError(f"{str(run.lm_eval_file)!r}: {which} should hold results by task; restore or remove the file.")
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    for task in tasks:
        if task not in manager.all_tasks:
            raise UserError(f"--lm-eval: {task!r} is not a task of lm-eval; {nearest(task, manager.all_tasks)}")
    location = locate_run(run)._replace(adapter=None) if base else locate_run(run)
    model, tokenizer = open_model(location, recipe.model.dtype)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=recipe.evaluation.batch_size)
    try:
        found: Any = lm_eval.simple_evaluate(
            harness, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
        )
    except (OSError, ValueError, ConnectionError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"--lm-eval={','.join(tasks)}: the data of a task cannot be had: {reason}.") from error
    results = {
        task: {
            **{name: value for name, value in metrics.items() if isinstance(value, (int, float))},
            "n": found["n-samples"].get(task, {}).get("effective"),
            "shots": found["n-shot"].get(task),
            "lm_eval": lm_eval.__version__,
        }
        for task, metrics in found["results"].items()
    }
    write_json(run.lm_eval_file, {**before, which: {**before.get(which, {}), **results}})
    return results
