"""How much an adapter remembers: bits of random facts per trainable parameter, in SmolLM2-135M.

    python benchmarks/memory.py PLAN [--output FOLDER] [--minutes M]   # resumes; one JSON line for each training

The facts are random, so the base knows nothing of the answers and each answer has a known number of bits:

- "phonebook": names and ten-digit numbers, PB32000.jsonl in ../shared/data/phonebook, log2(10) bits a digit.
- "generated": names and numbers of the same form, drawn from the seed.
- "codes": "The passphrase is: WORD WORD", answered by one of 64 words, 6 bits.
- "strings": random strings of 16 tokens over 2,048 tokens, 11 bits a token.

A run trains with Adam and a cosine schedule on all facts at once (or in minibatches) and is scored on the same facts.
The layers below the first adapted one are frozen, so their hidden states are computed once and kept. The adapters are
the methods' own PEFT layers on the base model's own modules. Bits stored = Σ (log2(number of equally likely answers) −
NLL / ln 2) over the answer tokens.
"""

from __future__ import annotations

import argparse
import math
import re
import time
import warnings
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bitsandbytes.functional import dequantize_nf4, quantize_nf4
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import memory_base
import memory_plans
from grid import Store, choose, fit, minibatches
from memory_facts import BASE, FACTS, Facts
from memory_methods import METHODS
from pera_lab.diagnose.factors import effective_rank
from pera_lab.models import load_model


@dataclass(frozen=True)
class Run:
    """One training. Two runs with equal fields are the same training."""

    facts: str
    count: int
    """Number of facts."""
    method: str
    r: int
    rate: float
    seed: int
    """Draws the facts and the initial weights."""
    site: str = "down"
    """What is adapted; a key of :data:`SITES`."""
    steps: int = 1600
    batch: int | None = None
    """Facts in a minibatch; None means all."""
    vocabulary: str = "answers"
    """What the softmax is over: "answers", the possible answers, or "whole"."""
    dtype: str = "float32"
    """Of the model and its arithmetic. "nf4" rounds the frozen matrices to NF4 and computes in float32."""
    weight_decay: float = 0.0
    dropout: float = 0.0
    """Of the adapter's input."""
    base: str = "pretrained"
    """"random" initializes the base model at random, so its hidden states carry no knowledge. "small" is the model of
    memory_base.py."""


class Site(NamedTuple):
    """What is adapted: a regular expression for module names, the first block with an adapter, and where it begins."""

    targets: str
    block: int
    begins: str
    """"down": with the block's down_proj; "mlp": with its MLP; "block": with its attention."""


def _mlp(blocks: str) -> str:
    return rf"model\.layers\.({blocks})\.mlp\.(gate|up|down)_proj"


SITES = {
    "down": Site(r"model\.layers\.29\.mlp\.down_proj", 29, "down"),
    "down-3": Site(r"model\.layers\.3\.mlp\.down_proj", 3, "down"),  # the last block of the small base
    "down-28": Site(r"model\.layers\.28\.mlp\.down_proj", 28, "mlp"),
    "mlp": Site(_mlp("29"), 29, "mlp"),
    "mlp-15": Site(_mlp("15"), 15, "mlp"),
    "mlp-last-4": Site(_mlp("26|27|28|29"), 26, "mlp"),
    "all": Site(r"model\.layers\.\d+\.(mlp|self_attn)\.\w+_proj", 0, "block"),
}


class Remembering(nn.Linear):
    """A frozen linear layer that keeps its output for one input."""

    seen: Tensor | None = None
    known: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x is not self.seen or self.weight.requires_grad:
            return super().forward(x)
        assert self.known is not None
        return self.known.clone()  # GraLoRA adds to it in place

    def remember(self, x: Tensor) -> None:
        with torch.no_grad():
            self.seen, self.known = x, super().forward(x)


def rotary(model: Any, width: int) -> Any:
    """The position embeddings of ``width`` tokens."""
    return model.model.rotary_emb(torch.empty(1, dtype=model.dtype), torch.arange(width).unsqueeze(0))


