"""The sections of a study's page that compare the methods: scores, differences, learning rates, costs."""

from __future__ import annotations

import math
from typing import Any

from pera_lab.report import study_figures
from pera_lab.report.drawing import Table
from pera_lab.report.formatting import ABSENT, count, duration, number, p_value, percent, points, size
from pera_lab.report.items import Item, chosen_by, mean_over_tasks, setting_label
from pera_lab.study.results import Comparison, Results, Setting
from pera_lab.study.statistics import LEAST_SEEDS


def verdict(results: Results) -> str:
    """One sentence: which methods are shown to differ from the reference, and by how much."""
    reference, compared = results.study.reference, results.comparisons
    kinds = {kind: [c for c in compared if c.verdict == kind] for kind in ("better", "worse", "not decided")}
    if len(kinds["not decided"]) == len(compared):
        few = f": no comparison has {LEAST_SEEDS} pairs of seeds" if compared else ", because reported runs are missing"
        return f"Nothing is decided against {reference} yet{few}."

    def named(c: Comparison) -> str:
        tasks = f" on {', '.join(c.gains)}" if len({tuple(c.gains) for c in compared}) > 1 else ""
        return c.method + tasks + (f" ({setting_label(c.setting)})" if len(results.settings) > 1 else "")

    parts: list[str] = []
    for kind in ("better", "worse"):
        for c in sorted(kinds[kind], key=lambda c: -abs(c.gain.mean)):
            how = f"is {kind} than {reference} by" if not parts else f"is {kind} by"
            interval = f"95 % interval {points(c.gain.low)} to {points(c.gain.high)}"
            parts.append(f"{named(c)} {how} {points(abs(c.gain.mean)).removeprefix('+')} points ({interval})")
    if not parts:
        parts.append(f"no method is shown to differ from {reference}")
    if kinds["not decided"]:
        parts.append(f"not decided yet: {', '.join(map(named, kinds['not decided']))}")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper() if sentence.startswith('no method') else sentence[0]}{sentence[1:]}."


def unstable(results: Results) -> list[Item]:
    """A warning for each task on which the runs of the reference are at the baseline, or disagree."""
    items = []
    for cell in results.cells:
        if cell.method.label != results.study.reference:
            continue
        where = cell.task.label + (f", {setting_label(cell.setting[1:])}" if len(results.settings) > 1 else "")
        scored, low = results.scored(cell), results.at_baseline(cell)
        if low:
            least = percent(low[0].majority)
            runs = f"{len(low)} of {len(scored)} runs of {cell.method.label}"
            why = f"{runs} not shown to be better than the most frequent answer ({least})"
        elif results.seeds_disagree(cell):
            values = [s.value for s in scored]
            why = (
                f"the seeds of {cell.method.label} score {percent(min(values))} to {percent(max(values))}, further "
                "apart than their examples explain"
            )
        else:
            continue
        items.append(Item("warning", f"Unstable task {where}: {why}. A difference there may come from single seeds."))
    return items


def summary(results: Results) -> list[Item]:
    """The verdict, one sentence per method on its gain over the reference, and figures of the gains.

    Methods that were scored on other tasks are shown apart, because their gains cannot be compared.
    """
    study, items = results.study, [Item("verdict", verdict(results)), *unstable(results)]
    for setting in results.settings:
        if len(results.settings) > 1:
            items.append(Item("heading", setting_label(setting)))
        compared = [c for c in results.comparisons if c.setting == setting]
        if not any(cell.method.label != study.reference for cell in results.cells_of(setting)):
            items.append(Item("text", f"Only {study.reference} has this setting."))
        elif compared:
            sets = list(dict.fromkeys(tuple(c.gains) for c in compared))
            for tasks in sets:
                alike = [c for c in compared if tuple(c.gains) == tasks]
                if len(sets) > 1:
                    items.append(Item("heading", f"On {', '.join(tasks)}"))
                for c in alike:
                    cost = _relative_cost(results, c.method, setting)
                    items.append(Item("text", f"{_sentence(c, study.reference)} {cost}".rstrip()))
                items.append(Item("picture", study_figures.forest(alike, study.reference)))
        else:
            missing = "yet, because reported runs are missing."
            items.append(Item("text", f"No method can be compared with {study.reference} {missing}"))
        items += [
            Item("text", f"{c.method.label}, {c.task.label}: not compared, because {n} of its reported runs diverged.")
            for c in results.cells_of(setting)
            if (n := results.num_diverged(c))
        ]
    ended, left = len(results.outcomes), len(results.folder.remaining(results.study))
    lost = len(results.unsuccessful())
    items.append(
        Item("note", f"{ended} runs have ended, of which {lost} failed or diverged; {left} known runs remain.")
    )
    return items


