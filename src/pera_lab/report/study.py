"""The page about a study, and the same content as Markdown."""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pera import __version__
from pera.errors import UserError
from pera_lab.files import disk_errors, write_atomic
from pera_lab.report import memory, study_details, study_scores
from pera_lab.report.drawing import Table
from pera_lab.report.items import Section, run_command
from pera_lab.report.pictures import save_figure
from pera_lab.report.run import jinja, require_html
from pera_lab.study.plan import known_trials
from pera_lab.study.results import Results
from pera_lab.text import markdown, visible


def write_study_report(results: Results, file: Path) -> list[Path]:
    """Write the page, and next to it the same as Markdown with a folder of its pictures, and the runs as CSV.

    Args:
        results: the study.
        file: the HTML file to write.

    Returns:
        The HTML, Markdown and CSV files.

    Raises:
        UserError: ``file`` does not end in .html, or no run has ended.
    """
    require_html(file)
    if not results.outcomes:
        folder = results.folder
        raise UserError(f"{str(folder.path)!r} has no run that has ended; start with: {run_command(folder)}")
    title, sections = f"Study {results.study.name}", study_sections(results)
    content = {"title": title, "sections": sections, "version": __version__}
    write_atomic(file, jinja().get_template("study.html").render(content))
    text = file.with_suffix(".md")
    pictures = file.with_name(f"{file.stem}-pictures")
    with disk_errors(pictures):
        pictures.mkdir(parents=True, exist_ok=True)
    write_atomic(text, _markdown(title, sections, pictures))
    table = file.with_suffix(".csv")
    write_atomic(table, runs_csv(results))
    return [file, text, table]


def study_sections(results: Results) -> list[Section]:
    """Return the sections of the page that have content."""
    sections = [
        Section("summary", "Summary", study_scores.summary(results)),
        Section("scores", "Scores", study_scores.scores(results)),
        Section("memory", "Bits stored", memory.bits(results)),
        Section("differences", "Differences", study_scores.differences(results)),
        Section("rates", "Learning rates", study_scores.rates(results)),
        Section("costs", "Costs", study_scores.costs(results)),
        Section("losses", "Training losses", study_details.losses(results)),
        Section("terms", "Effect of the high-order terms", study_details.terms(results)),
        Section("interactions", "Interaction strength", study_details.interactions(results)),
        Section("sweeps", "Rank, placement, terms and data", study_details.sweeps(results)),
        Section("gaps", "Missing, failed and diverged runs", study_details.gaps(results)),
        Section("protocol", "Protocol", study_details.protocol(results)),
    ]
    return [section for section in sections if section.items]


def runs_csv(results: Results) -> str:
    """One row for each run that has ended, with its settings, its outcome and its score."""
    scored = {s.trial.name: s for cell in results.cells for s in results.scored(cell)}
    rows = []
    for trial in known_trials(results.study, results.outcomes):
        if (outcome := results.outcomes.get(trial.name)) is None:
            continue
        cell, score = trial.cell, scored.get(trial.name)
        place: dict[str, Any] = {"run": trial.name, "task": cell.task.label, "method": cell.method.label, "r": cell.r}
        place |= {"placement": cell.placement, "train_share": cell.train_share, "phase": trial.phase}
        rates = {"learning_rate": trial.learning_rate, "seed": trial.seed, "status": outcome.status}
        values = {"metric": score.metric, "score": score.value, "n": len(score.expected)} if score else {}
        ended = {"loss": outcome.loss, "parameters": outcome.parameters, "seconds": outcome.seconds}
        rows.append({**place, **rates, "metric": None, "score": None, "n": None, **values, **ended})
    text = StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(title: str, sections: list[Section], pictures: Path) -> str:
    """Return the page as Markdown and save its pictures as files."""
    lines = [f"# {markdown(title)}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for i, item in enumerate(section.items, 1):
            if item.kind == "verdict":
                lines += [f"**{markdown(item.content)}**", ""]
            elif item.kind in ("text", "note", "warning"):
                lines += [markdown(item.content), ""]
            elif item.kind == "heading":
                lines += [f"### {markdown(item.content)}", ""]
            elif item.kind == "table":
                lines += [*_table(item.content), ""]
            elif item.kind == "picture":
                file = pictures / f"{section.id}-{i}.svg"
                save_figure(item.content.figure, file)
                lines += [f"![{markdown(item.content.label)}]({quote(pictures.name)}/{file.name})", ""]
                lines += [markdown(item.content.finding), ""]
            else:
                lines += [f"{item.label}:", "", *(f"    {line}" for line in visible(item.content).splitlines()), ""]
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    head = "| " + " | ".join(map(markdown, table.head)) + " |"
    rule = "| --- |" + " ---: |" * (len(table.head) - 1)
    return [head, rule, *("| " + " | ".join(map(markdown, row)) + " |" for row in table.rows)]
