"""A study becomes a page and Markdown: who wins, by how much, how sure, at what cost."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pera import __version__
from pera.errors import UserError
from pera_lab import methods
from pera_lab.diagnose import Part, place_layers
from pera_lab.files import disk_errors, read_object, write_atomic
from pera_lab.report import paper, plots, study_plots
from pera_lab.report.contents import Contents, Metrics
from pera_lab.report.drawing import Table
from pera_lab.report.formatting import ABSENT, chance, count, duration, number, percent, points, signed, size
from pera_lab.report.page import jinja, require_html
from pera_lab.report.pictures import save_figure
from pera_lab.study.folder import StudyFolder
from pera_lab.study.results import Results, Setting
from pera_lab.study.spec import Cell, StudyMethod
from pera_lab.study.statistics import LEAST_SEEDS, Difference, average


@dataclass(frozen=True)
class Item:
    """One thing in a section: "text", "note", "heading", "table", "picture" or "details"."""

    kind: str
    content: Any
    label: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    id: str
    title: str
    items: list[Item]


def write_study_report(folder: StudyFolder, file: Path) -> list[Path]:
    """Write the page, and beside it Markdown of the same content with its pictures in a folder.

    Args:
        folder: the study.
        file: the HTML file.

    Returns:
        The page and the Markdown file.

    Raises:
        UserError: the file is not to be an HTML file, there is no study, no run of it has ended, or an optional package
            is missing.
    """
    require_html(file)
    results = Results(folder)
    if not results.outcomes:
        raise UserError(f"{str(folder.path)!r} has no run that has ended; go on with: pera study run {folder.path}")
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
    """All that the page shows."""
    sections = [
        Section("summary", "In one minute", _summary(results)),
        Section("scores", "Scores", _scores(results)),
        Section("differences", "Differences", _differences(results)),
        Section("rates", "Learning rates", _rates(results)),
        Section("costs", "Costs", _costs(results)),
        Section("losses", "Training losses", _losses(results)),
        Section("terms", "What the high-order terms do", _terms(results)),
        Section("interactions", "Interaction strength", _interactions(results)),
        Section("sweeps", "Rank, placement, terms and data", _sweeps(results)),
        Section("gaps", "What is missing or went wrong", _gaps(results)),
        Section("protocol", "Protocol", _protocol(results)),
    ]
    return [section for section in sections if section.items]


def _summary(results: Results) -> list[Item]:
    study, items = results.study, []
    found = {(s, m.label): gains for s in results.settings for m in study.grid.method
             if (gains := results.gains(m.label, s))}  # fmt: skip
    averages = {key: average(list(gains.values())) for key, gains in found.items()}
    adjusted = results.adjusted(averages)
    for setting in results.settings:
        if len(results.settings) > 1:
            items.append(Item("heading", _setting(setting)))
        gains = {method: gain for (s, method), gain in averages.items() if s == setting}
        if gains:
            p = {method: adjusted[setting, method] for method in gains}
            most = max(gain.tasks for gain in gains.values())
            for method, gain in sorted(gains.items(), key=study_plots.by_tasks_and_gain):
                said = _sentence(method, gain, list(found[setting, method]), p[method], study.reference)
                items.append(Item("text", f"{said} {_price(results, method, setting)}".rstrip()))
            names = {m: m if gains[m].tasks == most else f"{m} ({', '.join(found[setting, m])})" for m in gains}
            shown = {names[m]: gain for m, gain in gains.items()}
            items.append(Item("picture", study_plots.forest(shown, {names[m]: p[m] for m in p}, study.reference)))
        else:
            items.append(Item("text", f"No method can be compared with {study.reference} yet; seeds are lacking."))
        items += [
            Item("text", f"{c.method.label}, {c.task.label}: {n} reported runs diverged, so it is not compared there.")
            for c in results.cells_of(setting)
            if (n := results.num_diverged(c))
        ]
    ended, left = len(results.outcomes), len(results.folder.remaining(results.study))
    lost = len(results.unsuccessful())
    items.append(
        Item("note", f"{ended} runs have ended, {lost} of them failed or diverged; {left} known runs are still to do.")
    )
    return items


def _sentence(method: str, gain: Difference, tasks: list[str], p: float, reference: str) -> str:
    pairs = f"{gain.seeds} pair{'s' if gain.seeds > 1 else ''} of seeds"
    n = f"n = {pairs}, {count(gain.examples)} examples of {', '.join(tasks)}"
    if math.isnan(gain.p):
        few = f"with fewer than {LEAST_SEEDS} pairs of seeds nothing is decided"
        return f"{method} against {reference}: {points(gain.mean)} ({n}); {few}."
    said = {"better": "is better than", "worse": "is worse than"}.get(gain.verdict(p), "")
    interval = f"95 % interval {points(gain.low)} to {points(gain.high)}; adjusted p = {number(p, 2)}; {n}"
    if said:
        return f"{method} {said} {reference} by {points(abs(gain.mean))} points ({interval})."
    return f"{method} against {reference}: {points(gain.mean)} points, no difference shown ({interval})."


def _price(results: Results, method: str, setting: Setting) -> str:
    """Parameters and training time beside those of the reference, on the tasks that both were scored on."""
    cells = [c for c in results.cells_of(setting) if c.method.label == method and results.mean(c).n]
    beside = [(c, r) for c in cells if (r := results.reference(c, setting)) is not None and results.mean(r).n]
    pairs = [(results.costs(cell), results.costs(reference)) for cell, reference in beside]
    sizes = [(a[0], b[0]) for a, b in pairs if a[0] and b[0]]
    times = [(a[1], b[1]) for a, b in pairs if a[1] and b[1]]
    said = [f"{sizes[0][0] / sizes[0][1]:.3g} times the parameters"] if sizes else []
    said += [f"{sum(a for a, _ in times) / sum(b for _, b in times):.3g} times the training time"] if times else []
    return f"Cost: {', '.join(said)}." if said else ""


def _scores(results: Results) -> list[Item]:
    """The scores in the arrangement of the paper's tables 1 and 2: methods down, tasks across, the mean at the end."""
    tasks = [task.label for task in results.study.grid.task]
    model, published, names = paper.beside([task.name for task in results.study.grid.task])
    known = {task.label: names.get(task.name, "") for task in results.study.grid.task}
    items = []
    for setting in results.settings:
        rows = []
        for method in results.study.grid.method:
            cells = {c.task.label: c for c in results.cells_of(setting) if c.method.label == method.label}
            means = {task: results.mean(cell) for task, cell in cells.items()}
            if not any(mean.n or results.num_diverged(cells[task]) for task, mean in means.items()):
                continue
            size_ = next((results.costs(c)[0] for c in cells.values() if means[c.task.label].n), None)
            over_tasks = _over_tasks(results, list(cells.values()))
            average = ABSENT if math.isnan(over_tasks) else percent(over_tasks)
            cells_ = [_mean(means[t], results.num_diverged(cells[t])) if t in means else ABSENT for t in tasks]
            rows.append([method.label, count(size_), *cells_, average])
        marked = frozenset(range(len(rows), len(rows) + len(published)))
        for row in published:
            figures = [f"{row[known[task]]:.2f} %" if known[task] in row else ABSENT for task in tasks]
            name = f"paper, {model}: {row['method']}"
            figure = row.get("parameters") or f"{row['trainable_percent']} %"
            whole = all(known[task] in row for task in tasks)
            average = f"{fmean(row[known[task]] for task in tasks):.2f} %" if whole else ABSENT
            rows.append([name, figure, *figures, average])
        if len(results.settings) > 1:
            items.append(Item("heading", _setting(setting)))
        label = f"Scores, {_setting(setting)}"
        items.append(Item("table", Table(["method", "parameters", *tasks, "mean"], rows, marked), label))
    metrics = {task: s.metric for task in tasks for c in results.cells if c.task.label == task
               for s in results.scored(c)[:1]}  # fmt: skip
    said = ", ".join(f"{task} {metric}" for task, metric in metrics.items())
    note = (
        f"Mean over the seeds ± standard deviation, and n, the number of seeds. Metrics: {said}. The mean over the "
        "tasks stands only where every task was scored and no run diverged, and of the paper's rows it is over the "
        "same tasks. Parameters are those of the adapter, without the head, which is equal for all; of full "
        "fine-tuning they are all, the head's too."
    )
    return [*items, Item("note", note)] if metrics else []


