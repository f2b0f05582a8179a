"""Markdown tables of the scores of runs.

python -m pera_lab.study.scores RUN...
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import typer

from pera_lab.runs import Run

_HEAD = """
Scorer: {scorer}

| task | model | metric | n | % | 95 % interval | majority % | unparsed | further % |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def score_tables(runs: list[Run]) -> str:
    """A Markdown table for each scorer, with a row for each score of a run and for each member of a mix."""
    tables: dict[str, list[list[Any]]] = defaultdict(list)
    for run in runs:
        for name, score in run.scores().items():
            model, rows = name.partition("-")[0], tables[score["scorer"]]
            further = ", ".join(f"{key} {_percent(value)}" for key, value in score["metrics"].items())
            values = (score["n"], score["value"], score["low"], score["high"], score["majority"], score["unparsed"])
            rows.append(_row(run.recipe.task.name, model, score["metric"], *values, further))
            for member, p in score["parts"].items():
                values = (p["n"], p["accuracy"], p["low"], p["high"], None, p["unparsed"])
                rows.append(_row(member, model, "accuracy", *values, ""))
            for member in score["missing"]:
                rows.append(_row(member, model, "missing: no data", 0, None, None, None, None, 0, ""))
    return "\n".join(
        "\n".join([_HEAD.format(scorer=scorer), *("| " + " | ".join(map(str, row)) + " |" for row in rows)])
        for scorer, rows in tables.items()
    )


def _row(task: str, model: str, metric: str, n: int, *values: Any) -> list[Any]:
    value, low, high, majority, unparsed, further = values
    interval = f"{_percent(low)} to {_percent(high)}"
    return [task, model, metric, n, _percent(value), interval, _percent(majority), unparsed, further]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def main(runs: list[Path]) -> None:
    """Print the scores of run folders as Markdown tables."""
    typer.echo(score_tables([Run(path) for path in runs]))


if __name__ == "__main__":
    typer.run(main)