def entering(model: Any, site: Site, ids: Tensor) -> Tensor:
    """Hidden states where the first adapter of a site begins: entering the block, or after its attention."""
    positions, block = rotary(model, ids.shape[1]), model.model.layers[site.block]
    h = model.model.embed_tokens(ids)
    for layer in model.model.layers[: site.block]:
        h = layer(h, position_embeddings=positions)
    if site.begins == "block":
        return h
    attended, _ = block.self_attn(block.input_layernorm(h), position_embeddings=positions, attention_mask=None)
    return h + attended


class Subject:
    """The base model from the first adapted layer on, with the hidden states that enter it for given facts."""

    def __init__(self, facts: Facts, site: Site, model: Any) -> None:
        self.facts, self.site, self.model = facts, site, model
        self.layers = self.model.model.layers
        self.block = self.layers[site.block]
        rows = [q + a[:-1] for q, a in zip(facts.questions, facts.answers, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        self.labels = torch.tensor(facts.answers)
        first = torch.tensor([len(q) - 1 for q in facts.questions])
        self.places = first.unsqueeze(1) + torch.arange(self.labels.shape[1])  # of the tokens that predict an answer
        self.rotary = rotary(model, width)
        self.flat = site.block == len(self.layers) - 1 and site.begins != "block"
        candidates = torch.tensor(facts.candidates)
        self.index = torch.full((self.model.config.vocab_size,), -1)
        self.index[candidates] = torch.arange(len(candidates))
        self.head = (self.model.lm_head.weight[candidates] * self.model.model.norm.weight).contiguous()
        with torch.no_grad():
            self.hidden = torch.cat([entering(model, site, part) for part in ids.split(256)])
        self.input: Tensor | None = None
        if self.flat:
            self._keep_input()

    def _keep_input(self) -> None:
        """In the last block every position is on its own, so only those that predict an answer are kept."""
        places = self.places.unsqueeze(-1).expand(-1, -1, self.hidden.shape[-1])
        self.hidden = self.hidden.gather(1, places)
        mlp = self.block.mlp
        with torch.no_grad():
            x = self.block.post_attention_layernorm(self.hidden)
            if self.site.begins == "down":
                x = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        self.input = x

    def remember(self) -> None:
        """Keep the outputs of the frozen layers whose input is always the same."""
        if self.input is None:
            return
        mlp = self.block.mlp
        for layer in [mlp.down_proj] if self.site.begins == "down" else [mlp.gate_proj, mlp.up_proj]:
            layer.__class__ = Remembering
            layer.remember(self.input)

    def logits(self, rows: Tensor | None = None, *, whole: bool = False) -> Tensor:
        """Logits of the answer tokens, ``(facts, answer tokens, candidates)``, or over the whole vocabulary."""
        hidden = self.hidden if rows is None else self.hidden[rows]
        mlp = self.block.mlp
        if self.input is not None:
            x = self.input if rows is None else self.input[rows]
            h = hidden + (mlp.down_proj(x) if self.site.begins == "down" else mlp(x))
        else:
            h, rest = hidden, self.layers[self.site.block :]
            if self.site.begins == "mlp":
                h = h + mlp(self.block.post_attention_layernorm(h))
                rest = rest[1:]
            for layer in rest:
                h = layer(h, position_embeddings=self.rotary)
            places = self.places if rows is None else self.places[rows]
            h = h.gather(1, places.unsqueeze(-1).expand(-1, -1, h.shape[-1]))
        if whole:
            return self.model.lm_head(self.model.model.norm(h)).float()
        norm = self.model.model.norm  # RMSNorm, with its weight in the head and its division after the head: two passes
        mean_square = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square() / h.shape[-1]
        return (h @ self.head.T * (mean_square + norm.variance_epsilon).rsqrt()).float()

    def targets(self, rows: Tensor | None = None, *, whole: bool = False) -> Tensor:
        labels = self.labels if rows is None else self.labels[rows]
        return labels if whole else self.index[labels]

    def loss(self, rows: Tensor | None = None, *, whole: bool = False) -> Tensor:
        """Mean NLL of the answer tokens, nats."""
        return cross_entropy(self.logits(rows, whole=whole).flatten(0, 1), self.targets(rows, whole=whole).flatten())

    @torch.no_grad()
    def score(self, *, whole: bool) -> dict[str, float]:
        """Loss, bits stored, exact answers and tokens with p > 0.5. Teacher-forced argmax is greedy decoding when every
        token before was right, so a fact counts as recalled if all its tokens are the most likely ones."""
        nll, right, likely = 0.0, 0, 0
        for rows in torch.arange(len(self.labels)).split(64 if whole else len(self.labels)):
            log_p = self.logits(None if len(rows) == len(self.labels) else rows, whole=whole).log_softmax(-1)
            targets = self.targets(rows, whole=whole)
            token = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            nll -= float(token.double().sum())
            right += int((log_p.argmax(-1) == targets).all(-1).sum())
            likely += int((token > math.log(0.5)).sum())
        tokens = self.labels.numel()
        return {
            "loss": nll / tokens,
            "bits": self.facts.bits - nll / math.log(2),
            "recall": right / len(self.labels),
            "likely": likely / tokens,
        }


@cache
def base(dtype: str, weights: str = "pretrained") -> Any:
    """SmolLM2-135M or the small base, frozen; ``dtype`` and ``weights`` as in :class:`Run`."""
    name = str(memory_base.FOLDER) if weights == "small" else BASE
    model = load_model(name, dtype="float32" if dtype == "nf4" else dtype)
    if weights == "random":
        torch.manual_seed(0)
        model = type(model)(model.config).to(model.dtype)
    if dtype == "nf4":
        for layer in (m for m in model.model.layers.modules() if isinstance(m, nn.Linear)):
            layer.weight.data = dequantize_nf4(*quantize_nf4(layer.weight.data))
    return model.eval().requires_grad_(False)


def adapted_at(model: Any, site: Site) -> dict[str, nn.Linear]:
    """The linear layers of a site by their names."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(site.targets, n)}


@torch.no_grad()
def take_off(adapted: Any, layers: dict[str, nn.Linear], originals: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the adapter, restore the weights, and return ΔW of each layer. None if the weights were trained."""
    if adapted is not None:
        adapted.merge_adapter()
    deltas = {name: layer.weight.detach() - originals[name] for name, layer in layers.items()}
    if adapted is not None:
        adapted.unmerge_adapter()
        adapted.unload()
    for name, layer in layers.items():
        layer.weight.requires_grad_(False)
        layer.weight.copy_(originals[name])
    return deltas


class Spectra(dict[str, tuple[Tensor, Tensor, Tensor]]):
    """The singular value decompositions of each ΔW."""

    def __init__(self, deltas: dict[str, Tensor]) -> None:
        super().__init__((name, torch.linalg.svd(x.float(), full_matrices=False)) for name, x in deltas.items())

    def effective_rank(self) -> float:
        """Mean over the layers."""
        ranks = [effective_rank(S.double()) for _, S, _ in self.values()]
        return sum(ranks) / len(ranks)

    def cut(self, rank: int) -> dict[str, Tensor]:
        """Each ΔW cut to its leading directions."""
        return {name: U[:, :rank] * S[:rank] @ Vh[:rank] for name, (U, S, Vh) in self.items()}


def train(run: Run) -> dict[str, Any]:
    """Train and score one run."""
    subject = prepared(run)
    start = time.perf_counter()
    site, whole = subject.site, run.vocabulary == "whole"
    layers = adapted_at(subject.model, site)
    originals = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    torch.manual_seed(run.seed)
    method = METHODS[run.method]
    if method.config is None:
        adapted = None
        parameters = [layer.weight.requires_grad_() for layer in layers.values()]
        groups: list[dict[str, Any]] = [{"params": parameters, "lr": run.rate}]
    else:
        config = method.config(run.r, site.targets)
        if run.dropout:
            setattr(config, next(key for key in vars(config) if key.endswith("_dropout")), run.dropout)
        adapted = get_peft_model(subject.model, config).train(run.dropout > 0)
        method.prepare(adapted)
        named = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad]
        groups = [{"params": [p], "lr": run.rate * method.ratio(n)} for n, p in named]
        parameters = [p for _, p in named]
    optimizer = torch.optim.AdamW(groups, weight_decay=run.weight_decay)
    curve: list[float] = []

    def watch(step: int, loss: float) -> None:
        if step % max(1, run.steps // 20) == 0:
            curve.append(round(loss, 4))

    batches = [None] * run.steps if run.batch is None else minibatches(len(subject.labels), run.batch, run.steps)
    fit(optimizer, batches, run.steps, partial(subject.loss, whole=whole), watch)
    subject.model.eval()
    seconds = time.perf_counter() - start
    count = sum(p.numel() for p in parameters)
    scores = subject.score(whole=whole)
    found = {"parameters": count, **scores, "bits_per_parameter": scores["bits"] / count, "offered": subject.facts.bits}
    with torch.no_grad():
        if coefficients := [p for n, p in subject.model.named_parameters() if "pera_h" in n]:
            values = [p.clone() for p in coefficients]
            torch._foreach_zero_(coefficients)
            found["zeroed"] = subject.score(whole=whole)  # without products and anchors
            torch._foreach_copy_(coefficients, values)
        deltas = take_off(adapted, layers, originals)
        if math.isfinite(scores["loss"]):
            found |= _cuts(subject, originals, deltas, run.r, whole)
    return {**found, "curve": curve, "seconds": round(seconds, 1)}


def _cuts(
    subject: Subject, originals: dict[str, Tensor], deltas: dict[str, Tensor], r: int, whole: bool
) -> dict[str, Any]:
    """Effective rank of ΔW, and the scores with ΔW cut to r and 2 r directions and merged in bfloat16."""
    spectra = Spectra(deltas)

    def scored(weights: dict[str, Tensor]) -> dict[str, float]:
        for name, weight in weights.items():
            subject.model.get_submodule(name).weight.copy_(weight)
        subject.remember()
        return subject.score(whole=whole)

    found: dict[str, Any] = {"effective_rank": spectra.effective_rank()}
    for label, rank in (("cut_r", r), ("cut_2r", 2 * r)):
        found[label] = scored({name: originals[name] + near for name, near in spectra.cut(rank).items()})
    merged = {name: (originals[name] + deltas[name]).bfloat16().to(originals[name].dtype) for name in originals}
    found["merged_bfloat16"] = scored(merged)
    scored(originals)
    return found


@lru_cache(maxsize=16)
def _prepared(facts: str, count: int, seed: int, site: str, dtype: str, weights: str) -> Subject:
    return Subject(FACTS[facts](count, seed), SITES[site], base(dtype, weights))


def prepared(run: Run) -> Subject:
    """The subject of a run, ready to be trained."""
    subject = _prepared(run.facts, run.count, run.seed, run.site, run.dtype, run.base)
    subject.remember()
    return subject


def work(store: Store[Run], plan: memory_plans.Plan, minutes: float) -> bool:
    """Do what is left of a plan for so many minutes. Returns whether all is done."""
    end = time.monotonic() + 60 * minutes
    for cell in plan.cells():
        if time.monotonic() > end:
            return False
        run = Run(**cell, rate=0.0, seed=0)
        rate = plan.fixed.get(run.method) or choose(store, run, plan.rates, plan.choose, lambda x: x["bits"])
        for seed in plan.report:
            store.result(replace(run, rate=rate, seed=seed))
    return True


def main() -> None:
    torch.set_flush_denormal(True)  # gradients of factors near zero are otherwise several times slower
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", nargs="+", choices=sorted(memory_plans.PLANS))
    parser.add_argument("--output", type=Path, default=Path("memory"), help="folder of runs.jsonl (default: memory)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop before the next method after this time")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    store = Store(options.output, Run, train)
    for name in options.plan:
        done = work(store, memory_plans.PLANS[name], options.minutes)
        print(f"{name}: {'done' if done else 'stopped; the same command resumes'}")


if __name__ == "__main__":
    main()
