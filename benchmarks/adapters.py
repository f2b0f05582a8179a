"""Time and memory of PERA next to PEFT's LoRA, DoRA and HiRA, measured in one run.

    python benchmarks/adapters.py --output FILE.json                  # or `make bench`: everything, about an hour
    python benchmarks/adapters.py --only "short steps"                # steps of 16, 64, 256 and 1,024 tokens, merging
    python benchmarks/adapters.py --only "short steps" --other DIR    # next to the operator of another checkout

Candidates share one frozen base and take turns in every round. A ratio is taken within a round; its median and
quartiles over the rounds are reported next to the ratio of the arithmetic (benchmarks/cost.py). Adapters compute in the
dtype of the base, so the figures compare operators, not casts.
"""

from __future__ import annotations

import copy
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import peft
import safetensors.torch
import torch
import transformers
import typer
from peft import PeftModel, get_peft_model_state_dict
from rich.console import Console
from rich.table import Table
from torch import nn

import cost
from measure import against, interleaved, peak_bytes, saved_bytes
from pera_lab.environment import device
from pera_lab.models import DTYPES, load_model
from subjects import BASE, Candidate, Subject, candidates, others, shapes, shared

LAYERS = ((4096, 4096, 2048), (14336, 4096, 512), (576, 576, 1024), (1536, 576, 1024))
"""out_features, in_features, tokens"""
SHORT_LAYERS = ((64, 64), (576, 576), (1536, 576))
SHORT_STEPS = (16, 64, 256, 1024)
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]

PERA = "pera r=8"
DECODING = (BASE, "lora r=4", "lora r=8", PERA, f"{PERA}, merged")

console = Console(width=200)


def main(
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("build/bench/adapters.json"),
    dtype: Annotated[tuple[str, str], typer.Option(help="float32, bfloat16, float16.")] = ("float32", "bfloat16"),
    rounds: Annotated[int, typer.Option(help="Rounds of a language model; layers take three times as many.")] = 7,
    only: Annotated[str, typer.Option(help="Measure only subjects whose name starts with this.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens of a training step of the language model.")] = 1024,
    candidate: Annotated[
        list[str] | None, typer.Option(help="Measure only this candidate and its baseline. Repeatable.")
    ] = None,
    other: Annotated[Path | None, typer.Option(help="Checkout whose operator joins the short steps.")] = None,
) -> None:
    """Measure all subjects, print a table for each, and write each result to the file at once."""
    torch.manual_seed(0)
    short = [*candidates(ranks=(8,), neighbours=(), variants=()), *others(other)]
    results: dict[str, Any] = {"environment": environment(), "subjects": {}}
    subjects: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in dtype:
        for m, n, T in LAYERS:
            full = candidates(ranks=(4, 8, 16, 32), neighbours=(4, 8, 16), variants=(8, 16))
            subjects[f"layer {m} x {n}, {T} tokens, {name}"] = partial(
                layer, m, n, T, DTYPES[name], 3 * rounds, only_these(full, candidate)
            )
        full = candidates(ranks=(4, 8, 16), neighbours=(8,), variants=(8,))
        subjects[f"smollm2-135m, {tokens} tokens, {name}"] = partial(
            language_model, name, tokens, rounds, only_these(full, candidate)
        )
        for T in SHORT_STEPS:
            for m, n in SHORT_LAYERS:
                subjects[f"short steps, layer {m} x {n}, {T} tokens, {name}"] = partial(
                    layer, m, n, T, DTYPES[name], 30 * rounds, short
                )
            subjects[f"short steps, smollm2-135m, {T} tokens, {name}"] = partial(
                language_model, name, T, rounds, short, decodes=False
            )
    for title, measure in subjects.items():
        if title.startswith(only):
            results["subjects"][title] = rows = measure()
            print_table(title, rows)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(results, indent=1) + "\n")


def layer(m: int, n: int, tokens: int, dtype: torch.dtype, rounds: int, found: list[Candidate]) -> dict[str, Any]:
    """Measure one ``nn.Linear`` in the middle of a model: its input needs a gradient."""
    base = nn.Sequential()
    base.add_module("layer", nn.Linear(n, m, bias=False, dtype=dtype, device=device()))
    x = torch.randn(tokens, n, dtype=dtype, device=device(), requires_grad=True)
    gradient = torch.randn(tokens, m, dtype=dtype, device=device())

    def step(model: nn.Module) -> None:
        model(x).backward(gradient)
        x.grad = None
        model.zero_grad()

    return compare(Subject(base, ["layer"], tokens, lambda model: model(x), step), found, rounds)