def _differences(results: Results) -> list[Item]:
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
            rows.append([cell.method.label, cell.task.label, *gain, chance(d.p), chance(p), d.verdict(p)])
        if not rows:
            continue
        head = ["method", "task", "gain", "from", "to", "n seeds", "n examples", "p", "adjusted p", "verdict"]
        items.append(Item("heading", f"By task, against {results.study.reference}, {_setting(setting)}"))
        items.append(Item("table", Table(head, rows), "Differences by task"))
        discordant = []
        for cell in found:
            for (seed, other), (gained, lost, by_example) in results.by_example(cell, setting).items():
                seeds = str(seed) if seed == other else f"{seed} against {other}"
                discordant.append([cell.method.label, cell.task.label, seeds, str(gained), str(lost),
                                   count(found[cell].examples), number(by_example, 2)])  # fmt: skip
        if discordant:
            head = ["method", "task", "seeds", "only it right", "only the other right", "of n examples", "McNemar p"]
            items.append(Item("heading", "Example by example, for each pair of runs"))
            items.append(Item("table", Table(head, discordant), "McNemar's test for each pair of runs"))
    note = (
        "Gains in points (hundredths). Interval and p count two sources of chance, seeds and examples "
        "(variance over the pairs of seeds plus that over the examples, Welch–Satterthwaite degrees of freedom, "
        f"Student's t), from {LEAST_SEEDS} pairs of seeds on. They are for the rates that were chosen; what chance "
        "there was in the choice is not in them. p is adjusted for the number of comparisons in all "
        "tables of this section (Benjamini–Hochberg). McNemar's test asks whether two trained models differ; two "
        "trainings of one method with other seeds do that too."
    )
    return [*items, Item("note", note)] if items else []


