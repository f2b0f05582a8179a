"""Markdown tables of the scores in run folders, one for each metric and scorer.

python benchmarks/results.py RUN…
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from pera_lab.runs import Run


def figure(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def main() -> None:
    tables: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    for folder in sys.argv[1:]:
        run = Run(Path(folder))
        for name, score in run.scores().items():
            which, task = name.partition("-")[0], run.recipe.task.name
            wide = (score["n"], score["value"], score["low"], score["high"], score["majority"])
            further = ", ".join(f"{k} {figure(v)}" for k, v in score["metrics"].items())
            tables[score["scorer"]].append((task, which, score["metric"], *wide, score["unparsed"], further))
            for member, p in score["parts"].items():
                row = (p["n"], p["accuracy"], p["low"], p["high"], None, p["unparsed"], "")
                tables[score["scorer"]].append((member, which, "accuracy", *row))
            for member in score["missing"]:
                tables[score["scorer"]].append((member, which, "missing: no data", 0, *[None] * 4, 0, ""))
    for scorer, rows in tables.items():
        print(f"\nScorer: {scorer}\n")
        print("| task | model | metric | n | % | 95 % interval | majority % | unparsed | further % |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for task, which, metric, n, value, low, high, majority, unparsed, further in rows:
            cells = [task, which, metric, n, figure(value), f"{figure(low)} to {figure(high)}", figure(majority)]
            print("| " + " | ".join(map(str, [*cells, unparsed, further])) + " |")


if __name__ == "__main__":
    main()