def _sentence(compared: Comparison, reference: str) -> str:
    method, gain, p = compared.method, compared.gain, compared.p
    pairs = f"{gain.seeds} pair{'s' if gain.seeds > 1 else ''} of seeds"
    n = f"n = {pairs}, {count(gain.examples)} examples of {', '.join(compared.gains)}"
    if math.isnan(gain.p):
        few = f"fewer than {LEAST_SEEDS} pairs of seeds are not tested"
        return f"{method} against {reference}: {points(gain.mean)} points ({n}); {few}."
    verdict = {"better": "is better than", "worse": "is worse than"}.get(compared.verdict, "")
    interval = f"95 % interval {points(gain.low)} to {points(gain.high)}; adjusted p = {number(p, 2)}; {n}"
    if verdict:
        return f"{method} {verdict} {reference} by {points(abs(gain.mean))} points ({interval})."
    return f"{method} against {reference}: {points(gain.mean)} points, no difference shown ({interval})."


def _relative_cost(results: Results, method: str, setting: Setting) -> str:
    """Parameters and training time relative to the reference, over the tasks that both were scored on."""
    cells = [c for c in results.cells_of(setting) if c.method.label == method and results.mean(c).n]
    references = [(c, r) for c in cells if (r := results.reference(c, setting)) is not None and results.mean(r).n]
    pairs = [(results.costs(cell), results.costs(reference)) for cell, reference in references]
    sizes = [(a[0], b[0]) for a, b in pairs if a[0] and b[0]]
    times = [(a[1], b[1]) for a, b in pairs if a[1] and b[1]]
    costs = [f"{sizes[0][0] / sizes[0][1]:.3g} times the parameters"] if sizes else []
    costs += [f"{sum(a for a, _ in times) / sum(b for _, b in times):.3g} times the training time"] if times else []
    return f"Cost: {', '.join(costs)}." if costs else ""


def scores(results: Results) -> list[Item]:
    """A table with a row per method, a column per task, and the mean over the tasks last."""
    tasks = [task.label for task in results.study.grid.task]
    items = []
    for setting in results.settings:
        rows = []
        for method in results.study.grid.method:
            cells = {c.task.label: c for c in results.cells_of(setting) if c.method.label == method.label}
            means = {task: results.mean(cell) for task, cell in cells.items()}
            if not any(mean.n or results.num_diverged(cells[task]) for task, mean in means.items()):
                continue
            parameters = next((results.costs(c)[0] for c in cells.values() if means[c.task.label].n), None)
            over_tasks = percent(mean_over_tasks(results, list(cells.values())))
            columns = [_mean(means[t], results.num_diverged(cells[t])) if t in means else ABSENT for t in tasks]
            rows.append([method.label, count(parameters), *columns, over_tasks])
        if not rows:
            continue
        if len(results.settings) > 1:
            items.append(Item("heading", setting_label(setting)))
        label = f"Scores, {setting_label(setting)}"
        items.append(Item("table", Table(["method", "parameters", *tasks, "mean"], rows), label))
    metrics = {task: s.metric for task in tasks for c in results.cells if c.task.label == task
               for s in results.scored(c)[:1]}  # fmt: skip
    named = ", ".join(f"{task} {metric}" for task, metric in metrics.items())
    note = (
        f"Mean over the seeds ± standard deviation; n is the number of seeds. Metrics: {named}. The mean over the "
        "tasks is given if every task was scored and no run diverged. Parameters count the adapter without "
        "the head, which all methods share; for full fine-tuning they are all parameters, including the head."
    )
    return [*items, Item("note", note)] if metrics else []


