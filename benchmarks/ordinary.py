"""Do anchors help where nothing has to be stored? Ordinary tasks at the site of benchmarks/memory.py.

    python benchmarks/ordinary.py [TASK ...] [--output FOLDER] [--data ../shared/data]   # resumes; one JSON line a run
    python benchmarks/ordinary.py gsm8k family_relationships --site mlp --dtype float32  # three matrices at r = 1

SmolLM2-135M with an adapter on down_proj of the last block, as in the test of docs/results/memory.md, or on the three
matrices of its MLP. The answer is one token after a prompt (GLUE), every token of a solution (GSM8K), or every token of
a word (the family relationships of reasoning-gym). All layers below are frozen, so the inputs of the site are computed
once and kept. The softmax is over the tokens that occur in answers.

A run draws its training rows, their order and its initial weights from its seed. Rates are chosen by the loss on
held-out training rows. Reported runs are scored on the validation set.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from sklearn.metrics import matthews_corrcoef
from torch import Tensor
from torch.nn.functional import cross_entropy

from grid import Store, choose, fit, minibatches
from memory import SITES, Spectra, adapted_at, base, entering, take_off
from memory_facts import CHOOSING, tokenizer
from memory_methods import METHODS
from memory_plans import FRESH
from pera_lab.tasks.examples import Splits
from pera_lab.tasks.reasoning import ReasoningTask

BLOCK = SITES["down"].block
"""All adapters are in the MLP of this block, the last one."""
TESTED = ("lora", "anchors-16", "hira", "pera-rms")
RANKS = (1, 2, 4)
SEEDS = (1, 2, 3, 4, 5)
RATES = {"hira": (0.0316, 0.1, 0.316, 1.0), "full": (1e-5, 3.16e-5, 1e-4, 3.16e-4)}
"""The first grid of a method; all others start from ``USUAL``. A best rate at an edge extends it."""
USUAL = (1e-3, 3.16e-3, 0.01, 0.0316)
ROWS = 4000
"""Training rows (GSM8K: tokens) that a seed draws."""
HELD_OUT = 1000
STEPS = 600
BATCH = 128
CURVE = (0, 25, 50, 100, 200, 400)
"""After how many steps a run is scored, in addition to the end."""


@dataclass(frozen=True)
class Run:
    """One training. Two runs with equal fields are the same training."""

    task: str
    method: str
    r: int
    rate: float
    seed: int
    site: str = "down"
    """"down" or "mlp", as in :data:`memory.SITES`."""
    dtype: str = "bfloat16"
    """Of the frozen layers below the site, which is in float32."""


class Prompted(NamedTuple):
    """A task whose answer is one word after a prompt."""

    prompt: Callable[[dict[str, Any]], str]
    answers: tuple[str, str]
    """Of label 0 and label 1."""


GLUE = {
    "sst2": Prompted(lambda row: f"Review: {row['sentence']}\nSentiment:", (" negative", " positive")),
    "cola": Prompted(lambda row: f"Sentence: {row['sentence']}\nGrammatical:", (" no", " yes")),
    "mrpc": Prompted(lambda row: f"{row['sentence1']}\n{row['sentence2']}\nSame meaning:", (" no", " yes")),
    "qnli": Prompted(lambda row: f"{row['question']}\n{row['sentence']}\nAnswered:", (" yes", " no")),
}
FAMILY = "family_relationships"
"""A task of the reasoning recipes, with families of three or four, as in the recipe quickstart."""
TASKS = (*GLUE, "gsm8k", FAMILY)
AGAIN = "gsm8k-again"
"""The second test: GSM8K with other test problems, fresh seeds, r = 1, and the rates that "gsm8k" chose."""


def texts(task: str, part: str, data: Path) -> Iterator[tuple[str, str]]:
    """Prompts and answers of the training or the test rows."""
    if task in GLUE:
        file = data / "glue" / task / {"train": "train.jsonl", "test": "validation.jsonl"}[part]
        for row in map(json.loads, file.read_text().splitlines()):
            yield GLUE[task].prompt(row), GLUE[task].answers[row["label"]]
    elif task == FAMILY:
        for example in getattr(_families(), part):
            yield f"Question: {example.prompt}\nAnswer:", f" {example.answer}"
    else:
        for row in map(json.loads, (data / "gsm8k" / f"{part}.jsonl").read_text().splitlines()):
            yield f"{row['question']}\n", row["answer"]


@cache
def _families() -> Splits:
    sizes = {f"{part}_size": rows.stop for part, rows in LIMIT.items()}
    return ReasoningTask(name=FAMILY, options={"min_family_size": 3, "max_family_size": 4}, **sizes).build()


class Inputs(NamedTuple):
    """What enters the site for tokens to predict: ``(tokens, in_features)``, the residual stream, and the tokens."""

    x: Tensor
    residual: Tensor
    labels: Tensor

    def rows(self, index: Tensor) -> Inputs:
        return Inputs(*(part[index] for part in self))


LIMIT = {"train": slice(6000), "test": slice(2000)}
"""Rows of a task that are used, in an order drawn with a fixed seed (GSM8K: 300 and 60 problems)."""
PROBLEMS = {"train": slice(300), "test": slice(60)}
USED = {"gsm8k": PROBLEMS, AGAIN: {**PROBLEMS, "test": slice(60, 120)}}


@torch.no_grad()
def inputs(task: str, part: str, data: Path, dtype: str) -> Inputs:
    """The inputs of the site for every answer token of a task, computed in ``dtype``."""
    model = base(dtype)
    rows = list(texts(task, part, data))
    random.Random(0).shuffle(rows)
    rows = rows[USED.get(task, LIMIT)[part]]
    encoded = []
    for prompt, answer in rows:
        p, a = (tokenizer()(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
        encoded.append((p[-256:], a[:1] if task in GLUE else a))
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i][0]) + len(encoded[i][1]))
    found: dict[int, Inputs] = {}
    block = model.model.layers[BLOCK]
    for part_of in torch.tensor(order).split(32):
        chosen = [encoded[i] for i in part_of.tolist()]
        width = max(len(p) + len(a) for p, a in chosen) - 1
        ids = torch.tensor([(p + a[:-1]) + [0] * (width - len(p) - len(a) + 1) for p, a in chosen])
        h = entering(model, SITES["down"], ids)
        inner = block.post_attention_layernorm(h)
        x = block.mlp.act_fn(block.mlp.gate_proj(inner)) * block.mlp.up_proj(inner)
        for i, row, (p, a) in zip(part_of.tolist(), range(len(chosen)), chosen, strict=True):
            places = slice(len(p) - 1, len(p) + len(a) - 1)
            found[i] = Inputs(x[row, places].float(), h[row, places].float(), torch.tensor(a))
    return Inputs(*(torch.cat(parts) for parts in zip(*(found[i] for i in range(len(rows))), strict=True)))


@cache
def kept(task: str, part: str, data: Path, folder: Path, dtype: str) -> Inputs:
    """:func:`inputs`, kept in a file."""
    file = folder / f"{task}-{part}-{dtype}.pt"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(tuple(inputs(task, part, data, dtype)), file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
    return Inputs(*torch.load(file))


class Subject:
    """The site and the head of the base, for the inputs of a task."""

    def __init__(self, task: str, site: str, data: Path, folder: Path, dtype: str) -> None:
        self.model, self.site = base("float32"), SITES[site]
        self.train, self.test = (kept(task, part, data, folder, dtype) for part in ("train", "test"))
        candidates = torch.cat([self.train.labels, self.test.labels]).unique()
        self.index = torch.full((self.model.config.vocab_size,), -1)
        self.index[candidates] = torch.arange(len(candidates))
        self.head = self.model.lm_head.weight[candidates]
        other = "gsm8k" if task in GLUE else "sst2"
        self.other = kept(other, "test", data, folder, dtype).rows(torch.arange(500))

    def split(self, seed: int) -> tuple[Inputs, Inputs]:
        """Training rows and the rows that are scored. Rates are chosen on the first rows, reported on the others."""
        count = len(self.train.labels)
        if seed >= CHOOSING:
            chosen = torch.arange(HELD_OUT, min(count, HELD_OUT + ROWS))
            return self.train.rows(chosen), self.train.rows(torch.arange(HELD_OUT))
        draw = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return self.train.rows(draw[: min(ROWS, count - HELD_OUT)]), self.test

    def states(self, rows: Inputs) -> Tensor:
        block = self.model.model.layers[BLOCK]
        down = self.site.begins == "down"
        change = block.mlp.down_proj(rows.x) if down else block.mlp(block.post_attention_layernorm(rows.residual))
        return self.model.model.norm(rows.residual + change)

    def logits(self, rows: Inputs) -> Tensor:
        return self.states(rows) @ self.head.T

    def loss(self, rows: Inputs) -> Tensor:
        return cross_entropy(self.logits(rows), self.index[rows.labels])

    @torch.no_grad()
    def score(self, rows: Inputs) -> dict[str, float]:
        """Mean NLL in nats, accuracy, and Matthews' correlation of the answers."""
        logits, labels = self.logits(rows), self.index[rows.labels]
        answers = logits.argmax(-1)
        return {
            "loss": float(cross_entropy(logits, labels)),
            "accuracy": float((answers == labels).double().mean()),
            "matthews": float(matthews_corrcoef(labels, answers)),
        }

    @torch.no_grad()
    def elsewhere(self) -> Tensor:
        """Log-probabilities of the whole vocabulary on texts of another kind, ``(tokens, vocabulary)``."""
        return self.model.lm_head(self.states(self.other)).log_softmax(-1)


