"""The commands of a study: run and report."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pera_lab.cli.console import Facts, out, print_json
from pera_lab.cli.options import Json, Quiet, shipped
from pera_lab.text import quoted

if TYPE_CHECKING:
    from pera_lab.study import Study
    from pera_lab.study.folder import StudyFolder


def run(
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY", help="Study file or name of a shipped study.", autocompletion=shipped("studies")
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the study or of its recipes to override."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Output folder (default: studies/<study>). Existing runs are resumed.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of processes (default: 1). The same command in another terminal adds more."),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="ray[:ADDRESS]",
            help="Run on a Ray cluster: ray, ray:auto or ray:HOST:PORT (default: without Ray). Without ADDRESS, Ray "
            "starts on this machine, unless RAY_ADDRESS is set.",
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=0, help="Hours after which no new run is started (default: no limit).")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed runs again.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="List the runs in order, and how long they take.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run the remaining runs of a study: the learning rates of each method first, then the reported seeds."""
    from pera_lab.files import check_folder_name
    from pera_lab.study import load_study
    from pera_lab.study.folder import StudyFolder
    from pera_lab.study.runner import run_study

    given = {"--on": on is not None, "--budget": budget is not None, "--retry": retry}
    if plan and (unused := next((option for option in given if given[option]), None)):
        raise typer.BadParameter("it has no effect with --plan; leave it out.", param_hint=unused)
    if on is not None and workers is not None:
        raise typer.BadParameter(
            "it has no effect with --on; set resources.cpus and resources.gpus of a run.", param_hint="--workers"
        )
    spec = load_study(study, overrides)
    if output is None:
        check_folder_name(spec.name)
    folder = StudyFolder(output or Path("studies") / spec.name)
    if plan:
        _print_plan(spec, folder, workers or 1)
        return
    outcomes = run_study(spec, folder, workers=workers or 1, on=on, budget=budget, retry=retry)
    counts = Counter(outcome.status for outcome in outcomes.values())
    table = Facts()
    table.add_row("study", str(folder.path))
    table.add_row("runs", ", ".join(f"{n} {status}" for status, n in sorted(counts.items())) or "none finished")
    for name, outcome in outcomes.items():
        if outcome.status == "failed":
            table.add_row("failed", f"{name}: {outcome.error}")
    left = len(folder.remaining(spec))
    table.add_row("remaining", f"{left} runs (run this command again to continue)" if left else "none")
    out.print(table)
    out.print(f"Next: pera study report {quoted(folder.path)}")
    if counts["failed"]:
        raise typer.Exit(1)


def _print_plan(study: Study, folder: StudyFolder, workers: int) -> None:
    """Print the runs that are known so far, what they need together, and what comes after them."""
    from pera_lab.study.plan import Expectation, known_trials

    ended = folder.outcomes(study)
    statuses = {
        trial.name: ended[trial.name].status if trial.name in ended else "to do" for trial in known_trials(study, ended)
    }
    for name, status in statuses.items():
        out.print(f"{status:9} {name}")
    expected = Expectation(study, ended)
    seconds, later = expected.remaining(), expected.later()
    known = [second for second in seconds if second is not None]
    hours = sum(known) / 3600
    shared = f", {hours / workers:.1f} h with {workers} workers" if workers > 1 else ""
    extended = study.choose.extend * len(study.choose.seeds) * len(expected.undecided())
    table = Facts()
    table.add_row("runs", ", ".join(f"{n} {status}" for status, n in sorted(Counter(statuses.values()).items())))
    if later:
        table.add_row("after", f"{len(later)} reported runs, when the learning rates are chosen")
    if extended:
        table.add_row("", f"up to {extended} runs at further rates, if the best rate lies at an edge")
    if seconds:
        unknown = "unknown until the first run has finished"
        table.add_row("expected", f"about {hours:.1f} h for all{shared}" if known else unknown)
    out.print(table)
    command = f"pera study report {quoted(folder.path)}"
    out.print(f"Next: {'this command without --plan, then ' if seconds else ''}{command}")


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Study folder.")],
    output: Annotated[Path | None, typer.Option(help="HTML file (default: report.html in the study folder).")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the results of a study as an HTML page, as Markdown, and its runs as CSV."""
    from pera_lab.report.run import require_html
    from pera_lab.report.study import write_study_report
    from pera_lab.report.study_scores import verdict
    from pera_lab.study.folder import StudyFolder
    from pera_lab.study.results import Results

    file = output or folder / "report.html"
    require_html(file)
    results = Results(StudyFolder(folder))
    files = write_study_report(results, file)
    if json:
        written = dict(zip(("html", "markdown", "csv"), map(str, files), strict=True))
        compared = [c.record() for c in results.comparisons]
        print_json({"study": results.study.name, **written, "verdict": verdict(results), "comparisons": compared})
        return
    for file in files:
        out.print(f"report written to {file}")