def _rates(results: Results) -> list[Item]:
    items, rows = [], []
    for setting, task, cells in results.by_task():
        curves = {c.method.label: results.rates(c) for c in cells}
        chosen = {c.method.label: results.chosen_rate(c) for c in cells}
        picture = study_plots.rate_curves(f"{task.label}, {_setting(setting)}", curves, chosen)
        if picture is not None:
            items.append(Item("picture", picture))
        rows += [[c.label, number(results.chosen_rate(c)), "yes: look beyond it" if results.at_grid_edge(c) else "no"]
                 for c in cells if results.chosen_rate(c) is not None]  # fmt: skip
    if rows:
        items.append(Item("table", Table(["cell", "chosen rate", "at an edge of the grid"], rows), "Chosen rates"))
    rows_out, seeds = results.study.choose.rows, len(results.study.choose.seeds)
    note = (
        f"Loss on {rows_out} rows held out of the training set, n = {seeds} seed{'s' if seeds > 1 else ''}; these runs "
        "do not train on them. A comparison is fair where every curve turns up at both ends. A cross marks a training "
        "that diverged."
    )
    return [*items, Item("note", note)] if items else []


def _costs(results: Results) -> list[Item]:
    rows, items = [], []
    for setting in results.settings:
        by_parameters, by_time = {}, {}
        for method in results.study.grid.method:
            cells = [c for c in results.cells_of(setting) if c.method.label == method.label and results.mean(c).n]
            if not cells:
                continue
            costs = [results.costs(cell) for cell in cells]
            seconds = [s for _, s, _ in costs if s is not None]
            memory = [m for _, _, m in costs if m is not None]
            n = sum(results.mean(cell).n for cell in cells)
            rows.append([f"{method.label}, {_setting(setting)}", count(costs[0][0]), duration(sum(seconds)),
                         size(max(memory, default=None)), str(len(cells)), str(n)])  # fmt: skip
            if len(cells) == len(results.study.grid.task) and all(map(results.is_complete, cells)):
                gain = _over_tasks(results, cells)
                by_parameters[method.label] = (float(costs[0][0] or math.nan), gain)
                by_time[method.label] = (sum(seconds) if len(seconds) == len(cells) else math.nan, gain)
        for costs_, axis in ((by_parameters, "trainable parameters"), (by_time, "seconds of training, all tasks")):
            if len(costs_) > 1:
                items.append(Item("picture", study_plots.front(costs_, axis, _setting(setting))))
    if not rows:
        return []
    head = ["method", "parameters", "training, one seed, tasks summed", "peak memory of the process", "tasks", "n runs"]
    published = paper.tables()["table5_cost_llama2_7b_r4"]
    theirs = [[name, f"{row['train_gb']} GB", f"{row['train_hours']} h", f"{row['inference_gb']} GB",
               f"{row['inference_minutes']} min"] for name, row in published.items()]  # fmt: skip
    note = (
        "Times are medians over the seeds, memory is the largest. A worker makes many runs in one process, so its peak "
        "memory is that of the largest so far. Time depends on what else the machine did; compare it only in a study "
        "that ran alone. In the pictures are the methods of which every run was scored, on all tasks."
    )
    return [
        Item("table", Table(head, rows), "Costs"),
        Item("note", note),
        *items,
        Item("heading", "The paper's costs: LLaMA2-7B, r = 4, one RTX 5090"),
        Item(
            "table",
            Table(["paper", "training", "time", "inference", "time, BoolQ"], theirs, frozenset(range(len(theirs)))),
            "The paper's costs",
        ),
    ]


