"""The sections of a study's page about training, terms, axes of the grid, gaps and protocol."""

from __future__ import annotations

import math
from itertools import chain
from statistics import median
from typing import Any

from pera_lab import methods
from pera_lab.diagnose import Part, place_layers
from pera_lab.files import read_object
from pera_lab.intervals import mean
from pera_lab.report import figures, study_figures
from pera_lab.report.contents import Contents, Metrics
from pera_lab.report.drawing import Table
from pera_lab.report.formatting import ABSENT, count, number, signed
from pera_lab.report.items import Item, chosen_by, mean_over_tasks, run_command, setting_label
from pera_lab.study.results import Results, Setting
from pera_lab.study.spec import StudyMethod


def losses(results: Results) -> list[Item]:
    """Figures of the training loss of each method."""
    items = []
    for setting, task, cells in results.by_task():
        curves = {cell.method.label: results.loss_curve(cell) for cell in cells}
        lines = {
            label: Metrics([{"step": s, "loss": x} for s, x in zip(*curve, strict=True)])
            for label, curve in curves.items()
            if curve[0]
        }
        if lines:
            items.append(Item("heading", f"{task.label}, {setting_label(setting)}, mean over the seeds"))
            items.append(Item("picture", figures.losses(lines)))
    return items


def terms(results: Results) -> list[Item]:
    """A table of the effect of the high-order terms, and figures of the layers of the first seeds."""
    rows, items = [], []
    for cell in results.cells:
        effects, layers = results.effects(cell), results.layers(cell)
        if not effects:
            continue
        parts: tuple[Part, ...] = ("high_order", "square", "cross", "anchors")
        changes, squares, crosses, anchors = ([e.without.get(part, math.nan) for e in effects] for part in parts)
        low, high = min(changes), max(changes)
        cut = [e.at_rank_r for e in effects if e.at_rank_r is not None]
        labels = sorted({e.tokens for e in effects})
        ratio = number(median(d.high_order_ratio for d in layers.values()), 3) if layers else ABSENT
        rows.append([cell.label, number(mean(e.loss for e in effects)), signed(mean(changes)),
                     f"{signed(low)} to {signed(high)}", signed(mean(squares)), signed(mean(crosses)),
                     ABSENT if any(map(math.isnan, anchors)) else signed(mean(anchors)),
                     signed(mean(cut)) if len(cut) == len(effects) else ABSENT, ratio, str(len(changes)),
                     " to ".join(map(count, dict.fromkeys([labels[0], labels[-1]])))])  # fmt: skip
    if not rows:
        return []
    head = ["cell", "loss", "without them", "over the seeds", "without squares", "without crosses", "without anchors",
            "truncated to rank r", "ratio", "n seeds", "n labels"]  # fmt: skip
    items.append(Item("table", Table(head, rows), "Effect of the high-order terms"))
    note = (
        "Change of the loss on the scored rows when the high-order terms of the trained adapter are set to zero: above "
        "zero the adapter relies on them, near zero they do nothing. “Truncated to rank r”: every ΔW is replaced by "
        "its r leading directions, the most that a LoRA of rank r can hold; near zero, the rank beyond r is not used. "
        "The ratio is ‖high-order part‖ / ‖BA‖, the median over the layers of the first seed; a high ratio alone does "
        "not show that the terms are used."
    )
    items.append(Item("note", note))
    for cell in results.cells:
        layers = results.layers(cell)
        if not layers:
            continue
        contents = Contents(results.scored(cell)[0].run)
        metrics = contents.metrics if isinstance(contents.metrics, Metrics) else Metrics([])
        over_time, anchors_over_time = metrics.ratios, metrics.anchor_ratios
        pictures = [
            figures.ratio_map(place_layers(layers)),
            figures.ratio_map(place_layers(layers), "anchor"),
            study_figures.effect_by_group(results.effects(cell)),
            figures.ratio_over_time(over_time) if over_time else None,
            figures.ratio_over_time(anchors_over_time, "anchor") if anchors_over_time else None,
            figures.spectra(place_layers(layers)),
        ]
        items.append(Item("heading", f"{cell.label}, first seed"))
        items += [Item("picture", picture) for picture in pictures if picture is not None]
    return items


