"""The commands that convert an adapter and compare models: merge, export, import, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pera_lab.cli.console import out, print_agreement, print_json
from pera_lab.cli.options import Dtype, Json, Output, Quiet, Source, Trust


def merge(
    source: Source,
    output: Output,
    dtype: Annotated[Dtype | None, typer.Option(help="dtype of the merged model (default: the base model's).")] = None,
    dequantise: Annotated[
        bool, typer.Option("--dequantise", help="Dequantise a quantised base model first and write a plain model.")
    ] = False,
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge an adapter into its base model and check that the outputs agree."""
    from pera_lab.convert.merge import merge as merge_adapter
    from pera_lab.opening import locate_adapter

    location = locate_adapter(source, trust_remote_code=trust_remote_code)
    agreement = merge_adapter(location, output, dtype=dtype or "stored", dequantised=dequantise)
    how = " (base model dequantised first)" if dequantise else ""
    print_agreement(agreement, f"merged model written to {output}{how}", {"output": str(output)} if json else None)


def export(
    source: Source,
    output: Output,
    to: Annotated[
        Literal["lora", "gguf", "mlx"] | None,
        typer.Option(help="Format to write (default: the format of the --for server)."),
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option(help="Truncate every layer to this rank and report what is lost (default: exact).")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Truncate every layer to the least rank that keeps this share of ‖ΔW‖² (default: exact)."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="Check the limits of a server and print its start command: vllm, sglang, lorax, llama.cpp, ollama, "
            "mlx, mistralrs or peft (default: none).",
        ),
    ] = None,
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter of PERA, LoHa, VeRA and others as the equivalent LoRA, and check that the outputs agree."""
    if to is None and server is None:
        raise typer.BadParameter("give --to lora, --to gguf, --to mlx or --for SERVER.", param_hint="--to")
    from dataclasses import asdict

    from pera.errors import CheckFailed
    from pera_lab.convert.export import export as export_adapter
    from pera_lab.opening import locate_adapter

    location = locate_adapter(source, trust_remote_code=trust_remote_code)
    done = export_adapter(location, output, to=to, max_rank=max_rank, energy=energy, server=server)
    if json:
        truncation = None if done.truncation is None else asdict(done.truncation)
        written = {"output": str(output), "base": done.base and str(done.base), "form": done.form}
        content = {**written, "good": done.good, "start": done.start}
        print_json({**content, "truncation": truncation, "agreement": done.agreement.record()})
    else:
        kinds = {"lora": "LoRA", "gguf": "GGUF adapter", "mlx": "MLX adapter"}
        out.print(f"{kinds[done.form]} written to {output}")
        if done.base:
            out.print(f"base model with what was trained as a whole written to {done.base}")
        if done.truncation:
            out.print(done.truncation.sentence())
        out.print(done.agreement.sentence())
        if done.good and done.start:
            out.print(f"start: {done.start}")
    if not done.good:
        raise CheckFailed("the outputs differ.")


def import_(
    source: Source,
    output: Output,
    form: Annotated[
        Literal["lora", "mlx"], typer.Option("--from", help="The adapter to import: a LoRA of PEFT, or one of mlx-lm.")
    ],
    terms: Annotated[
        Literal["all", "square", "cross", "none"], typer.Option(help="Products that the PERA adapter can learn.")
    ] = "all",
    normalization: Annotated[
        Literal["rms", "centred", "none"] | None,
        typer.Option(
            help="Normalization of the products; rms gives each product the scale of one factor (default: rms)."
        ),
    ] = None,
    anchors: Annotated[
        int, typer.Option(min=0, help="Frozen rows whose crosses with the learned rows the adapter can learn.")
    ] = 0,
    anchor_seed: Annotated[int, typer.Option(min=0, help="Seed of the frozen rows.")] = 0,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Write a trained LoRA as a PERA adapter with the same outputs (h = 0), as a start for further training."""
    from pera_lab.convert.from_lora import import_lora
    from pera_lab.opening import locate_adapter

    location = locate_adapter(source, trust_remote_code=trust_remote_code)
    agreement = import_lora(
        location, output, form=form, terms=terms, normalization=normalization, anchors=anchors, anchor_seed=anchor_seed
    )
    print_agreement(agreement, f"PERA adapter written to {output}")


def verify(
    a: Annotated[
        str, typer.Argument(metavar="A", help="Reference: run, adapter, GGUF adapter or model (folder or name).")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Model to compare with A: any of the same kinds.")],
    dtype: Annotated[Dtype, typer.Option(help="dtype that both models compute in.")] = "float32",
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with one prompt per line (default: prompts of the run's task).")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model of a GGUF adapter, such as a .gguf file (default: the base of the other side)."),
    ] = None,
    llama_cpp: Annotated[
        bool, typer.Option("--llama-cpp", help="Compute B in llama.cpp (default: transformers). Needs xllamacpp.")
    ] = False,
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the same prompts through two models and compare their outputs."""
    from pera_lab.convert.verify import verify as compare_models

    agreement = compare_models(
        a, b, dtype=dtype, prompts=prompts, base=base, in_llama_cpp=llama_cpp, trust_remote_code=trust_remote_code
    )
    print_agreement(agreement, f"{b} against {a}", {"a": a, "b": b} if json else None)
