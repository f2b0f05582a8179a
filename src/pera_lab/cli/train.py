"""The commands around training: quickstart, train, evaluate, predict."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from pera_lab import processes
from pera_lab.cli.console import Facts, out, print_json, progress, refreshed_report
from pera_lab.cli.options import Json, Overrides, Quiet, RunFolder, Trust, shipped
from pera_lab.report.formatting import duration, percent, size
from pera_lab.text import quoted, visible

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from pera_lab.convert.verify import Agreement
    from pera_lab.recipe import Recipe
    from pera_lab.runs import Run
    from pera_lab.scorers import Part, Prediction, Score
    from pera_lab.tasks import Splits
    from pera_lab.training import TrainingSummary

SHOWN = 3
"""Problems of which quickstart shows the answers."""

MINUTES = "about 3 minutes on two cores, 6 if they have no bfloat16"
"""Measured times of the shipped quickstart: see README.md."""


def quickstart(
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Run folder (default: runs/quickstart-<time>).")] = None,
    quiet: Quiet = False,
) -> None:
    """Fine-tune the embedded model on a reasoning task, then score, merge and export it."""
    from pera.errors import CheckFailed, UserError
    from pera_lab.convert.export import export
    from pera_lab.convert.merge import merge
    from pera_lab.evaluation import evaluate, evaluate_run, read_predictions
    from pera_lab.opening import locate_run
    from pera_lab.recipe import load_recipe
    from pera_lab.report.pictures import loss_picture
    from pera_lab.runs import Run
    from pera_lab.training import train as train_recipe

    start = time.perf_counter()
    recipe = load_recipe("quickstart", overrides)
    if recipe.method["name"] != "pera":
        raise UserError(
            f"method.name={recipe.method['name']!r}: quickstart shows PERA only; use: pera train quickstart …"
        )
    if recipe.task.base_refusal:
        raise UserError(
            f"task.name={recipe.task.name!r}: quickstart scores the base model too, and it has no trained head; use: "
            "pera train quickstart …"
        )
    run = Run.create(recipe, output)

    def ask(model: PeftModel, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> None:
        progress.print(_plan(recipe, splits, minutes=not overrides))
        asked = replace(splits, test=splits.test[:SHOWN])
        _, answers = evaluate(model, tokenizer, recipe.task, asked, recipe.evaluation, "base")
        progress.print(_answers("The base model answers", answers))

    with run.discarded_on_error():
        summary = train_recipe(recipe, run, save_on_signal=True, before=ask)
    adapter = evaluate_run(run)
    answers = read_predictions(run.predictions / "adapter.jsonl")[:SHOWN]
    progress.print(_answers("With the adapter", answers))
    base = evaluate_run(run, base=True)
    progress.print("Merging and exporting; each result is read back and compared with the adapter …")
    location = locate_run(run)
    checks = {
        "merged": merge(location, run.path / "merged"),
        "lora": export(location, run.path / "lora").agreement,
    }
    loss_picture(run, run.path / "loss.svg")
    out.print(_summary(recipe, run, base, adapter, summary, checks, time.perf_counter() - start))
    out.print(_next_steps(run))
    if not all(check.agree for check in checks.values()):
        raise CheckFailed("the outputs of the merged model or of the LoRA export differ from the adapter's, see above.")


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="Recipe file or name of a shipped recipe; with --resume also a run folder.",
            autocompletion=shipped("recipes"),
        ),
    ],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Run folder (default: runs/<recipe>-<time>).")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an unfinished run from its last complete checkpoint.")
    ] = False,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Train a recipe and write a run folder."""
    from pera_lab.recipe import load_recipe
    from pera_lab.runs import Run, resumable
    from pera_lab.training import train as train_recipe

    def opened() -> Run:
        if resume:
            return resumable(recipe, overrides, output, trust_remote_code=trust_remote_code)
        run = Run.create(load_recipe(recipe, overrides), output)
        run.trust_remote_code |= trust_remote_code
        return run

    run = processes.on_main(opened)
    with processes.main_enters(run.discarded_on_error()):
        summary = train_recipe(run.recipe, run, resume=resume, save_on_signal=True)
    if not processes.is_main():
        return
    table = Facts()
    table.add_row("adapter", str(run.adapter.path))
    table.add_row("training", _cost(run, summary))
    table.add_row("report", refreshed_report(run))
    out.print(table)
    out.print(f"Next: pera evaluate {quoted(run.path)}")


