"""What a language model writes after prompts, and how likely it finds given continuations."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int, num_beams: int = 1
) -> list[str]:
    """The answers to one batch of prompts, without sampling.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt.
        max_new_tokens: longest answer in tokens.
        num_beams: beams of the search; 1 is greedy.
    """
    batch: Any = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(next(model.parameters()).device)
    beams = {"num_beams": num_beams} if num_beams > 1 else {}
    output = model.generate(
        **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id, **beams
    )
    texts = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


class Branches(NamedTuple):
    """Continuations of one text."""

    shared: list[int]
    """Tokens that all continuations begin with."""
    start: int
    """Index in ``shared`` of the first token whose log-probability counts."""
    suffixes: list[list[int]]
    """The remaining tokens of each continuation."""


def common_length(sequences: list[list[int]]) -> int:
    """How many tokens all sequences begin with."""
    return next(
        (i for i, tokens in enumerate(zip(*sequences)) if len(set(tokens)) > 1),  # noqa: B905
        min(map(len, sequences)),
    )


@torch.no_grad()
def log_likelihoods(model: Any, tokenizer: PreTrainedTokenizerBase, batch: list[Branches]) -> list[list[float]]:
    """Log-probability of each continuation of each text, from its ``start`` on.

    One forward pass reads the shared tokens of each text. If every suffix is one token, as in "answer1" to "answer5",
    that is enough. Otherwise a second pass reads the suffixes with the cached keys and values.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        batch: the texts.
    """
    device = next(model.parameters()).device
    accepted = inspect.signature(_base(model).forward).parameters

    def padded(sequences: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
        found: Any = tokenizer.pad({"input_ids": sequences}, return_tensors="pt", padding_side=side)
        return found["input_ids"].to(device), found["attention_mask"].to(device)

    ids, mask = padded([b.shared for b in batch], "left")
    kept = max(len(b.shared) - b.start for b in batch) + 1
    longer = [(i, j) for i, b in enumerate(batch) for j, suffix in enumerate(b.suffixes) if len(suffix) > 1]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": bool(longer)}
    if "position_ids" in accepted:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = kept
    output = model(**inputs)
    logits = output.logits[:, -kept:].float().log_softmax(-1)
    found = []
    for row, b in zip(logits, batch, strict=True):
        label = b.shared[b.start :]
        own = sum(row[-len(label) - 1 + i, token].item() for i, token in enumerate(label))
        found.append([own + row[-1, suffix[0]].item() for suffix in b.suffixes])
    if longer:
        rest = [batch[i].suffixes[j] for i, j in longer]
        tail, tail_mask = padded([suffix[:-1] for suffix in rest], "right")
        rows = torch.tensor([i for i, _ in longer], device=device)
        cache = output.past_key_values
        cache.batch_select_indices(rows)
        inputs = {"input_ids": tail, "past_key_values": cache, "use_cache": True}
        inputs["attention_mask"] = torch.cat([mask[rows], tail_mask], 1)
        if "position_ids" in accepted:
            inputs["position_ids"] = mask[rows].sum(1, keepdim=True) + torch.arange(tail.shape[1], device=device)
        logits = model(**inputs).logits.float().log_softmax(-1)
        for (i, j), row, suffix in zip(longer, logits, rest, strict=True):
            found[i][j] += sum(row[k, token].item() for k, token in enumerate(suffix[1:]))
    return found


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
