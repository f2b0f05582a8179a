"""The commands that show a run, an adapter, a model or this machine: inspect, report, chat, env."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pera_lab.cli.console import Facts, out, print_json
from pera_lab.cli.options import Json, Overrides, Quiet, Source, Trust, shipped
from pera_lab.shipped import Kind, shipped_files, shipped_summary, shipped_text
from pera_lab.text import visible

if TYPE_CHECKING:
    from rich.table import Table

    from pera_lab.diagnose import Effects, LayerDiagnosis


def inspect(
    source: Source,
    overrides: Overrides = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Print one row per layer (default: one row per kind of layer).")
    ] = False,
    effect: Annotated[
        bool,
        typer.Option(
            "--effect",
            help="Also measure which rank the data needs, and how the high-order terms change the loss. This loads "
            "the model.",
        ),
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe with the task to measure an adapter folder on, for --effect; KEY=VALUE overrides its keys "
            "(default: the recipe of the run)."
        ),
    ] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Held-out examples to measure on, for --effect (default: 64).")
    ] = None,
    json: Json = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the high-order ratio by block and kind into this .svg or .png file (default: none)."),
    ] = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Show the norms, high-order ratio and effective rank of a PERA or LoRA adapter, and whether it is full."""
    from dataclasses import asdict

    from pera.errors import UserError
    from pera_lab.diagnose import adapter_effects, diagnose_adapter, run_effects
    from pera_lab.opening import locate_adapter
    from pera_lab.recipe import load_recipe

    if not effect and (examples is not None or recipe is not None):
        unused = "--examples" if recipe is None else "--recipe"
        raise typer.BadParameter("only --effect uses it; add --effect.", param_hint=unused)
    if overrides and recipe is None:
        raise typer.BadParameter(f"{overrides[0]!r} has no effect without --recipe.", param_hint="KEY=VALUE")
    location = locate_adapter(source, trust_remote_code=trust_remote_code)
    adapter = location.require_adapter()
    if location.run is not None and recipe is not None:
        raise UserError(f"--recipe={recipe!r} has no effect for a run, which has its own; leave it out.")
    if effect and location.run is None and recipe is None:
        raise UserError(
            f"--effect needs data, and {source!r} is an adapter folder; give --recipe with the task to measure it on."
        )
    used = ("task", "data=", "training.max_length=")
    if unused_key := next((override for override in overrides or () if not override.startswith(used)), None):
        raise UserError(
            f"{unused_key!r} has no effect; --recipe uses only the task and training.max_length of a recipe."
        )
    task = None if recipe is None else load_recipe(recipe, overrides)
    found = diagnose_adapter(adapter)
    if plot is not None:
        from pera_lab.report.pictures import ratio_picture

        ratio_picture(adapter, plot)
    effects = None
    if effect and location.run is not None:
        effects = run_effects(location.run, examples=examples or 64)
    elif task is not None:
        effects = adapter_effects(location, task, examples=examples or 64)
    if json:
        derived = ("high_order_ratio", "square_ratio", "cross_ratio", "anchor_ratio", "stable_rank", "effective_rank")
        content = {
            "layers": {n: {**asdict(d), **{key: getattr(d, key) for key in derived}} for n, d in found.items()},
            **({"effect": asdict(effects)} if effects else {}),
        }
        if effects and effects.fullness:
            content["verdict"] = {"verdict": effects.fullness.verdict, "sentence": effects.fullness.sentence()}
        print_json(content)
        return
    out.print(_diagnosis(found, layers, adapter.is_pera))
    if effects is not None:
        out.print(_effects(effects))


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="One run folder, or several to compare.")],
    output: Annotated[
        Path | None, typer.Option(help="HTML file (default: report.html in the first run folder).")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write an HTML page about one run, or about several runs side by side."""
    from pera.errors import UserError
    from pera_lab.report.run import write_report
    from pera_lab.runs import Run

    for name in runs:
        if not os.path.isfile(Path(name) / "recipe.yaml"):
            raise UserError(f"{name!r} is not a run folder.")
    file = output or Path(runs[0]) / "report.html"
    write_report([Run(Path(name)) for name in runs], file)
    out.print(f"report written to {file}")


def chat(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN|ADAPTER|MODEL", help="Run folder, adapter folder, or folder or name of a model."),
    ],
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the answers of the base model and of the adapter side by side.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Sampling temperature; 0 always takes the most likely token (default: the base model's settings).",
        ),
    ] = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Chat with a model in the terminal."""
    from pera_lab.chat import chat as talk
    from pera_lab.opening import locate

    if temperature is not None and 0 < temperature < 0.01:
        raise typer.BadParameter(f"{temperature} should be 0 or at least 0.01.", param_hint="--temperature")
    location = locate(source, trust_remote_code=trust_remote_code)
    talk(location, out, compare=compare, max_new_tokens=max_new_tokens, temperature=temperature)


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Recipe to print (default: list them all).",
            autocompletion=shipped("recipes"),
        ),
    ] = None,
) -> None:
    """List the recipes that ship with pera, or print one to copy it."""
    _shipped("recipes", name, "train")