def language_model(
    dtype: str, tokens: int, rounds: int, found: list[Candidate], decodes: bool = True
) -> dict[str, Any]:
    """Measure SmolLM2-135M: a training step with AdamW, a forward, and with ``decodes`` token-by-token generation."""
    base = load_model("smollm2-135m", dtype=dtype)
    ids = torch.randint(base.config.vocab_size, (4, tokens // 4), device=base.device)
    optimizers: dict[nn.Module, torch.optim.Optimizer] = {}

    def forward(model: nn.Module) -> Any:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def step(model: nn.Module) -> None:
        if model not in optimizers:
            optimizers[model] = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5)
        forward(model).backward()
        optimizers[model].step()
        optimizers[model].zero_grad()

    def decode(model: nn.Module) -> None:
        model.generate(input_ids=ids[:1, :8], max_new_tokens=32, min_new_tokens=32, do_sample=False)

    return compare(Subject(base, TARGETS, tokens, forward, step, decode if decodes else None), found, rounds)


def only_these(found: list[Candidate], names: list[str] | None) -> list[Candidate]:
    """Return the candidates with these names, the base and their baselines; all candidates without names."""
    if not names:
        return found
    if unknown := set(names) - {c.name for c in found}:
        raise typer.BadParameter(f"{unknown.pop()!r} is none of {', '.join(c.name for c in found)}")
    wanted = {BASE, PERA, *names}
    wanted |= {c.baseline for c in found if c.name in wanted}
    return [c for c in found if c.name in wanted]


def compare(subject: Subject, found: list[Candidate], rounds: int) -> dict[str, Any]:
    """Measure all candidates on one base, and return the figures by candidate."""
    subject.base.requires_grad_(False)
    models = {c.name: c.adapt(shared(subject.base), subject.targets) for c in found}
    own = {p.untyped_storage().data_ptr() for p in subject.base.parameters()}
    rows: dict[str, Any] = {
        c.name: {"baseline": c.baseline, "rank": c.rank, "flops": flops(subject, c.rank)} for c in found
    }
    trained = {name: model.train() for name, model in models.items() if name != BASE}
    record("train", rows, interleaved({n: partial(subject.step, m) for n, m in trained.items()}, rounds))
    for name, model in trained.items():
        rows[name]["saved_bytes"] = saved_bytes(partial(subject.forward, model), own)
        rows[name]["peak_bytes"] = peak_bytes(partial(subject.step, model))
        rows[name]["file_bytes"] = file_bytes(model)
    merging = {n: partial(merge_and_unmerge, m) for n, m in trained.items() if hasattr(m, "merge_adapter")}
    record("merge", rows, interleaved(merging, rounds))
    for row in rows.values():
        for key in ("saved_bytes", "peak_bytes", "file_bytes"):
            if key in row:
                row[f"{key}_ratio"] = row[key] / rows[row["baseline"]][key]

    merged = f"{PERA}, merged"
    adapted = next(c for c in found if c.name == PERA).adapt(copy.deepcopy(subject.base), subject.targets)
    models[merged] = adapted.merge_and_unload()
    rows[merged] = {"baseline": BASE, "rank": 0, "flops": flops(subject, 0)}
    for model in models.values():
        model.eval()
    record("forward", rows, interleaved({n: partial(evaluate, subject.forward, m) for n, m in models.items()}, rounds))
    if subject.decode is not None:
        decoding = {name: partial(evaluate, subject.decode, models[name]) for name in DECODING}
        record("decode", rows, interleaved(decoding, rounds))
    return rows


def file_bytes(model: Any) -> int:
    """Return the size of the weights file of an adapter; for a model without PEFT, of what it trains."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else trained
    return len(safetensors.torch.save({name: weight.detach().contiguous() for name, weight in weights.items()}))


def merge_and_unmerge(model: Any) -> None:
    """Merge the adapter into the base, and take it out again."""
    model.merge_adapter()
    model.unmerge_adapter()


def evaluate(call: Callable[[nn.Module], Any], model: nn.Module) -> None:
    """Call ``call`` without gradients."""
    with torch.no_grad():
        call(model)


def flops(subject: Subject, rank: int) -> dict[str, int]:
    """Return the figures of the cost model for a base with adapters of rank K = ``rank``."""
    matrices = shapes(subject.base, subject.targets, rank)
    size = next(subject.base.parameters()).element_size()
    return {
        "train": cost.training_flops(matrices, subject.tokens),
        "forward": cost.forward_flops(matrices, subject.tokens),
        "merge": cost.merging_flops(matrices),
        "decode": cost.forward_bytes(matrices, 1, size),
    }


def record(kind: str, rows: dict[str, Any], seconds: dict[str, list[float]]) -> None:
    """Add the ratios of one kind of measurement to ``rows``, with their bounds."""
    for name in seconds:
        row, baseline = rows[name], rows[rows[name]["baseline"]]
        bound = row["flops"][kind] / baseline["flops"][kind]
        row[kind] = {**against(seconds, name, row["baseline"])._asdict(), "bound": bound}


def print_table(title: str, rows: dict[str, Any]) -> None:
    """Print the ratios over the baseline: median [quartiles] (bound)."""
    kinds = [kind for kind in ("train", "forward", "decode", "merge") if any(kind in row for row in rows.values())]
    table = Table(title=title, title_justify="left")
    for heading in ("", "K", "over", *kinds, "saved for backward", "peak memory", "file"):
        table.add_column(heading, justify="left" if heading in ("", "over") else "right")
    for name, row in rows.items():
        cells = [
            "{ratio:.3f} [{low:.3f}, {high:.3f}] ({bound:.3f})".format(**row[kind]) if kind in row else "–"
            for kind in kinds
        ]
        memory = [
            f"{row[key] / 2**20:.3g} MiB, {row[f'{key}_ratio']:.3f}" if key in row else "–"
            for key in ("saved_bytes", "peak_bytes", "file_bytes")
        ]
        table.add_row(name, str(row["rank"]), row["baseline"], *cells, *memory)
    console.print(table)


def environment() -> dict[str, Any]:
    """Return the command, the commit, the hardware and the versions behind the figures."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
    }


if __name__ == "__main__":
    typer.run(main)