def _losses(results: Results) -> list[Item]:
    items = []
    for setting, task, cells in results.by_task():
        curves = {cell.method.label: results.loss_curve(cell) for cell in cells}
        lines = {
            label: Metrics([{"step": s, "loss": x} for s, x in zip(*curve, strict=True)])
            for label, curve in curves.items()
            if curve[0]
        }
        if lines:
            items.append(Item("heading", f"{task.label}, {_setting(setting)}, mean over the seeds"))
            items.append(Item("picture", plots.losses(lines)))
    return items


def _terms(results: Results) -> list[Item]:
    rows, items = [], []
    for cell in results.cells:
        effects, layers = results.effects(cell), results.layers(cell)
        if not effects:
            continue
        parts: tuple[Part, ...] = ("high_order", "square", "cross")
        changes, squares, crosses = ([e.without.get(part, math.nan) for e in effects] for part in parts)
        low, high = min(changes), max(changes)
        cut = [e.at_rank_r for e in effects if e.at_rank_r is not None]
        labels = sorted({e.tokens for e in effects})
        ratio = number(median(d.high_order_ratio for d in layers.values()), 3) if layers else ABSENT
        rows.append([cell.label, number(fmean(e.loss for e in effects)), signed(fmean(changes)),
                     f"{signed(low)} to {signed(high)}", signed(fmean(squares)), signed(fmean(crosses)),
                     signed(fmean(cut)) if len(cut) == len(effects) else ABSENT, ratio, str(len(changes)),
                     " to ".join(map(count, dict.fromkeys([labels[0], labels[-1]])))])  # fmt: skip
    if not rows:
        return []
    head = ["cell", "loss", "without them", "over the seeds", "without squares", "without crosses", "cut to rank r",
            "ratio", "n seeds", "n labels"]  # fmt: skip
    items.append(Item("table", Table(head, rows), "Effect of the high-order terms"))
    note = (
        "Change of the loss on test rows when the high-order terms of the trained adapter are set to zero: above zero "
        "the adapter relies on them, near zero they do nothing. Cut to rank r: every ΔW is replaced by its r leading "
        "directions, as much of it as a LoRA of equal r can hold; near zero, the rank beyond r is not used. "
        "The ratio is ‖high-order part‖ / ‖BA‖, the median over the layers of the first seed; it is no proof of use."
    )
    items.append(Item("note", note))
    for cell in results.cells:
        layers = results.layers(cell)
        if not layers:
            continue
        contents = Contents(results.scored(cell)[0].run)
        over_time = contents.metrics.ratios if isinstance(contents.metrics, Metrics) else []
        pictures = [
            plots.ratio_map(place_layers(layers)),
            study_plots.effect_by_group(results.effects(cell)),
            plots.ratio_over_time(over_time) if over_time else None,
            plots.spectra(place_layers(layers)),
        ]
        items.append(Item("heading", f"{cell.label}, first seed"))
        items += [Item("picture", picture) for picture in pictures if picture is not None]
    return items