def interactions(results: Results) -> list[Item]:
    """Heat maps of the interaction strength, one per method of a setting and task, on one scale."""
    items = []
    for setting, task, cells in results.by_task():
        found = {c.method.label: m for c in cells if (m := results.interaction(c)) is not None}
        if found:
            items.append(Item("heading", f"{task.label}, {setting_label(setting)}, first seed"))
            items.append(Item("picture", study_figures.interaction_maps(found)))
    note = (
        "Interaction of two hidden features: |∂²f / ∂h_i ∂h_j|, the mean over 8 test rows. h is the first 16 features "
        "after the middle block, at the last token of a decoder or the first of an encoder; f is the largest logit. "
        "Equation 12 of the paper leaves both open. An adapted layer is linear in its input, so this measures the "
        "network around it."
    )
    return [*items, Item("note", note)] if items else []


def sweeps(results: Results) -> list[Item]:
    """Mean scores along each axis of the grid that has several values, with the other axes fixed."""
    grid, items = results.study.grid, []

    def score(method: StudyMethod, setting: Setting) -> float:
        return mean_over_tasks(results, [c for c in results.cells_of(setting) if c.method == method])

    for i, name in enumerate(("rank r", "placement", "share of the training data")):
        along: dict[Setting, list[Setting]] = {}
        for setting in sorted(results.settings, key=lambda setting: setting[2]):
            fixed: Any = [*setting[:i], (None, None, 1.0)[i], *setting[i + 1 :]]
            along.setdefault(tuple(fixed), []).append(setting)
        for fixed, settings in along.items():
            lines = {method.label: [score(method, setting) for setting in settings] for method in grid.method}
            lines = {label: line for label, line in lines.items() if any(map(math.isfinite, line))}
            if len(settings) > 1 and lines:
                values = [str(setting[i]) for setting in settings]
                title = setting_label(fixed) if len(along) > 1 else ""
                items.append(Item("picture", study_figures.sweep(name, values, lines, title=title)))
    kinds = {"lora": "none (LoRA)", "pera-crosses": "cross", "pera-squares": "square", "pera-published": "all (PERA)"}
    plain = [m for m in grid.method if m.name in kinds and m.label == m.name and not (m.more or m.seeds)]
    found = {
        setting_label(s): {kinds[m.name]: x for m in plain if math.isfinite(x := score(m, s))} for s in results.settings
    }
    most = max(found.values(), key=len, default={})
    if len(most) > 1:
        lines = {setting: [values.get(kind, math.nan) for kind in most] for setting, values in found.items()}
        items.append(Item("picture", study_figures.sweep("terms", list(most), lines)))
    return items


def gaps(results: Results) -> list[Item]:
    """Failed and diverged runs, methods that are not available, and remaining runs."""
    rows = [[name, outcome.status, outcome.error] for name, outcome in results.unsuccessful()]
    items = [Item("table", Table(["run", "status", "why"], rows), "Runs that failed or diverged")] if rows else []
    items += [Item("text", f"{name}: {reason}") for name, reason in methods.ABSENT.items()]
    if left := [trial.name for trial in results.folder.remaining(results.study)]:
        items.append(Item("text", f"{len(left)} known runs remain. Continue with: {run_command(results.folder)}"))
        items.append(Item("details", "\n".join(left), "Remaining runs"))
    return items


def protocol(results: Results) -> list[Item]:
    """How the methods were compared, on which machines, and the study itself."""
    study = results.study
    files = [results.folder.runs / name / "environment.json" for name in results.outcomes]
    environments = [read_object(file) for file in files if file.is_file()]
    parts = [[str(e.get(key, ABSENT)) for key in ("processor", "threads", "accelerator")] for e in environments]
    machines = sorted({f"{processor}, {threads} threads, {accelerator}" for processor, threads, accelerator in parts})
    versions = [v for e in environments if isinstance(v := e.get("versions"), dict)]
    packages = {
        p: sorted({str(v[p]) for v in versions if v.get(p)}) for p in dict.fromkeys(chain.from_iterable(versions))
    }
    own = "".join(f"; {m.label}: {', '.join(map(str, m.seeds))}" for m in study.grid.method if m.seeds)
    text = (
        "The methods of a comparison share the recipe except for the method: data and their order by seed, loss, "
        f"steps, evaluator. Each learning rate was chosen by the {chosen_by(results)} "
        f"(seeds {', '.join(map(str, study.choose.seeds))}). Each method was then trained on all training rows with "
        f"each report seed ({', '.join(map(str, study.report.seeds))}{own}) and scored on the test rows."
    )
    if recalling := [task.label for task in study.grid.task if task.recalls]:
        text += f" {', '.join(recalling)}: the test rows are the training rows, and each seed draws its own."
    listed = ", ".join(f"{package} {' and '.join(found)}" for package, found in packages.items() if found)
    return [
        Item("text", text),
        Item("text", f"Machine: {'; '.join(machines)}. Versions: {listed}."),
        Item("details", study.to_yaml(), "The study with all defaults"),
    ]
