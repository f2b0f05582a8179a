"""Do two models answer alike? Both run the same prompts, and their logits are compared token by token."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pera import models
from pera.errors import UserError
from pera.files import write_json
from pera.runs import Location, locate, open_model
from pera.tasks.prompts import encode_prompt

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 1.0}
"""Largest logit difference that rounding explains in a model computed in this dtype (docs/architecture.md)."""

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "If a train leaves at nine and arrives at noon, how long does it take?",
    "Translate to Spanish: good morning.",
    "Name three animals that live in Africa.",
    "Explain in a few words why the sky is blue.",
)
"""Asked when the model's own task is not known."""


@dataclass(frozen=True)
class Agreement:
    """How far two models agree over the tokens of some prompts."""

    prompts: int
    tokens: int
    max_difference: float
    """Largest absolute difference of two logits."""
    tolerance: float
    dtype: str
    near_ties: int
    """Tokens whose two best logits lie closer together than the tolerance, so that rounding may swap them."""
    same_top1: float
    """Share of the other tokens for which both models would say the same."""
    kl_divergence: float
    """Mean over the tokens of KL(reference ‖ other) between the distributions of the next token, in nats."""

    @property
    def agree(self) -> bool:
        """Whether the difference is within the tolerance and every token that is no near-tie is the same."""
        return self.max_difference <= self.tolerance and self.same_top1 == 1.0

    def sentence(self) -> str:
        """The result in one line."""
        return (
            f"largest logit difference {self.max_difference:.1e} (tolerance {self.tolerance:g}, {self.dtype}), "
            f"{100 * self.same_top1:.1f} % of top-1 tokens equal over {self.tokens} tokens"
            + (f", near-ties ({self.near_ties}) apart" if self.near_ties else "")
            + f", KL divergence {self.kl_divergence:.1e}"
        )

    def save(self, folder: Path, of: str, against: str, **further: Any) -> None:
        """Write the result, and what else is known, to ``verification.json`` in ``folder``."""
        record = {"of": of, "against": against, "agree": self.agree, **asdict(self), **further}
        write_json(folder / "verification.json", record)


def verify(a: str, b: str, *, dtype: str = "float32") -> Agreement:
    """Compare two of: run folder, adapter folder (of any PEFT method), model. B is judged against A.

    Args:
        a, b: what :func:`pera.runs.locate` takes.
        dtype: what both are computed in, a key of :data:`pera.models.DTYPES`.

    Raises:
        UserError: one of them cannot be opened, or their vocabularies differ.
    """
    first, second = locate(a), locate(b)
    asked = prompts_of(first, second)
    reference = logits(*open_model(first, dtype), asked)
    return compare(reference, logits(*open_model(second, dtype), asked), models.DTYPES[dtype])


def prompts_of(*locations: Location, count: int = 6) -> list[str]:
    """Held-out prompts of the task of the first run among ``locations``; else :data:`PROMPTS`."""
    for location in locations:
        if location.run is not None:
            return [example.prompt for example in location.run.recipe.build_task().test[:count]]
    return list(PROMPTS[:count])


@torch.no_grad()
def logits(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[Tensor]:
    """Logits of every token of every prompt, one ``(tokens, vocabulary)`` tensor each, in float32 on the CPU."""
    device = next(model.parameters()).device
    results = []
    for prompt in prompts:
        ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=device)
        results.append(model(input_ids=ids).logits[0].float().cpu())
    return results


def compare(reference: list[Tensor], other: list[Tensor], dtype: torch.dtype) -> Agreement:
    """Compare the :func:`logits` of two models that were computed in ``dtype``.

    Raises:
        UserError: the shapes differ, as with different tokenizers or vocabularies.
    """
    for a, b in zip(reference, other, strict=True):
        if a.shape != b.shape:
            raise UserError(
                f"the two models cannot be compared: logits of shapes {tuple(a.shape)} and {tuple(b.shape)}."
            )
    tolerance = TOLERANCE[dtype]
    x, y = torch.cat(reference), torch.cat(other)
    best = x.topk(2, dim=-1).values
    clear = (best[:, 0] - best[:, 1]) > tolerance
    same = x.argmax(-1) == y.argmax(-1)
    difference = (x - y).abs().max().item()
    divergence = sum(_divergence(a, b) for a, b in zip(reference, other, strict=True)) / len(x)
    if difference != difference:  # NaN, of which argmax says nothing
        same, clear = torch.zeros(1), torch.ones(1, dtype=torch.bool)
        difference = divergence = float("inf")
    return Agreement(
        prompts=len(reference),
        tokens=len(x),
        max_difference=difference,
        tolerance=tolerance,
        dtype=str(dtype).removeprefix("torch."),
        near_ties=int((~clear).sum()),
        same_top1=same[clear].float().mean().item() if clear.any() else 1.0,
        kl_divergence=divergence if divergence == divergence else float("inf"),
    )


def _divergence(reference: Tensor, other: Tensor) -> float:
    """Σ over the tokens of one prompt of Σ p log (p / q), in float64; rounding below zero counts as zero."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return max(0.0, torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item())