def _interactions(results: Results) -> list[Item]:
    """The paper's heat map, PERA against LoRA: a map for each method of a setting and task, on one scale."""
    items = []
    for setting, task, cells in results.by_task():
        found = {c.method.label: m for c in cells if (m := results.interaction(c)) is not None}
        if found:
            items.append(Item("heading", f"{task.label}, {_setting(setting)}, first seed"))
            items.append(Item("picture", study_plots.interaction_maps(found)))
    note = (
        "How strongly two hidden features act together: |∂²f / ∂h_i ∂h_j|, the mean over 8 test rows. h: the first 16 "
        "features after the middle block, of the last token, or the first of an encoder. f: the largest logit. The "
        "paper's equation 12 leaves both open. An adapted layer is linear in its input, so this measures the network "
        "around it."
    )
    return [*items, Item("note", note)] if items else []


def _sweeps(results: Results) -> list[Item]:
    """Means over the tasks along one axis, the others held fixed, where the study has more than one value on it, above
    the paper's."""
    grid, items = results.study.grid, []

    def mean(method: StudyMethod, setting: Setting) -> float:
        return _over_tasks(results, [c for c in results.cells_of(setting) if c.method == method])

    axes = (("rank", "rank r"), ("placement", "placement"), ("data_share", "share of the training data"))
    for i, (axis, name) in enumerate(axes):
        along: dict[Setting, list[Setting]] = {}
        for setting in sorted(results.settings, key=lambda setting: setting[2]):
            fixed: Any = [*setting[:i], (None, None, 1.0)[i], *setting[i + 1 :]]
            along.setdefault(tuple(fixed), []).append(setting)
        for fixed, settings in along.items():
            lines = {method.label: [mean(method, setting) for setting in settings] for method in grid.method}
            lines = {label: line for label, line in lines.items() if any(map(math.isfinite, line))}
            if len(settings) > 1 and lines:
                values = [str(setting[i]) for setting in settings]
                title = f"this study, {_setting(fixed)}" if len(along) > 1 else "this study"
                items.append(Item("picture", study_plots.sweep(name, values, lines, *paper.sweep(axis), title=title)))
    kinds = {"lora": "none (LoRA)", "pera-crosses": "cross", "pera-squares": "square", "pera-published": "all (PERA)"}
    plain = [m for m in grid.method if m.name in kinds and m.label == m.name and not (m.more or m.seeds)]
    found = {_setting(s): {kinds[m.name]: x for m in plain if math.isfinite(x := mean(m, s))} for s in results.settings}
    most = max(found.values(), key=len, default={})
    if len(most) > 1:
        lines = {setting: [values.get(kind, math.nan) for kind in most] for setting, values in found.items()}
        items.append(Item("picture", study_plots.sweep("terms", list(most), lines, *paper.sweep("terms"))))
    return items


def _gaps(results: Results) -> list[Item]:
    rows = [[name, outcome.status, outcome.error] for name, outcome in results.unsuccessful()]
    items = [Item("table", Table(["run", "status", "why"], rows), "Runs that failed or diverged")] if rows else []
    items += [Item("text", f"{name}: {reason}") for name, reason in methods.ABSENT.items()]
    if left := [trial.name for trial in results.folder.remaining(results.study)]:
        file, folder = (shlex.quote(str(path)) for path in (results.folder.study_file, results.folder.path))
        command = f"pera study run {file} --output {folder}"
        items.append(Item("text", f"{len(left)} known runs are to do. Go on with: {command}"))
        items.append(Item("details", "\n".join(left), "The runs to do"))
    return items


