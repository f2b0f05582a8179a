"""What benchmarks/gpu.sh runs: correctness, cost over LoRA, decoding and two short trainings on one GPU.

Each section writes its rows to gpu.json and its table to gpu.md as soon as it ends. A section that fails is reported in
its place and the others run. The exit code is 1 if one failed or something is not right.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig
from transformers.utils.import_utils import is_bitsandbytes_available

import cost
import reference
from grid import environment, fit, minibatches
from measure import against, interleaved, peak_bytes
from pera import PeraConfig, pera_linear
from pera.anchors import draw_anchors
from pera.polynomial import num_coefficients
from subjects import BASE, Candidate, candidates, shapes, shared

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Row = dict[str, Any]


class Size(NamedTuple):
    """What is measured."""

    hidden: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    batch: tuple[int, int]
    """Sequences and tokens of a training step."""
    rounds: int
    decoded: int
    """New tokens of the decoding."""
    facts: int
    """Facts that the trainings store."""
    steps: int
    backend: str
    """Of torch.compile."""

    def model(self, **options: Any) -> Any:
        """A Llama of these shapes with random weights, frozen, in bfloat16."""
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            **{"num_hidden_layers": self.layers, **options},
            bos_token_id=None,
            eos_token_id=None,
        )
        with DEVICE:
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)

    def ids(self) -> Tensor:
        return torch.randint(self.vocabulary, self.batch, device=DEVICE)


SIZES = {
    "7b": Size(4096, 11008, 32, 32, 32000, (16, 256), 10, 64, 256, 300, "inductor"),
    "tiny": Size(64, 96, 2, 4, 96, (2, 16), 2, 4, 8, 12, "aot_eager"),
}
"""The shapes of Llama 2 7B, and tiny ones, without the minutes of the compiler."""


def operator(_: Size, __: Path | None) -> Iterator[Row]:
    """The operator and its gradients against the equation in float64, ‖found − expected‖ / ‖expected‖.

    The last row of a dtype is two matrix products, as in LoRA.
    """
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        for terms, normalization, k in (
            ("all", "none", 0),
            ("all", "rms", 0),
            ("all", "centred", 0),
            ("square", "rms", 0),
            ("cross", "rms", 4),
            ("none", "none", 4),
            (None, "none", 0),
        ):
            errors = operator_errors(dtype, terms, normalization, k)
            yield {
                "dtype": str(dtype).removeprefix("torch."),
                "terms": terms or "LoRA",
                "normalization": normalization,
                "anchors": k,
                **errors,
                "right": all(error <= limit for error in errors.values()),
            }


def operator_errors(dtype: torch.dtype, terms: Any, normalization: Any, k: int) -> dict[str, float]:
    """Relative errors of y and the gradients. ``terms`` None stands for two matrix products."""
    r, m, n, tokens = 8, 192, 256, 96
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coefficients = num_coefficients(r, terms, k) if terms else 1
    drawn = draw(tokens, n), draw(r, n) / n**0.5, draw(m, r), draw(coefficients), draw(tokens, m)
    *inputs, gradient = (t.to(dtype).double() for t in drawn)  # both sides get the same numbers
    anchors = draw_anchors(k, 0, "layer", m, n)

    x, A, B, h = exact = [t.clone().requires_grad_() for t in inputs]
    by_pair = reference.by_pair(h, r, terms, anchors) if terms else {}
    expected = x @ reference.delta_weight(A, B, by_pair, normalization, anchors=anchors).T
    expected.backward(gradient)

    x, A, B, h = found = [t.to(DEVICE, dtype).requires_grad_() for t in inputs]
    if terms is None:
        y = nn.functional.linear(nn.functional.linear(x, A), B)
    else:
        there = anchors and anchors.to(DEVICE)
        y = pera_linear(x, A, B, h, terms=terms, normalization=normalization, anchors=there)
    y.backward(gradient.to(DEVICE, dtype))
    pairs = {"y": (y, expected)}
    pairs |= {f"∂{of}": (f.grad, e.grad) for of, f, e in zip("xABh", found, exact, strict=True) if e.grad is not None}
    return {of: relative(*pair) for of, pair in pairs.items()}


def models(size: Size, _: Path | None) -> Iterator[Row]:
    """Logits of a small model in float32 against the same model under autocast, compiled, and merged."""
    tiny = SIZES["tiny"]
    base, ids = tiny.model().float(), tiny.ids()
    for candidate in adapters((8,)):
        model = candidate.adapt(copy.deepcopy(base), LINEAR).eval()
        with torch.no_grad():
            exact = model(ids).logits
            with torch.autocast(DEVICE.type, torch.bfloat16):
                found = {"autocast to bfloat16": model(ids).logits}
            graphs = compile_blocks(model, size.backend)
            found["compiled"] = model(ids).logits
            count = graphs()
            merged = candidate.adapt(copy.deepcopy(base), LINEAR).eval()
            merged.load_state_dict(model.state_dict())
            found["merged"] = merged.merge_and_unload()(ids).logits
        errors = {name: relative(logits, exact.double().cpu()) for name, logits in found.items()}
        limits = {"autocast to bfloat16": 3e-2, "compiled": 1e-4, "merged": 1e-4}
        right = all(errors[name] <= limit for name, limit in limits.items())
        yield {"adapter": candidate.name, **errors, "graphs": count, "right": right and count > 0}


def eager(size: Size, _: Path | None) -> Iterator[Row]:
    """A training step of the whole model: forward, backward and AdamW."""
    yield from steps(size, size.model(), adapters((4, 8, 16), neighbours=(8,)))


def compiled(size: Size, _: Path | None) -> Iterator[Row]:
    """The same with every block compiled by torch.compile."""
    yield from steps(size, size.model(), adapters((4, 8, 16)), compiles=True)


def quantized(size: Size, _: Path | None) -> Iterator[Row]:
    """The same on a base in nf4, with a quarter of the blocks."""
    if not is_bitsandbytes_available():
        raise Skipped("bitsandbytes is not installed")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        size.model(num_hidden_layers=max(1, size.layers // 4)).save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=options, dtype=torch.bfloat16, device_map={"": DEVICE}
        )
    yield from steps(size, base.requires_grad_(False), adapters((8,)))


def steps(size: Size, base: Any, found: list[Candidate], compiles: bool = False) -> Iterator[Row]:
    """Time and peak memory of training steps on one shared base. Memory is above what the weights take."""
    ids = size.ids()
    models = {c.name: c.adapt(shared(base), LINEAR).train() for c in found}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        for name, model in models.items()
    }

    def step(name: str) -> None:
        models[name](input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    graphs = {}
    for name, model in models.items() if compiles else ():
        count = compile_blocks(model, size.backend)
        step(name)
        graphs[name] = count()
    calls = {name: partial(step, name) for name in models}
    seconds = interleaved(calls, size.rounds, warm_up=2)
    peaks = {name: peak_bytes(call) for name, call in calls.items()}
    for c in found:
        timing = against(seconds, c.name, c.baseline)
        flops = [cost.training_flops(shapes(base, LINEAR, rank), ids.numel()) for rank in (c.rank, baseline(c, found))]
        yield {
            "adapter": c.name,
            "K": c.rank,
            "ms": 1e3 * timing.seconds,
            "over LoRA": timing.ratio,
            "quartiles": f"{timing.low:.3f} to {timing.high:.3f}",
            "by FLOPs": flops[0] / flops[1],
            "peak MiB": peaks[c.name] / 2**20,
            "peak over LoRA": peaks[c.name] / peaks[c.baseline],
            **({"graphs": graphs[c.name], "right": graphs[c.name] > 0} if compiles else {}),
        }


def baseline(candidate: Candidate, found: list[Candidate]) -> int:
    """K of the LoRA that a candidate is divided by."""
    return next(c.rank for c in found if c.name == candidate.baseline)


def decoding(size: Size, _: Path | None) -> Iterator[Row]:
    """Token-by-token generation of one sequence after 8 tokens, with a key-value cache."""
    base, ids = size.model(), size.ids()[:1, :8]
    found = adapters((8,))
    models = {BASE: base, **{c.name: c.adapt(shared(base), LINEAR).eval() for c in found}}
    merged = next(c for c in found if c.name == "pera r=8").adapt(copy.deepcopy(base), LINEAR)
    models["pera r=8, merged"] = merged.merge_and_unload()

    def decode(model: Any) -> None:
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=size.decoded,
                min_new_tokens=size.decoded,
                do_sample=False,
                pad_token_id=0,
            )

    seconds = interleaved({name: partial(decode, model) for name, model in models.items()}, max(2, size.rounds // 2))
    for name in models:
        over = against(seconds, name, "lora r=8")
        tokens = size.decoded / over.seconds
        yield {
            "adapter": name,
            "tokens/s": tokens,
            "time over LoRA": over.ratio,
            "quartiles": f"{over.low:.3f} to {over.high:.3f}",
            "time over base": against(seconds, name, BASE).ratio,
        }


def training(size: Size, folder: Path | None) -> Iterator[Row]:
    """Two trainings of a real model: random six-digit numbers of invented names, one rate, untuned."""
    if folder is None:
        raise Skipped("--model was not given")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "el", "in", "or")]
    names = ["".join(draw.sample(syllables, 3)).capitalize() for _ in range(size.facts)]
    questions = [tokenizer(f"{name}:", add_special_tokens=False)["input_ids"] for name in names]
    answers = [tokenizer(f"{draw.randrange(10**6):06}", add_special_tokens=False)["input_ids"] for _ in names]
    width = max(len(q) + len(a) for q, a in zip(questions, answers, strict=True))
    rows = [(q + a, [-100] * len(q) + a) for q, a in zip(questions, answers, strict=True)]
    ids, labels = (
        torch.tensor([row[part] + [fill] * (width - len(row[part])) for row in rows], device=DEVICE)
        for part, fill in ((0, 0), (1, -100))
    )
    for name, config in (("lora r=4", LoraConfig(r=4, lora_alpha=4)), ("pera r=4", PeraConfig(r=4))):
        torch.manual_seed(0)
        config.target_modules = set(LINEAR)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)
        model: Any = get_peft_model(base, config)
        losses: list[float] = []

        def loss(batch: Tensor, model: Any = model) -> Tensor:
            return model(input_ids=ids[batch], labels=labels[batch], use_cache=False).loss  # type: ignore[no-any-return]

        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
        start = time.perf_counter()
        batches = minibatches(len(rows), 64, size.steps)
        fit(optimizer, batches, size.steps, loss, lambda _, value, losses=losses: losses.append(value))  # type: ignore[misc]
        seconds = time.perf_counter() - start
        with torch.no_grad():
            predicted = torch.cat([model(input_ids=part, use_cache=False).logits.argmax(-1) for part in ids.split(64)])
        known = ((predicted[:, :-1] == labels[:, 1:]) | (labels[:, 1:] == -100)).all(-1)
        yield {
            "adapter": name,
            "first loss": losses[0],
            "last loss": losses[-1],
            "facts known, %": 100 * float(known.double().mean()),
            "tokens/s": size.steps * min(64, len(rows)) * width / seconds,
            "right": losses[-1] < losses[0],
        }


SECTIONS = {f.__name__: f for f in (operator, models, eager, compiled, quantized, decoding, training)}


class Skipped(Exception):
    """A section that this machine cannot run, and why."""


def adapters(ranks: tuple[int, ...], neighbours: tuple[int, ...] = ()) -> list[Candidate]:
    """LoRA, PERA and PERA with anchors of the ranks; for ``neighbours`` also LoRA of rank K, DoRA and HiRA."""
    kept = {"lora", "pera", "dora", "hira"} if neighbours else {"lora", "pera"}
    found = candidates(ranks=ranks, neighbours=neighbours or (8,), variants=())
    return [c for c in found if c.name.split()[0] in kept and (neighbours or "(K" not in c.name)]


def compile_blocks(model: Any, backend: str) -> Callable[[], int]:
    """Compile each block of a model. Returns a function that counts the graphs compiled since.

    The blocks share their graphs: one for the first block, whose input needs no gradient, and one for all others. Past
    its limit of recompilations torch would run eagerly; here it fails.
    """
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    before = counters["stats"]["unique_graphs"]
    for block in model.get_base_model().model.layers:
        block.compile(backend=backend)
    return lambda: int(counters["stats"]["unique_graphs"] - before)


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found.detach().double().cpu() - expected.detach()).norm() / expected.detach().norm())


def table(rows: list[Row]) -> list[str]:
    """The lines of a table in Markdown."""
    heads = list(rows[0])
    values = [[row.get(head, "–") for head in heads] for row in rows]
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in line] for line in values]
    return ["| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *cells)]


def page(results: dict[str, Any]) -> str:
    """The report in Markdown."""
    about = results["environment"]
    lines = ["# PERA on a GPU", "", f"`{about['command']}`, commit {about['commit'] or 'unknown'}, {about['device']}, "]
    lines[-1] += ", ".join(f"{name} {version}" for name, version in about["versions"].items()) + "."
    for name, section in results["sections"].items():
        lines += ["", f"## {name}", "", " ".join((SECTIONS[name].__doc__ or "").split()), ""]
        lines += table(section["rows"]) if section["rows"] else []
        lines += [f"Skipped: {section['skipped']}."] if section["skipped"] else []
        lines += ["", f"Failed: `{section['failed']}`"] if section["failed"] else []
        lines += ["", f"{section['seconds']:.0f} s."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="folder of gpu.json and gpu.md (default: gpu)")
    parser.add_argument("--size", choices=SIZES, default="7b", help="shapes of the model (default: 7b)")
    parser.add_argument("--model", type=Path, help="folder of a real model for the section training")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS), help="sections to run")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    command = shlex.join(["sh", "benchmarks/gpu.sh", *sys.argv[1:]])
    about = {"command": command, "device": device, **environment()}
    about["versions"] |= {"transformers": transformers.__version__}
    results: dict[str, Any] = {"environment": about, "sections": {}}
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        torch.manual_seed(0)
        start = time.perf_counter()
        section: dict[str, Any] = {"rows": [], "skipped": None, "failed": None}
        try:
            for row in SECTIONS[name](SIZES[options.size], options.model):
                section["rows"].append(row)
        except Skipped as reason:
            section["skipped"] = str(reason)
        except Exception as error:  # the other sections must not lose their time on the machine
            traceback.print_exc()
            section["failed"] = f"{type(error).__name__}: {error}"
        results["sections"][name] = section | {"seconds": time.perf_counter() - start}
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        (options.output / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.output / "gpu.md").write_text(page(results))
    print(page(results))
    sections = results["sections"].values()
    wrong = [row for section in sections for row in section["rows"] if not row.get("right", True)]
    return int(bool(wrong) or any(section["failed"] for section in sections))


if __name__ == "__main__":
    sys.exit(main())
