"""EleutherAI's lm-eval on the model of a run, with the tasks, prompts and metrics of lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pera.errors import UserError, nearest, one_line
from pera_lab.extras import missing_extra
from pera_lab.files import check_output, read_object, updated_object
from pera_lab.inference import base_model, generation_settings, largest_batch
from pera_lab.opening import locate_run, open_model
from pera_lab.progress import stage
from pera_lab.runs import Run


def run_harness(
    run: Run,
    tasks: list[str],
    *,
    base: bool = False,
    limit: int | None = None,
    include_path: Path | None = None,
) -> dict[str, Any]:
    """Score the adapter of a run, or its base model, on lm-eval tasks.

    The results are written to ``lm_eval.json`` under "adapter" or "base" and the name of the task. They are not
    comparable with pera's scores: lm-eval uses other prompts and ranks other continuations.

    Args:
        run: a finished run of a language model.
        tasks: names of lm-eval tasks.
        base: score the base model instead of the adapter.
        limit: largest number of rows per task (default: all).
        include_path: a folder with more tasks, as lm-eval's option of that name.

    Returns:
        The metrics by task, with the number of rows ``n`` and of ``shots``.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, its data cannot be loaded, or the folder does not exist.
    """
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path={str(include_path)!r} is not a folder; give a folder of lm-eval tasks.")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise missing_extra("lm-eval", "lm-eval") from error
    recipe = run.recipe
    if recipe.task.text_refusal:
        raise UserError(f"--lm-eval: {recipe.task.text_refusal}; lm-eval scores language models only.")
    which = "base" if base else "adapter"
    check_output(run.lm_eval_file)
    _earlier(run, read_object(run.lm_eval_file) if run.lm_eval_file.is_file() else {}, which)
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    for task in tasks:
        if task not in manager.all_tasks:
            raise UserError(f"--lm-eval: {task!r} is not an lm-eval task; {nearest(task, manager.all_tasks)}")
    model, tokenizer = open_model(locate_run(run, base=base), recipe.model.dtype)
    base_model(model).generation_config = generation_settings(model, tokenizer)  # lm-eval names only some settings
    size = largest_batch(model, recipe.evaluation.batch_size)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
    try:
        with stage(f"scoring on {', '.join(tasks)}"):
            found: Any = lm_eval.simple_evaluate(
                harness, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
            )
    except (OSError, ValueError, ConnectionError) as error:
        reason = one_line(error).rstrip(".")
        raise UserError(f"--lm-eval={','.join(tasks)}: the data of a task cannot be loaded: {reason}.") from error
    results = {
        task: {
            **{name: value for name, value in metrics.items() if isinstance(value, (int, float))},
            "n": found["n-samples"].get(task, {}).get("effective"),
            "shots": found["n-shot"].get(task),
            "lm_eval": lm_eval.__version__,
        }
        for task, metrics in found["results"].items()
    }
    with updated_object(run.lm_eval_file) as saved:
        saved[which] = {**_earlier(run, saved, which), **results}
    return results


def _earlier(run: Run, saved: dict[str, Any], which: str) -> dict[str, Any]:
    """The results of earlier calls; raises UserError if ``saved`` holds something else."""
    found = saved.get(which, {})
    if not isinstance(found, dict):
        raise UserError(f"{str(run.lm_eval_file)!r}: {which} should hold results by task; restore or remove the file.")
    return found