def train(run: Run, subject: Subject) -> dict[str, Any]:
    """Train and score one run."""
    start = time.perf_counter()
    rows, scored = subject.split(run.seed)
    layers = adapted_at(subject.model, subject.site)
    originals = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    before = subject.elsewhere()
    torch.manual_seed(run.seed)
    method = METHODS[run.method]
    adapted = None
    if method.config is None:
        parameters = [layer.weight.requires_grad_() for layer in layers.values()]
    else:
        adapted = get_peft_model(subject.model, method.config(run.r, subject.site.targets))
        method.prepare(adapted)
        parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=run.rate, weight_decay=0.0)
    curve: dict[int, float] = {}

    def watch(step: int, _: float) -> None:
        if step in CURVE:
            curve[step] = subject.score(scored)["loss"]

    batches = minibatches(len(rows.labels), BATCH, STEPS)
    fit(optimizer, batches, STEPS, lambda batch: subject.loss(rows.rows(batch)), watch)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in parameters), **subject.score(scored)}
    found |= {"train_loss": subject.score(rows)["loss"], "curve": curve}
    after = subject.elsewhere()
    found["forgetting"] = float((before.exp() * (before - after)).sum(-1).mean())
    deltas = take_off(adapted, layers, originals)
    if math.isfinite(found["loss"]):
        spectra = Spectra(deltas)
        found["effective_rank"] = spectra.effective_rank()
        with torch.no_grad():
            for name, near in spectra.cut(run.r).items():
                layers[name].weight.copy_(originals[name] + near)
            found["cut_r"] = subject.score(scored)["loss"]
            for name, layer in layers.items():
                layer.weight.copy_(originals[name])
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def chosen_rate(store: Store[Run], run: Run) -> float:
    """The rate with the smallest held-out loss for the task, method and rank of ``run``."""
    return choose(store, run, RATES.get(run.method, USUAL), [CHOOSING], lambda x: -x["loss"])