def evaluate(
    run: RunFolder,
    base: Annotated[bool, typer.Option("--base", help="Score the base model instead of the adapter.")] = False,
    scorer: Annotated[
        str | None, typer.Option(help="Scorer, such as generation or likelihood (default: evaluation.scorer).")
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", help="Score on these lm-eval tasks instead, separated by commas (default: none)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows of each lm-eval task (default: all).")] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with your own lm-eval tasks (default: none).")
    ] = None,
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a run on the test rows of its task, or on tasks of lm-eval."""
    from dataclasses import asdict

    from pera.errors import UserError
    from pera_lab.evaluation import evaluate_run
    from pera_lab.opening import locate

    names = None if lm_eval is None else [name for part in lm_eval.split(",") if (name := part.strip())]
    if names == []:
        raise typer.BadParameter(
            f"{lm_eval!r} names no task; give names such as arc_easy,piqa.", param_hint="--lm-eval"
        )
    if names and scorer is not None:
        raise typer.BadParameter(f"{scorer!r} has no effect with --lm-eval; give only one.", param_hint="--scorer")
    if not names and (limit is not None or include_path is not None):
        raise typer.BadParameter(
            "only --lm-eval uses it; the number of test rows is task.test_size of the recipe, set before training.",
            param_hint="--limit" if limit is not None else "--include-path",
        )
    if names and processes.count() > 1:
        raise UserError(
            f"WORLD_SIZE={processes.count()}: --lm-eval runs in one process; start it without torchrun and accelerate "
            "launch, or unset WORLD_SIZE."
        )
    location = locate(run, trust_remote_code=trust_remote_code)
    if location.run is None:
        raise UserError(f"{run!r} is not a run folder; only a run folder records its task.")
    which = "base" if base else "adapter"
    if names:
        from pera_lab.harness import run_harness

        results = run_harness(location.run, names, base=base, limit=limit, include_path=include_path)
        if json:
            file = str(location.run.lm_eval_file)
            print_json({"run": str(location.run.path), "which": which, "lm_eval": results, "written": file})
            return
        out.print(_harness(which, results))
        out.print(f"written to {location.run.lm_eval_file}")
        return
    score = evaluate_run(location.run, base=base, scorer=scorer)
    if processes.is_main():
        if json:
            files = {"written": str(location.run.scores_file), "report": refreshed_report(location.run)}
            print_json({"run": str(location.run.path), "which": which, "score": asdict(score), **files})
            return
        out.print(_scores(which, score, location.run))


def predict(
    run: RunFolder,
    input: Annotated[Path, typer.Option("--input", help="File of rows to answer: .jsonl, .json, .csv or .parquet.")],
    output: Annotated[Path, typer.Option("--output", help="JSON-lines file to write. It must not exist.")],
    base: Annotated[bool, typer.Option("--base", help="Use the base model instead of the adapter.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens (default: evaluation.max_new_tokens).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows answered at a time (default: evaluation.batch_size).")
    ] = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Answer the rows of a file. After an interruption, the same command answers the remaining rows."""
    from pera.errors import UserError
    from pera_lab.opening import locate
    from pera_lab.prediction import predict as answer

    location = locate(run, trust_remote_code=trust_remote_code)
    if location.run is None:
        raise UserError(f"{run!r} is not a run folder; only a run folder records how its model is prompted.")
    rows = answer(
        location.run,
        input,
        output,
        base=base,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    out.print(f"{rows} rows answered, written to {output}")


def _plan(recipe: Recipe, splits: Splits, *, minutes: bool) -> str:
    spec = recipe.training
    length = f"{spec.max_steps} steps" if spec.max_steps else f"{spec.epochs:g} epochs"
    return (
        f"{recipe.model.name} learns {recipe.task.name}{f' ({MINUTES})' if minutes else ''}:\n"
        f"  1. train: {length} of {spec.effective_batch_size} of {len(splits.train):,} examples\n"
        f"  2. score {len(splits.test):,} {_tested(recipe)}, with the adapter and without\n"
        "  3. merge the adapter, export it as a LoRA, and compare both with it"
    )


def _answers(title: str, answers: list[Prediction]) -> str:
    """Each question, and below it what the model wrote."""
    lines = [f"{title}:"]
    for answer in answers:
        question, written = (visible(" ".join(text.split())) for text in (answer.prompt, answer.output))
        mark = "right" if answer.correct else f"expected {visible(answer.expected)!r}"
        lines.append(f"  {question}\n    → {written!r}, {mark}")
    return "\n".join(lines)


def _tested(recipe: Recipe) -> str:
    return "trained facts" if recipe.task.recalls else "held-out problems"


def _summary(
    recipe: Recipe,
    run: Run,
    base: Score,
    adapter: Score,
    summary: TrainingSummary,
    checks: dict[str, Agreement],
    seconds: float,
) -> Facts:
    table = Facts(f"{recipe.name}: done in {duration(seconds)}")
    table.add_row("model", recipe.model.name)
    table.add_row("task", f"{recipe.task.name}, {base.n} {_tested(recipe)}")
    table.add_row("base model", _value(base))
    table.add_row("with adapter", Text(_value(adapter), "bold"))
    table.add_row("training", _cost(run, summary))
    table.add_row("adapter", str(run.adapter.path))
    for name, check in checks.items():
        mark = ("same outputs", "green") if check.agree else ("outputs differ", "red")
        table.add_row(name, Text.assemble(visible(f"{run.path / name}\n"), mark, f": {check.sentence()}"))
    table.add_row("loss picture", str(run.path / "loss.svg"))
    table.add_row("report", refreshed_report(run))
    return table


def _next_steps(run: Run) -> str:
    folder = quoted(run.path)
    return (
        "Next:\n"
        f"  look at the results       open {run.path / 'report.html'} in a browser\n"
        f"  effect of the terms       pera inspect {folder} --effect\n"
        f"  chat with both models     pera chat {folder} --compare\n"
        f"  serve it without pera     any LoRA server, with {run.path / 'lora'}\n"
        "  a longer training         pera train relationships-smollm2\n"
        "  your own recipe           copy recipe.yaml from the run folder, edit it, pera train FILE"
    )


def _scores(which: str, score: Score, run: Run) -> Facts:
    from pera_lab.report.contents import Contents
    from pera_lab.report.memory import memory_lines

    table = Facts()
    table.add_row(which, _value(score))
    for name, part in score.parts.items():
        table.add_row(name, _part(part))
    for name in score.missing:
        table.add_row(name, "not scored: no data")
    for name, value in score.metrics.items():
        table.add_row(name, percent(value))
    for name, text in memory_lines(Contents(run), which):
        table.add_row(name, text)
    if score.majority is not None:
        table.add_row("majority", f"{percent(score.majority)}, the most frequent training answer for every row")
    if score.shortened:
        table.add_row("shortened", f"{score.shortened} inputs truncated to the model's length")
    table.add_row("scores", str(run.scores_file))
    table.add_row("report", refreshed_report(run))
    return table


def _harness(which: str, results: dict[str, dict[str, Any]]) -> Facts:
    table = Facts(f"lm-eval, {which}: not comparable with pera's own scores")
    for task, metrics in results.items():
        apart = ("n", "shots", "lm_eval")
        values = ", ".join(f"{k.removesuffix(',none')} {v:.4g}" for k, v in metrics.items() if k not in apart)
        table.add_row(task, f"{values} (n {metrics['n']}, {metrics['shots']} shots)")
    return table


def _cost(run: Run, summary: TrainingSummary) -> str:
    lines = run.metrics()
    resumed = lines[-1]["step"] - summary.steps if lines else 0  # the step that the training was resumed from
    losses = [line["loss"] for line in lines if line["step"] > resumed]
    ends = losses if len(losses) < 2 else [losses[0], losses[-1]]
    parts = [
        duration(summary.seconds) + (f" since step {resumed}" if resumed else ""),
        f"{summary.tokens / summary.seconds:,.0f} tokens/s" if summary.tokens else "nothing left to train",
        *([f"loss {' → '.join(f'{loss:.3f}' for loss in ends)}"] if ends else []),
    ]
    if summary.peak_memory:
        parts.append(f"peak memory {size(summary.peak_memory)}")
    if summary.left_out:
        parts.append(f"{summary.left_out} examples longer than max_length skipped")
    if summary.shortened:
        parts.append(f"{summary.shortened} texts truncated to max_length")
    return ", ".join(parts)


def _value(score: Score) -> str:
    of = f"{score.correct} of {score.n}" if score.metric == "accuracy" else f"{score.metric}, {score.n} rows"
    return f"{percent(score.value)} ({of}; {_interval(score)})"


def _part(part: Part) -> str:
    unparsed = f"; {part.unparsed} without an answer" if part.unparsed else ""
    return f"{percent(part.accuracy)} ({part.correct} of {part.n}; {_interval(part)}{unparsed})"


def _interval(score: Score | Part) -> str:
    return f"95 % interval {100 * score.low:.1f} to {percent(score.high)}"
