"""The command line: parse, call, print. Exit codes: 0 done, 1 a check failed, 2 a mistake of the caller's."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pera.errors import CheckFailed, PeraError, UserError, missing_extra

if TYPE_CHECKING:
    from pera_lab.convert.verify import Agreement
    from pera_lab.diagnose import Effects, LayerDiagnosis
    from pera_lab.evaluation import Part, Score
    from pera_lab.recipe import Recipe
    from pera_lab.runs import Run
    from pera_lab.training import TrainingSummary

app = typer.Typer(
    name="pera",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune language models by Polynomial Expansion Rank Adaptation, and merge, export and verify the result.",
)
study_app = typer.Typer(no_args_is_help=True, help="Compare methods fairly: many runs, tuned rates, statistics.")
app.add_typer(study_app, name="study")
out = Console(highlight=False)
progress = Console(stderr=True, highlight=False)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override a key of the recipe.")]
Source = Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="A run folder or an adapter folder.")]
Output = Annotated[Path, typer.Option(help="Folder to write; must not exist or be empty.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the base model.")]
Dtype = Literal["float32", "bfloat16", "float16"]


def main() -> None:
    """Entry point of the ``pera`` command: one sentence for each mistake a user can make, never a traceback."""
    try:
        app()
    except PeraError as error:
        _leave(error)
    except RuntimeError as error:
        from pera_lab.models import out_of_memory

        if not out_of_memory(error):
            raise
        _leave(
            UserError(
                "out of memory; lower training.batch_size, training.max_length or method.r, or set "
                "training.gradient_checkpointing=true or model.dtype=bfloat16; for answers lower "
                "evaluation.batch_size in the recipe."
            )
        )


def _leave(error: PeraError) -> None:
    Console(stderr=True).print(f"[red]pera:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
    sys.exit(error.exit_code)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        from pera import __version__

        out.print(f"pera {__version__}")
        raise typer.Exit
    _quiet()


@app.command()
def quickstart(
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; default runs/quickstart-<time>.")] = None,
) -> None:
    """Fine-tune the embedded model on a reasoning task; score, merge and export it; say what to do next."""
    from pera_lab.convert.export import export as export_adapter
    from pera_lab.convert.merge import merge as merge_adapter
    from pera_lab.evaluation import evaluate_run, require_packages
    from pera_lab.recipe import load_recipe
    from pera_lab.report.pictures import loss_picture
    from pera_lab.runs import Run
    from pera_lab.training import train as train_recipe

    start = time.perf_counter()
    recipe = load_recipe("quickstart", overrides)
    if recipe.method["name"] != "pera":
        raise UserError(
            f"method.name={recipe.method['name']!r} is not for quickstart, which shows PERA; use: pera train"
        )
    require_packages(recipe)
    if find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", "lab")
    run = Run.create(recipe, output)
    steps = recipe.training.max_steps or f"{recipe.training.epochs:g} epochs of"
    progress.print(f"PERA on {recipe.model.name}, task {recipe.task.name}, {steps} steps")
    with run.discarded_on_error():
        summary = train_recipe(recipe, run, console=progress)
    base = evaluate_run(run, base=True, console=progress)
    adapter = evaluate_run(run, console=progress)
    progress.print("merging and exporting, each read back and compared with the adapter …")
    checks = {
        "merged": merge_adapter(str(run.path), run.path / "merged"),
        "lora": export_adapter(str(run.path), run.path / "lora").agreement,
    }
    loss_picture(run, run.path / "loss.svg")
    out.print(_summary(recipe, run, base, adapter, summary, checks, time.perf_counter() - start))
    out.print(_next_steps(run), soft_wrap=True)
    if not all(check.agree for check in checks.values()):
        raise CheckFailed("the outputs of the merged model or of the LoRA export differ from the adapter's, see above.")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, the name of a shipped one, or a run with --resume.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; default runs/<recipe>-<time>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
) -> None:
    """Train a recipe and leave a run folder."""
    from pera_lab.recipe import load_recipe
    from pera_lab.runs import Run, resumable
    from pera_lab.training import train as train_recipe

    run = resumable(recipe, overrides, output) if resume else Run.create(load_recipe(recipe, overrides), output)
    with run.discarded_on_error():
        summary = train_recipe(run.recipe, run, resume=resume, console=progress)
    table = _table()
    table.add_row("adapter", str(run.adapter))
    table.add_row("training", _cost(run, summary))
    table.add_row("report", _refreshed_report(run))
    out.print(table)
    out.print(f"Next: pera evaluate {run.path}")


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    base: Annotated[bool, typer.Option("--base", help="Score the base model instead, for comparison.")] = False,
    scorer: Annotated[
        Literal["generation", "likelihood"] | None, typer.Option(help="In the place of the recipe's scorer.")
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", help="Tasks of lm-eval instead, separated by commas.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task of lm-eval, at most.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with further tasks for lm-eval.")] = None,
) -> None:
    """Score a run on the held-out examples of its task, or on tasks of lm-eval."""
    from pera_lab.evaluation import evaluate_run
    from pera_lab.runs import locate

    location = locate(run)
    if location.run is None:
        raise UserError(f"{run!r} is not a run folder; only a run says which task it is scored on.")
    which = "base" if base else "adapter"
    if lm_eval is not None:
        from pera_lab.harness import run_harness

        if scorer is not None:
            raise UserError(f"--scorer={scorer}: lm-eval has scorers of its own; leave out one of the two.")
        names = [name.strip() for name in lm_eval.split(",") if name.strip()]
        if not names:
            raise UserError(f"--lm-eval={lm_eval!r} names no task; give one or more, such as arc_easy,piqa.")
        results = run_harness(location.run, names, base=base, limit=limit, include_path=include_path)
        out.print(_harness(which, results))
        out.print(f"written to {location.run.lm_eval_file}", soft_wrap=True)
        return
    if limit is not None or include_path is not None:
        raise UserError(
            "--limit and --include-path are for --lm-eval; a run is scored on all the test rows of its recipe, "
            "task.test_size, which is given when it is trained."
        )
    score = evaluate_run(location.run, base=base, scorer=scorer, console=progress)
    table = _table()
    table.add_row(which, _accuracy(score))
    for name, part in score.parts.items():
        table.add_row(name, _part(part))
    for name in score.missing:
        table.add_row(name, "missing: there are no data")
    for name, value in score.metrics.items():
        table.add_row(name, f"{100 * value:.1f} %")
    if score.majority is not None:
        table.add_row("majority", f"{100 * score.majority:.1f} %, the commonest training answer for every row")
    if score.shortened:
        table.add_row("shortened", f"{score.shortened} inputs cut to the length of the model")
    table.add_row("scores", str(location.run.scores_file))
    table.add_row("report", _refreshed_report(location.run))
    out.print(table)


@app.command()
def predict(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    input: Annotated[Path, typer.Option("--input", help="Rows to answer: .jsonl, .json, .csv or .parquet.")],
    output: Annotated[Path, typer.Option("--output", help="File of JSON lines to write.")],
    base: Annotated[bool, typer.Option("--base", help="Let the base model answer instead.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows answered at once.")] = None,
) -> None:
    """Answer the rows of a file, in batches; called again after an interruption, only those that are missing."""
    from pera_lab.prediction import predict as answer
    from pera_lab.runs import locate

    location = locate(run)
    if location.run is None:
        raise UserError(f"{run!r} is not a run folder; only a run says how questions are put to its model.")
    options = {"base": base, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "console": progress}
    rows = answer(location.run, input, output, **options)  # type: ignore[arg-type]
    out.print(f"{rows} rows answered, in {output}", soft_wrap=True)


@app.command()
def inspect(
    source: Source,
    layers: Annotated[
        bool, typer.Option("--layers", help="One row for each layer, not for each kind of layer.")
    ] = False,
    effect: Annotated[
        bool, typer.Option("--effect", help="Also measure what the high-order terms do to the loss; loads the model.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Picture to write, the ratio by block and kind: .svg, .png.")
    ] = None,
) -> None:
    """Show what an adapter is, from its factors: norms of its parts, high-order ratio, effective rank."""
    from dataclasses import asdict

    from pera_lab.diagnose import diagnose_adapter, run_effects
    from pera_lab.runs import locate_adapter

    location, adapter = locate_adapter(source)
    if effect and location.run is None:
        raise UserError(f"--effect needs a run folder, which says on what data; {source!r} is an adapter folder.")
    found = diagnose_adapter(adapter)
    effects = run_effects(location.run) if effect and location.run else None
    if plot is not None:
        from pera_lab.report.pictures import ratio_picture

        ratio_picture(adapter, plot)
    if json:
        import json as writer

        derived = ("high_order_ratio", "square_ratio", "cross_ratio", "stable_rank", "entropy_rank")
        content = {
            "layers": {n: {**asdict(d), **{key: getattr(d, key) for key in derived}} for n, d in found.items()},
            **({"effect": asdict(effects)} if effects else {}),
        }
        print(writer.dumps(content, indent=2))  # noqa: T201
        return
    out.print(_diagnosis(found, layers))
    if effects is not None:
        out.print(_effects(effects))


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="One run, or several to compare.")],
    output: Annotated[Path | None, typer.Option(help="HTML file; default report.html in the first run.")] = None,
) -> None:
    """Write a page about a run, or about several side by side."""
    from pera_lab.report.page import write_report
    from pera_lab.runs import Run

    for name in runs:
        if not (Path(name) / "recipe.yaml").is_file():
            raise UserError(f"{name!r} is not a run folder.")
    file = output or Path(runs[0]) / "report.html"
    write_report([Run(Path(name)) for name in runs], file)
    out.print(f"report written to {file}", soft_wrap=True)


@study_app.command("run")
def study_run(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override a key of the study or its recipes.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default studies/<study>. What is there goes on.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; more can join by the same command.")] = 1,
    budget: Annotated[float | None, typer.Option(min=0, help="Hours in which new runs are started.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run again what failed.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say which runs there are, in their order.")] = False,
) -> None:
    """Run what is left of a study: rates for every method first, then the seeds that are reported."""
    from pera_lab.study import load_study
    from pera_lab.study.runner import StudyFolder, all_trials, run_study

    spec = load_study(study, overrides)
    folder = StudyFolder(output or Path("studies") / spec.name)
    if plan:
        ended = folder.outcomes(spec)
        for trial in all_trials(spec, ended):
            status = ended[trial.name].status if trial.name in ended else "to do"
            out.print(f"{status:9} {trial.name}", soft_wrap=True, markup=False)
        return
    outcomes = run_study(spec, folder, workers=workers, budget=budget, retry=retry, console=progress)
    counts = Counter(outcome.status for outcome in outcomes.values())
    table = _table()
    table.add_row("study", str(folder.path))
    table.add_row("runs", ", ".join(f"{n} {status}" for status, n in sorted(counts.items())) or "none ended")
    for name, outcome in outcomes.items():
        if outcome.status == "failed":
            table.add_row("failed", f"{escape(name)}: {escape(outcome.error)}")
    left = len(folder.left(spec))
    table.add_row("known to be left", f"{left} runs; the same command goes on" if left else "none")
    out.print(table)
    out.print(f"Next: pera study report {folder.path}")
    if counts["failed"]:
        raise typer.Exit(1)


@study_app.command("report")
def study_report(
    folder: Annotated[Path, typer.Argument(help="The folder of a study.")],
    output: Annotated[Path | None, typer.Option(help="HTML file; default report.html in the folder.")] = None,
) -> None:
    """Write what a study shows, as a page and as Markdown beside it."""
    from pera_lab.report.study import write_study_report
    from pera_lab.study.runner import StudyFolder

    for file in write_study_report(StudyFolder(folder), output or folder / "report.html"):
        out.print(f"report written to {file}", soft_wrap=True)


@app.command()
def chat(
    source: Annotated[str, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="Who answers.")],
    compare: Annotated[bool, typer.Option("--compare", help="Base and adapted model side by side.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    trust_remote_code: Trust = False,
) -> None:
    """Talk to a model in the terminal."""
    from pera_lab.chat import chat as talk
    from pera_lab.runs import locate

    location = locate(source, trust_remote_code=trust_remote_code)
    talk(location, out, compare=compare, max_new_tokens=max_new_tokens, temperature=temperature)


@app.command()
def env() -> None:
    """Versions and hardware, to paste into a bug report."""
    from pera_lab.runs import environment

    found = environment()
    for package, version in found.pop("versions").items():
        print(f"{package}: {version or 'not installed'}")  # noqa: T201
    for key, value in found.items():
        print(f"{key}: {value}")  # noqa: T201


@app.command()
def merge(
    source: Source,
    output: Output,
    dtype: Annotated[Dtype | None, typer.Option(help="dtype of the merged model; default the base's.")] = None,
    dequantise: Annotated[
        bool, typer.Option("--dequantise", help="Dequantise a quantised base first; the result is a plain model.")
    ] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Merge an adapter into its base model and check that the outputs agree."""
    from pera_lab.convert.merge import merge as merge_adapter

    agreement = merge_adapter(
        source, output, dtype=dtype or "stored", dequantised=dequantise, trust_remote_code=trust_remote_code
    )
    how = " (its base was dequantised first)" if dequantise else ""
    _report(agreement, f"merged model written to {output}{how}")


