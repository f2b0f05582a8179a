"""The page about a study, and the same content as Markdown."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from pera import __version__
from pera.errors import UserError
from pera_lab.files import disk_errors, write_atomic
from pera_lab.report import memory, study_details, study_scores
from pera_lab.report.drawing import Table
from pera_lab.report.items import Section, run_command
from pera_lab.report.pictures import save_figure
from pera_lab.report.run import jinja, require_html
from pera_lab.study.folder import StudyFolder
from pera_lab.study.results import Results
from pera_lab.text import markdown, visible


def write_study_report(folder: StudyFolder, file: Path) -> list[Path]:
    """Write the page, and next to it a Markdown file of the same content with a folder of its pictures.

    Args:
        folder: the study.
        file: the HTML file to write.

    Returns:
        The HTML file and the Markdown file.

    Raises:
        UserError: ``file`` does not end in .html, the folder holds no study, or no run has ended.
    """
    require_html(file)
    results = Results(folder)
    if not results.outcomes:
        raise UserError(f"{str(folder.path)!r} has no run that has ended; start with: {run_command(folder)}")
    title, sections = f"Study {results.study.name}", study_sections(results)
    content = {"title": title, "sections": sections, "version": __version__}
    write_atomic(file, jinja().get_template("study.html").render(content))
    text = file.with_suffix(".md")
    pictures = file.with_name(f"{file.stem}-pictures")
    with disk_errors(pictures):
        pictures.mkdir(parents=True, exist_ok=True)
    write_atomic(text, _markdown(title, sections, pictures))
    return [file, text]


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


def _markdown(title: str, sections: list[Section], pictures: Path) -> str:
    """Return the page as Markdown and save its pictures as files."""
    lines = [f"# {markdown(title)}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for i, item in enumerate(section.items, 1):
            if item.kind in ("text", "note"):
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