def studies(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="Study to print (default: list them all).", autocompletion=shipped("studies")
        ),
    ] = None,
) -> None:
    """List the studies that ship with pera, or print one to copy it."""
    _shipped("studies", name, "study run")


def _shipped(kind: Kind, name: str | None, command: str) -> None:
    known = shipped_files(kind)
    if name is None:
        table = Facts()
        for each in known:
            table.add_row(each, shipped_summary(kind, each))
        out.print(table)
        out.print(f"Copy one: pera {kind} {known[-1]} > mine.yaml, edit it, then: pera {command} mine.yaml")
    elif name in known:
        out.out(shipped_text(kind, name).rstrip("\n"), highlight=False)
    else:
        from pera.errors import UserError, nearest

        raise UserError(f"{name!r} does not ship with pera; {nearest(name, known)}")


def env(quiet: Quiet = False) -> None:
    """Print versions and hardware, for a bug report."""
    from pera_lab.environment import environment

    found = environment()
    for package, version in found.pop("versions").items():
        out.print(f"{package}: {version or 'not installed'}")
    for key, value in found.items():
        out.print(f"{key}: {value}")


def _diagnosis(found: dict[str, LayerDiagnosis], by_layer: bool, is_pera: bool) -> Table:
    from statistics import median

    from rich.measure import Measurement
    from rich.table import Table

    from pera_lab.diagnose import by_kind, place_layers

    common = os.path.commonprefix(list(found)).rpartition(".")[0] + "."  # noqa: RUF071
    groups = {name.removeprefix(common): [d] for name, d in found.items()}
    if not by_layer:
        groups = {
            kind: [layer.diagnosis for layer in members] for kind, members in by_kind(place_layers(found)).items()
        }
    caption = None if by_layer else "Medians over the layers of each kind; --layers shows every layer."
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", caption=caption, caption_justify="left")
    products = ("linear", "square", "cross", "ratio", "1·1ᵀ") if is_pera else ()
    anchored = any(d.anchors for d in found.values())
    of_anchors = ("anchors", "ratio of anchors") if anchored else ()
    table.add_column("layer" if by_layer else "kind", no_wrap=True)
    for column in ("‖ΔW‖", *products, *of_anchors, "rank ≤", "stable", "effective"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, layers in groups.items():
        keys = ("norm", "linear", "square", "cross") if is_pera else ("norm",)
        values = [f"{median(getattr(d, key) for d in layers):.3g}" for key in keys]
        if is_pera:
            values.append(f"{median(d.high_order_ratio for d in layers):.2g}")
            values.append(f"{median(d.ones_weight for d in layers):.0%}")
        if anchored:
            values += [f"{median(getattr(d, key) for d in layers):.3g}" for key in ("anchors", "anchor_ratio")]
        values.append(str(len(layers[0].singular_values)))
        values += [f"{median(getattr(d, key) for d in layers):.1f}" for key in ("stable_rank", "effective_rank")]
        table.add_row(visible(name if by_layer else f"{name} ({len(layers)})", inline=True), *values)
    table.width = Measurement.get(out, out.options.update(max_width=10_000), table).maximum  # names stay whole
    return table


def _effects(effects: Effects) -> Facts:
    table = Facts()
    table.add_row("loss with the adapter", f"{effects.loss:.4f} over {effects.tokens} labels of test rows")
    for part, change in effects.without.items():
        what = "anchors" if part == "anchors" else f"{part.replace('_', '-')} terms"
        table.add_row(f"without {what}", f"{change:+.5f}")
    if effects.at_rank_r is not None:
        table.add_row("every ΔW truncated to rank r, as a LoRA", f"{effects.at_rank_r:+.5f}")
    for group, change in effects.without_high_order.items():
        table.add_row(visible(f"without high-order terms in {group}", inline=True), f"{change:+.5f}")
    if (found := effects.fullness) is None:
        return table
    for rank, loss in found.loss_at_rank.items():
        table.add_row(f"every ΔW cut to rank {rank}" if rank else "without ΔW", f"{loss - found.loss:+.5f}")
    table.add_row("effective rank of ΔW", f"{found.effective_rank:.1f} of {found.rank}")
    if found.needed is not None:
        table.add_row("least rank for 95 % of the gain", str(found.needed))
    if (learned := found.learned) is not None:
        table.add_row("bits learned", f"{learned.bits:,.0f}, {learned.per_parameter:.2g} per trained parameter")
    else:
        table.add_row("bits learned", f"unknown. {found.not_learned}")
    table.add_row("verdict", found.sentence())
    return table