@app.command()
def export(
    source: Source,
    output: Output,
    to: Annotated[
        Literal["lora", "gguf"] | None, typer.Option(help="The form to write; default what the server of --for reads.")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(help="Cut to this rank; says what is lost.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Cut to the least rank that keeps this share of each layer, such as 0.999.")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option("--for", help="Keep the limits of vllm, sglang, lorax, llama.cpp, ollama or peft; say its start."),
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write a PERA adapter as the LoRA it equals, readable without pera, and check that the outputs agree."""
    from pera_lab.convert.export import export as export_adapter

    if to is None and server is None:
        raise UserError("export needs --to lora, --to gguf, or --for with the server it is for.")
    done = export_adapter(
        source,
        output,
        to=to,
        max_rank=max_rank,
        energy=energy,
        server=server,
        trust_remote_code=trust_remote_code,
    )
    out.print(escape(f"{'GGUF adapter' if (output / 'adapter.gguf').is_file() else 'LoRA'} written to {output}"))
    if done.truncation:
        out.print(escape(done.truncation.sentence()), soft_wrap=True)
    out.print(done.agreement.sentence(), soft_wrap=True)
    if not done.good:
        raise CheckFailed("the outputs differ.")
    if done.start:
        out.print(f"start: {escape(done.start)}", soft_wrap=True)


@app.command("import")
def import_(
    source: Source,
    output: Output,
    form: Annotated[Literal["lora"], typer.Option("--from", help="What the adapter is.")],
    terms: Annotated[Literal["all", "square", "cross"], typer.Option(help="Products that take part.")] = "all",
    normalization: Annotated[
        Literal["rms", "centred", "none"], typer.Option(help="rms gives a product the scale of one factor.")
    ] = "rms",
    trust_remote_code: Trust = False,
) -> None:
    """Write a trained LoRA as a PERA adapter with equal outputs (h = 0), to go on training from."""
    from pera_lab.convert.from_lora import import_lora

    agreement = import_lora(
        source, output, terms=terms, normalization=normalization, trust_remote_code=trust_remote_code
    )
    _report(agreement, f"PERA adapter written to {output}")


@app.command()
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="Run, adapter, GGUF adapter or model; the reference.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Run, adapter, GGUF adapter or model.")],
    dtype: Annotated[Dtype, typer.Option(help="dtype that both are computed in.")] = "float32",
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Base of a GGUF adapter, such as a .gguf file; default that of the other side.")
    ] = None,
    llama_cpp: Annotated[
        bool, typer.Option("--llama-cpp", help="Compute B in llama.cpp itself; needs the package xllamacpp.")
    ] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Run the same prompts through two models and compare their outputs."""
    from pera_lab.convert.verify import verify as compare_models

    agreement = compare_models(
        a, b, dtype=dtype, prompts=prompts, base=base, in_llama_cpp=llama_cpp, trust_remote_code=trust_remote_code
    )
    _report(agreement, f"{b} against {a}")


def _diagnosis(found: dict[str, LayerDiagnosis], by_layer: bool) -> Table:
    from statistics import median

    from pera_lab.diagnose.factors import by_kind

    common = os.path.commonprefix(list(found)).rpartition(".")[0] + "."  # noqa: RUF071
    groups = {name.removeprefix(common): [d] for name, d in found.items()} if by_layer else by_kind(found)
    caption = None if by_layer else "Median over the layers of each kind; --layers shows every layer."
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", caption=caption, caption_justify="left")
    columns = ("‖ΔW‖", "linear", "square", "cross", "ratio", "1·1ᵀ", "rank ≤", "stable", "entropy")
    table.add_column("layer" if by_layer else "kind", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, layers in groups.items():
        values = [
            *(f"{median(getattr(d, key) for d in layers):.3g}" for key in ("norm", "linear", "square", "cross")),
            f"{median(d.high_order_ratio for d in layers):.2g}",
            f"{median(d.ones_weight for d in layers):.0%}",
            str(len(layers[0].singular_values)),
            *(f"{median(getattr(d, key) for d in layers):.1f}" for key in ("stable_rank", "entropy_rank")),
        ]
        table.add_row(name if by_layer else f"{name} ({len(layers)})", *values)
    return table


def _effects(effects: Effects) -> Table:
    table = _table()
    table.add_row("loss of the adapter", f"{effects.loss:.4f} over {effects.tokens} held-out labels")
    for part, change in effects.without.items():
        table.add_row(f"without {part.replace('_', '-')} terms", f"{change:+.5f}")
    table.add_row("with every ΔW cut to rank r, as a LoRA", f"{effects.at_rank_r:+.5f}")
    for group, change in effects.without_high_order.items():
        table.add_row(f"without high-order terms in {group}", f"{change:+.5f}")
    return table


def _refreshed_report(run: Run) -> str:
    """Write ``report.html`` anew, if what draws it is installed, and say where it is."""
    if not all(find_spec(package) for package in ("jinja2", "matplotlib")):
        return "not written; install it with: pip install 'pera[report]'"
    from pera_lab.report.page import write_report

    file = run.path / "report.html"
    write_report([run], file)
    return str(file)


def _report(agreement: Agreement, done: str) -> None:
    out.print(escape(done))
    out.print(agreement.sentence())
    if not agreement.agree:
        raise CheckFailed("the outputs differ.")


def _summary(
    recipe: Recipe,
    run: Run,
    base: Score,
    adapter: Score,
    summary: TrainingSummary,
    checks: dict[str, Agreement],
    seconds: float,
) -> Table:
    table = _table(f"{recipe.name}: done in {_duration(seconds)}")
    table.add_row("task", f"{recipe.task.name}, {base.n} held-out problems")
    table.add_row("base model", _accuracy(base))
    table.add_row("with adapter", f"[bold]{_accuracy(adapter)}[/bold]")
    table.add_row("training", _cost(run, summary))
    table.add_row("adapter", str(run.adapter))
    for name, check in checks.items():
        mark = "[green]same outputs[/green]" if check.agree else "[red]outputs differ[/red]"
        table.add_row(name, f"{run.path / name}\n{mark}: {check.sentence()}")
    table.add_row("loss picture", str(run.path / "loss.svg"))
    table.add_row("report", _refreshed_report(run))
    return table


def _next_steps(run: Run) -> str:
    return (
        "Next:\n"
        f"  look at what changed      open {run.path / 'report.html'} in a browser\n"
        f"  what the terms do         pera inspect {run.path} --effect\n"
        f"  talk to it                pera chat {run.path} --compare\n"
        f"  serve it without pera     any LoRA server, with {run.path / 'lora'}\n"
        "  another task, other rank  pera train quickstart task.name=leg_counting method.r=4\n"
        "  your own recipe           copy recipe.yaml from the run folder, change it, pera train FILE"
    )


def _cost(run: Run, summary: TrainingSummary) -> str:
    losses = [line["loss"] for line in run.metrics()]
    parts = [
        _duration(summary.seconds),
        f"{summary.tokens / summary.seconds:,.0f} tokens/s" if summary.tokens else "nothing left to train",
        *([f"loss {losses[0]:.3f} → {losses[-1]:.3f}"] if losses else []),
    ]
    if summary.peak_memory:
        parts.append(f"peak memory {summary.peak_memory / 2**30:.1f} GB")
    if summary.left_out:
        parts.append(f"{summary.left_out} examples above max_length left out")
    if summary.shortened:
        parts.append(f"{summary.shortened} texts cut to max_length")
    return ", ".join(parts)


def _accuracy(score: Score) -> str:
    interval = f"95 % interval {100 * score.low:.1f} to {100 * score.high:.1f} %"
    of = f"{score.correct} of {score.n}" if score.metric == "accuracy" else f"{score.metric}, {score.n} rows"
    return f"{100 * score.value:.1f} % ({of}; {interval})"


def _part(part: Part) -> str:
    interval = f"95 % interval {100 * part.low:.1f} to {100 * part.high:.1f} %"
    unparsed = f"; {part.unparsed} without an answer" if part.unparsed else ""
    return f"{100 * part.accuracy:.1f} % ({part.correct} of {part.n}; {interval}{unparsed})"


def _harness(which: str, results: dict[str, dict[str, Any]]) -> Table:
    table = _table(f"lm-eval, {which}: not comparable with pera's own scores")
    for task, metrics in results.items():
        apart = ("n", "shots", "lm_eval")
        values = ", ".join(f"{k.removesuffix(',none')} {v:.4g}" for k, v in metrics.items() if k not in apart)
        table.add_row(task, f"{values} (n {metrics['n']}, {metrics['shots']} shots)")
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _table(title: str | None = None) -> Table:
    table = Table(title=title, show_header=False, box=None, title_justify="left", title_style="bold")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _quiet() -> None:
    """Silence what the libraries say about themselves; pera says what matters in their place."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