def differences(results: Results) -> list[Item]:
    """Tables of the gain on each task, and of McNemar's test for each pair of runs."""
    items = []
    differences = {(s, c): d for s in results.settings for c in results.cells_of(s)
                   if (d := results.difference(c, s)) is not None}  # fmt: skip
    adjusted = results.adjusted(differences)
    for setting in results.settings:
        found = {cell: d for (s, cell), d in differences.items() if s == setting}
        rows = []
        for cell, d in found.items():
            p = adjusted[setting, cell]
            gain = [points(d.mean), points(d.low), points(d.high), str(d.seeds), count(d.examples)]
            rows.append([cell.method.label, cell.task.label, *gain, p_value(d.p), p_value(p), d.verdict(p)])
        if not rows:
            continue
        head = ["method", "task", "gain", "from", "to", "n seeds", "n examples", "p", "adjusted p", "verdict"]
        items.append(Item("heading", f"By task, against {results.study.reference}, {setting_label(setting)}"))
        items.append(Item("table", Table(head, rows), "Differences by task"))
        discordant = []
        for cell in found:
            for (seed, other), (gained, lost, by_example) in results.by_example(cell, setting).items():
                seeds = str(seed) if seed == other else f"{seed} against {other}"
                discordant.append([cell.method.label, cell.task.label, seeds, str(gained), str(lost),
                                   count(found[cell].examples), number(by_example, 2)])  # fmt: skip
        if discordant:
            head = ["method", "task", "seeds", "only method right", "only reference right", "n examples", "McNemar p"]
            items.append(Item("heading", "By example, for each pair of runs"))
            items.append(Item("table", Table(head, discordant), "McNemar's test for each pair of runs"))
    note = (
        "Gains are in percentage points. Interval and p account for two sources of chance, seeds and examples: the "
        "variance over the pairs of seeds plus the variance over the examples, with Welch–Satterthwaite degrees of "
        f"freedom and Student's t. They need {LEAST_SEEDS} pairs of seeds. They hold for the chosen learning rates and "
        "ignore the chance in that choice. The adjusted p accounts for all comparisons of this section "
        "(Benjamini–Hochberg). McNemar's test asks whether two trained models differ; two seeds of one method can "
        "differ too."
    )
    if any(task.recalls for task in results.study.grid.task):
        note += (
            " Where a task is tested on its training rows, each seed draws its own facts. The variance over the seeds "
            "then includes the variance over the facts, and is the only part."
        )
    return [*items, Item("note", note)] if items else []


def rates(results: Results) -> list[Item]:
    """Figures of the held-out loss over the learning rate, and a table of the chosen rates."""
    items, rows = [], []
    for setting, task, cells in results.by_task():
        curves = {c.method.label: results.rates(c) for c in cells}
        chosen = {c.method.label: results.chosen_rate(c) for c in cells}
        picture = study_figures.rate_curves(f"{task.label}, {setting_label(setting)}", curves, chosen)
        if picture is not None:
            items.append(Item("picture", picture))
        rows += [[c.label, number(results.chosen_rate(c)), "yes: extend the grid" if results.at_grid_edge(c) else "no"]
                 for c in cells if results.chosen_rate(c) is not None]  # fmt: skip
    if rows:
        items.append(Item("table", Table(["cell", "chosen rate", "at an edge of the grid"], rows), "Chosen rates"))
    seeds = len(results.study.choose.seeds)
    note = (
        f"{chosen_by(results)[0].upper()}{chosen_by(results)[1:]}, n = {seeds} seed{'s' if seeds > 1 else ''}. A "
        "comparison is fair if every curve rises at both ends. A cross marks a training that diverged."
    )
    return [*items, Item("note", note)] if items else []


def costs(results: Results) -> list[Item]:
    """A table of parameters, time and memory, and figures of the score over them."""
    rows, items = [], []
    for setting in results.settings:
        by_parameters, by_time = {}, {}
        for method in results.study.grid.method:
            cells = [c for c in results.cells_of(setting) if c.method.label == method.label and results.mean(c).n]
            if not cells:
                continue
            parameters, times, memories = zip(*(results.costs(cell) for cell in cells), strict=True)
            seconds, memory = [s for s in times if s is not None], [m for m in memories if m is not None]
            n = sum(results.mean(cell).n for cell in cells)
            rows.append([f"{method.label}, {setting_label(setting)}", count(parameters[0]), duration(sum(seconds)),
                         size(max(memory, default=None)), str(len(cells)), str(n)])  # fmt: skip
            if len(cells) == len(results.study.grid.task) and all(map(results.is_complete, cells)):
                gain = mean_over_tasks(results, cells)
                by_parameters[method.label] = (float(parameters[0] or math.nan), gain)
                by_time[method.label] = (sum(seconds) if len(seconds) == len(cells) else math.nan, gain)
        for found, axis in ((by_parameters, "trainable parameters"), (by_time, "seconds of training, all tasks")):
            if len(found) > 1:
                items.append(Item("picture", study_figures.front(found, axis, setting_label(setting))))
    if not rows:
        return []
    time = "training of one seed, sum over tasks"
    head = ["method", "parameters", time, "peak memory of the process", "tasks", "n runs"]
    note = (
        "Times are medians over the seeds; memory is the maximum. A worker trains many runs in one process, so its "
        "peak memory is the largest of all runs so far. Time depends on the load of the machine; compare it only if "
        "the study ran alone. The figures show the methods whose runs were all scored, on all tasks."
    )
    return [Item("table", Table(head, rows), "Costs"), Item("note", note), *items]


def _mean(mean: Any, diverged: int) -> str:
    lost = f"{diverged} diverged" if diverged else ""
    if not mean.n:
        return lost or ABSENT
    spread = "" if math.isnan(mean.deviation) else f" ± {percent(mean.deviation, unit='')}"
    return f"{percent(mean.mean, unit='')}{spread} (n = {mean.n}{f', {lost}' if lost else ''})"