def _protocol(results: Results) -> list[Item]:
    study = results.study
    files = [results.folder.runs / name / "environment.json" for name in results.outcomes]
    environments = [read_object(file) for file in files if file.is_file()]
    parts = [[str(e.get(key, ABSENT)) for key in ("processor", "threads", "accelerator")] for e in environments]
    machines = sorted({f"{processor}, {threads} threads, {accelerator}" for processor, threads, accelerator in parts})
    versions = [v for e in environments if isinstance(v := e.get("versions"), dict)]
    packages = {p: sorted({v[p] for v in versions if v.get(p)}) for p in dict.fromkeys(chain.from_iterable(versions))}
    own = "".join(f"; {m.label}: {', '.join(map(str, m.seeds))}" for m in study.grid.method if m.seeds)
    text = (
        "Every method of a comparison has the same recipe but for the method: data and their order by seed, loss, "
        f"steps, evaluator. The learning rate of each was chosen by the loss on {study.choose.rows} training rows that "
        f"were held out (seeds {', '.join(map(str, study.choose.seeds))}); it was then trained on all training rows "
        f"with each seed of report ({', '.join(map(str, study.report.seeds))}{own}) and scored on the test rows."
    )
    said = ", ".join(f"{package} {' and '.join(found)}" for package, found in packages.items() if found)
    return [
        Item("text", text),
        Item("text", f"Machine: {'; '.join(machines)}. Versions: {said}."),
        Item("details", study.to_yaml(), "The study, with every default"),
    ]


def _over_tasks(results: Results, cells: list[Cell]) -> float:
    """Mean score of cells; NaN unless each was scored, and where a run diverged: it would be that of lucky seeds."""
    if any(map(results.num_diverged, cells)):
        return math.nan
    means = [results.mean(cell).mean for cell in cells if results.mean(cell).n]
    return fmean(means) if means and len(means) == len(cells) else math.nan


def _setting(setting: Setting) -> str:
    r, placement, share = setting
    parts = [f"r = {r}" if r else "", placement or "", f"{100 * share:g} % of the data" if share < 1 else ""]
    return ", ".join(filter(None, parts)) or "all"


def _mean(mean: Any, diverged: int) -> str:
    lost = f"{diverged} diverged" if diverged else ""
    if not mean.n:
        return lost or ABSENT
    spread = "" if math.isnan(mean.deviation) else f" ± {100 * mean.deviation:.1f}"
    return f"{100 * mean.mean:.1f}{spread} (n = {mean.n}{f', {lost}' if lost else ''})"


def _markdown(title: str, sections: list[Section], pictures: Path) -> str:
    """The page as Markdown, every picture as a file with its numbers below."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for i, item in enumerate(section.items, 1):
            if item.kind in ("text", "note"):
                lines += [_escaped(item.content), ""]
            elif item.kind == "heading":
                lines += [f"### {_escaped(item.content)}", ""]
            elif item.kind == "table":
                lines += [*_table(item.content), ""]
            elif item.kind == "picture":
                file = pictures / f"{section.id}-{i}.svg"
                save_figure(item.content.figure, file)
                lines += [f"![{_escaped(item.content.label)}]({pictures.name}/{file.name})", ""]
                lines += [_escaped(item.content.finding), ""]
            else:
                lines += [f"{item.label}:", "", *(f"    {line}" for line in item.content.splitlines()), ""]
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    head = "| " + " | ".join(map(_escaped, table.head)) + " |"
    rule = "| --- |" + " ---: |" * (len(table.head) - 1)
    return [head, rule, *("| " + " | ".join(map(_escaped, row)) + " |" for row in table.rows)]


def _escaped(text: str) -> str:
    for character in "\\|*_<`[":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")