AT_ONE = (*((method, 1) for method in TESTED), ("lora", 2))
"""Methods of a test at r = 1. LoRA of r = 2 shows what a second row is worth."""


def second_test(store: Store[Run], dtype: str) -> None:
    """Run the second test."""
    for method, r in AT_ONE:
        rate = chosen_rate(store, Run("gsm8k", method, r, 0.0, 0, dtype=dtype))
        for seed in FRESH:
            store.result(Run(AGAIN, method, r, rate, seed, dtype=dtype))


def three_matrices(store: Store[Run], task: str, dtype: str) -> None:
    """Run the test with the adapter on the three matrices of the MLP."""
    for method, r in AT_ONE:
        run = Run(task, method, r, 0.0, 0, "mlp", dtype)
        rate = chosen_rate(store, run)
        for seed in SEEDS:
            store.result(replace(run, rate=rate, seed=seed))


def main() -> None:
    torch.set_flush_denormal(True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="*", choices=(*TASKS, AGAIN), default=TASKS)
    parser.add_argument(
        "--output", type=Path, default=Path("ordinary"), help="folder of runs.jsonl (default: ordinary)"
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--site", choices=("down", "mlp"), default="down", help="mlp: the test of three matrices")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the frozen layers below the site"
    )
    options = parser.parse_args()
    if options.site == "mlp" and AGAIN in options.task:
        parser.error(f"--site mlp: {AGAIN} is a test of one matrix; leave it out.")
    for task in options.task:
        subject = Subject(task, options.site, options.data, options.output / "inputs", options.dtype)
        store = Store(options.output, Run, partial(train, subject=subject))
        if options.site == "mlp":
            three_matrices(store, task, options.dtype)
            continue
        if task == AGAIN:
            second_test(store, options.dtype)
            continue
        for method, r in [*((method, r) for r in RANKS for method in TESTED), ("full", 1)]:
            run = Run(task, method, r, 0.0, 0, dtype=options.dtype)
            rate = chosen_rate(store, run)
            if method == "lora":
                of_lora = rate
            for seed in SEEDS:
                store.result(replace(run, rate=rate, seed=seed))
                if method in ("anchors-16", "pera-rms"):  # learning curves at LoRA's own rate
                    store.result(replace(run, rate=of_lora, seed=seed))


if __name__ == "__main__":
    main()
