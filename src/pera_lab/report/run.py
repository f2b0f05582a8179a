"""The HTML page about one run, or about several runs side by side. It needs no scripts and no network."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pera import __version__
from pera.errors import UserError
from pera_lab.convert.verify import Agreement
from pera_lab.diagnose import Layer, Part, by_kind
from pera_lab.files import check_output_file, write_atomic
from pera_lab.report import figures
from pera_lab.report.contents import Change, Contents, Metrics, Missing
from pera_lab.report.drawing import Picture, Table
from pera_lab.report.formatting import ABSENT, count, duration, flatten, number, percent, shortened, signed, size
from pera_lab.report.memory import memory_lines
from pera_lab.runs import Run
from pera_lab.text import visible

EXAMPLES = {"newly right": 3, "newly wrong": 3, "still wrong": 2}
"""Most examples of each transition on a page."""
TRANSITIONS = ("newly right", "newly wrong", "still right", "still wrong")


def require_html(file: Path) -> None:
    """Raise UserError if the output ``file`` of a page does not end in .html or cannot be written."""
    if file.suffix not in (".html", ".htm"):
        raise UserError(f"--output={str(file)!r} should end in .html.")
    check_output_file(file)


def write_report(runs: list[Run], file: Path) -> None:
    """Write a page about the training, scores, changed answers, layers and costs of the runs.

    A part that a run folder lacks becomes a sentence with the command that makes it.

    Args:
        runs: one run, or several to compare.
        file: the HTML file to write.

    Raises:
        UserError: no run is given, a recipe cannot be read, or the file does not end in .html or cannot be written.
    """
    require_html(file)
    if not runs:
        raise UserError("report: give at least one run folder.")
    write_atomic(file, render(runs))


def render(runs: list[Run]) -> str:
    """Return the HTML of the page. Equal run folders give equal pages."""
    sections = [_section(Contents(run)) for run in runs]
    content = {
        "title": f"Run {sections[0]['name']}" if len(runs) == 1 else f"{len(runs)} runs side by side",
        "runs": sections,
        "comparison": _comparison(sections) if len(runs) > 1 else None,
        "version": __version__,
    }
    text: str = jinja().get_template("page.html").render(content)
    return text


def jinja() -> Environment:
    """Return the environment of the templates, which escapes all text and shows control characters as codes."""
    environment = Environment(
        loader=PackageLoader("pera_lab.report"),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["shortened"] = shortened
    return environment


def _section(contents: Contents) -> dict[str, Any]:
    """Content of the page about one run."""
    recipe, metrics, layers = contents.recipe, contents.metrics, contents.layers
    scores = {which: score for which in ("base", "adapter") if (score := contents.score(which))}
    return {
        "name": contents.name,
        "contents": contents,
        "method": _method(recipe.method),
        "scores": scores,
        "unscored": [score for score in contents.scores.values() if isinstance(score, Missing)],
        "accuracy": figures.accuracy(scores) if scores else None,
        "memory": {which: Table(["", ""], rows) for which in scores if (rows := memory_lines(contents, which))},
        "training": metrics if isinstance(metrics, Missing) else figures.training(metrics),
        "validation": _validation(contents),
        "unfinished": _unfinished(contents),
        "changes": _changes(contents.changes),
        "layers": layers if isinstance(layers, Missing) else _diagnosis(layers, contents.is_pera),
        "over_time": _over_time(contents),
        "anchors_over_time": _anchors_over_time(contents),
        "effect": effects if isinstance(effects := contents.effects, Missing) else figures.effect(effects),
        "rank": rank if isinstance(rank := contents.fullness, Missing) else figures.loss_at_rank(rank),
        "costs": _costs(contents),
        "verifications": {k: v for k, v in contents.verifications.items() if isinstance(v, Agreement)},
        "unverified": [v for v in contents.verifications.values() if isinstance(v, Missing)],
        "settings": _pairs(recipe.model_dump(mode="json")),
        "environment": found if isinstance(found := contents.environment, Missing) else _pairs(found),
    }


def _method(method: dict[str, Any]) -> str:
    options = [f"{key} = {value}" for key, value in flatten(method).items() if key not in ("name", "target_modules")]
    return str(method["name"]) + (f" ({', '.join(options)})" if options else "")


def _validation(contents: Contents) -> Picture | Missing | None:
    found, cost = contents.validation, contents.cost
    kept = None if isinstance(cost, Missing) else cost.kept
    return figures.validation(found, kept) if isinstance(found, Metrics) else found


def _unfinished(contents: Contents) -> str:
    """A sentence on the progress of an unfinished training, or an empty string."""
    if contents.trained:
        return ""
    metrics, goal = contents.metrics, contents.recipe.training.max_steps
    step = 0 if isinstance(metrics, Missing) else metrics.steps[-1]
    return f"Training has not finished. The last logged step is {step}{f' of {goal}' if goal else ''}."


def _changes(changes: list[Change] | Missing) -> Any:
    if isinstance(changes, Missing):
        return changes
    counts = Counter(change.transition for change in changes)
    examples = {kind: [c for c in changes if c.transition == kind][:most] for kind, most in EXAMPLES.items()}
    return {
        "total": len(changes),
        "counts": {kind: counts[kind] for kind in TRANSITIONS},
        "examples": {kind: found for kind, found in examples.items() if found},
    }


def _diagnosis(layers: list[Layer], is_pera: bool) -> dict[str, Any]:
    """Figures of the layers, and tables by kind and by layer. A LoRA has no high-order part to show."""
    columns = {"norm": "‖ΔW‖", "stable_rank": "stable rank", "effective_rank": "effective rank"}
    if is_pera:
        parts = {"linear": "linear", "square": "squares", "cross": "crosses", "high_order_ratio": "ratio"}
        columns = {"norm": "‖ΔW‖", **parts, **columns, "ones_weight": "all-ones"}
    if any(x.diagnosis.anchors for x in layers):
        columns |= {"anchors": "anchors", "anchor_ratio": "anchor ratio"}
    names = list(columns.values())

    def cells(members: list[Layer]) -> list[str]:
        return [number(median(getattr(x.diagnosis, part) for x in members), 3) for part in columns]

    kinds = [[kind, str(len(members)), *cells(members)] for kind, members in by_kind(layers).items()]
    single = [[x.name, str(x.diagnosis.r), str(x.diagnosis.expanded_rank), *cells([x])] for x in layers]
    return {
        "map": figures.ratio_map(layers),
        "anchor_map": figures.ratio_map(layers, "anchor"),
        "spectra": figures.spectra(layers),
        "kinds": Table(["kind of module", "layers", *names], kinds),
        "layers": Table(["layer", "r", "K", *names], single),
    }


def _over_time(contents: Contents) -> Picture | Missing:
    if not contents.is_pera:
        return Missing("The adapter is not a PERA adapter, so it has no high-order ratio.")
    metrics = contents.metrics
    if isinstance(metrics, Missing):
        return metrics
    if not metrics.ratios:
        return Missing("metrics.jsonl has no high-order ratios.")
    return figures.ratio_over_time(metrics.ratios)


def _anchors_over_time(contents: Contents) -> Picture | None:
    metrics = contents.metrics
    recorded = [] if isinstance(metrics, Missing) else metrics.anchor_ratios
    return figures.ratio_over_time(recorded, "anchor") if recorded else None


def _costs(contents: Contents) -> Table:
    """Known time, memory and size."""
    rows: list[list[str]] = []
    if not isinstance(cost := contents.cost, Missing):
        speed = cost.tokens / cost.seconds if cost.tokens and cost.seconds else math.nan
        steps = 0 if isinstance(contents.metrics, Missing) else contents.metrics.steps[-1]
        since = " since it was resumed" if 0 < cost.steps < steps else ""
        rows += [
            [f"training time{since}", duration(cost.seconds)],
            [f"training tokens{since}", count(cost.tokens)],
            ["tokens per second", number(speed)],
            ["peak memory", size(cost.peak_memory)],
            ["examples skipped as too long", count(cost.left_out)],
        ]
    if contents.parameters is not None:
        rows.append(["trained parameters", count(contents.parameters)])
    for which, name in {"base": "base model", "adapter": "adapter"}.items():
        if score := contents.score(which):
            rows.append([f"scoring the {name}", f"{duration(score.seconds)} for {score.n} problems"])
    return Table(["", ""], rows)


def _pairs(settings: dict[str, Any]) -> Table:
    return Table(["key", "value"], [[key, value] for key, value in flatten(settings).items()])


def _comparison(sections: list[dict[str, Any]]) -> dict[str, Any]:
    """Table of all runs, figure of their losses, and the settings that differ."""
    contents: list[Contents] = [section["contents"] for section in sections]
    names = [f"run {i}" for i in range(1, len(contents) + 1)]
    trained = {name: c.metrics for name, c in zip(names, contents, strict=True) if isinstance(c.metrics, Metrics)}
    settings = [flatten(c.recipe.model_dump(mode="json", exclude={"name"})) for c in contents]
    keys = [key for key in dict.fromkeys(k for s in settings for k in s) if len({s.get(key) for s in settings}) > 1]
    facts = [_facts(c) for c in contents]
    return {
        "table": Table(["", *names], [[fact, *(f[fact] for f in facts)] for fact in facts[0]]),
        "losses": figures.losses(trained) if trained else None,
        "settings": Table(["key", *names], [[key, *(s.get(key, ABSENT) for s in settings)] for key in keys]),
        "scored_differently": [key for key in keys if key.startswith(SCORED) and not key.startswith(TRAINED_ON)],
    }


SCORED = ("task.", "evaluation.scorer", "evaluation.max_new_tokens", "evaluation.num_beams", "training.held_out")
"""Settings that decide what a score measures, apart from :data:`TRAINED_ON`."""

TRAINED_ON = ("task.train_size", "task.shares", "task.caps", "task.loss", "task.validation_seed", "task.annotations")
"""Settings that match :data:`SCORED` but change only the training."""


def _facts(contents: Contents) -> dict[str, str]:
    """One column of the comparison."""
    base, score = contents.score("base"), contents.score("adapter")
    cost = None if isinstance(contents.cost, Missing) else contents.cost
    layers, effects, metrics = contents.layers, contents.effects, contents.metrics
    ratio = None
    if contents.is_pera and not isinstance(layers, Missing):
        ratio = median(x.diagnosis.high_order_ratio for x in layers)
    without: dict[Part, float] = {} if isinstance(effects, Missing) else effects.without
    change, frozen = without.get("high_order"), without.get("anchors")
    stored = score.memory if score else None
    return {
        "folder": contents.name,
        "method": str(contents.recipe.method["name"]),
        "metric": known.metric if (known := score or base) else ABSENT,
        "score": percent(score.value if score else None),
        "95 % interval": f"{percent(score.low)} to {percent(score.high)}" if score else ABSENT,
        "base model": percent(base.value if base else None),
        **({"bits per parameter": number(stored.bits_per_parameter, 3)} if stored else {}),
        "last loss": number(None if isinstance(metrics, Missing) else metrics.last_loss),
        "training time": duration(cost.seconds if cost else None),
        "peak memory": size(cost.peak_memory if cost else None),
        "parameters": count(contents.parameters),
        "high-order ratio": number(ratio, 3),
        "effect": ABSENT if change is None else signed(change),
        "effect of anchors": ABSENT if frozen is None else signed(frozen),
    }
