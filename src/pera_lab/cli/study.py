"""The commands of a study: run and report."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from pera_lab.cli.console import Facts, out, progress


def run(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Study file or name of a shipped study.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the study or of its recipes to override."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Output folder (default: studies/<study>). Existing runs are resumed.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Number of processes. The same command in another terminal adds more.")
    ] = 1,
    budget: Annotated[
        float | None, typer.Option(min=0, help="Hours after which no new run is started (default: no limit).")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed runs again.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="List the runs in order and exit.")] = False,
) -> None:
    """Run the remaining runs of a study: the learning rates of each method first, then the reported seeds."""
    from pera_lab.files import check_folder_name
    from pera_lab.study import load_study
    from pera_lab.study.folder import StudyFolder
    from pera_lab.study.plan import known_trials
    from pera_lab.study.runner import run_study

    spec = load_study(study, overrides)
    if output is None:
        check_folder_name(spec.name)
    folder = StudyFolder(output or Path("studies") / spec.name)
    if plan:
        ended = folder.outcomes(spec)
        for trial in known_trials(spec, ended):
            status = ended[trial.name].status if trial.name in ended else "to do"
            out.print(f"{status:9} {trial.name}", soft_wrap=True)
        return
    outcomes = run_study(spec, folder, workers=workers, budget=budget, retry=retry, console=progress)
    counts = Counter(outcome.status for outcome in outcomes.values())
    table = Facts()
    table.add_row("study", str(folder.path))
    table.add_row("runs", ", ".join(f"{n} {status}" for status, n in sorted(counts.items())) or "none finished")
    for name, outcome in outcomes.items():
        if outcome.status == "failed":
            table.add_row("failed", f"{name}: {outcome.error}")
    left = len(folder.remaining(spec))
    table.add_row("remaining", f"{left} runs (run this command again to continue)" if left else "none")
    out.print(table, soft_wrap=True)
    out.print(f"Next: pera study report {folder.path}", soft_wrap=True)
    if counts["failed"]:
        raise typer.Exit(1)


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Study folder.")],
    output: Annotated[Path | None, typer.Option(help="HTML file (default: report.html in the study folder).")] = None,
) -> None:
    """Write the results of a study as an HTML page and as Markdown."""
    from pera_lab.report.study import write_study_report
    from pera_lab.study.folder import StudyFolder

    for file in write_study_report(StudyFolder(folder), output or folder / "report.html"):
        out.print(f"report written to {file}", soft_wrap=True)
