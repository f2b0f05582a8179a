"""From example to tokens: the chat template, and a loss mask that leaves only the answer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from pera.tasks.base import Example

IGNORED = -100
"""Label of a token that takes no part in the loss (PyTorch's ``ignore_index``)."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a user's message up to where the model's answer begins."""
    return encode_chat(tokenizer, [{"role": "user", "content": prompt}])


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the model's next answer begins, in the model's chat template; without
    one, the messages line by line."""
    if tokenizer.chat_template is None:
        ids: list[int] = tokenizer("".join(f"{m['content']}\n" for m in messages)).input_ids
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def encode_example(tokenizer: PreTrainedTokenizerBase, example: Example) -> dict[str, Any]:
    """``input_ids``, ``attention_mask`` and ``labels`` of prompt, answer and end-of-sequence token; the loss is
    on the answer and the end-of-sequence token only."""
    prompt = encode_prompt(tokenizer, example.prompt)
    answer = [*tokenizer(example.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return {
        "input_ids": prompt + answer,
        "attention_mask": [1] * (len(prompt) + len(answer)),
        "labels": [IGNORED] * len(prompt) + answer,
    }


class AnswerCollator:
    """Batches encoded examples for a causal language model, padded on the left so that answers end together.

    A vocabulary is large and an answer short, so logits are asked for at the answers only, if the model
    can be asked. Loss and gradients are those of the whole sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        self._pad = DataCollatorForSeq2Seq(tokenizer, padding=True)
        self._accepted = inspect.signature(model.forward).parameters

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask``, ``position_ids`` ``(batch, length)`` and ``labels`` ``(batch, kept)``
        with ``logits_to_keep``, the positions that are kept: the longest answer and one before it."""
        batch = dict(self._pad(examples))
        if "position_ids" in self._accepted:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in self._accepted:
            length = batch["labels"].shape[1]
            first = int((batch["labels"] != IGNORED).int().argmax(1).min())
            # Positions, not a count: indexing with them gives the contiguous states a matrix product wants.
            batch["logits_to_keep"] = torch.arange(first - 1, length)
            batch["labels"] = batch["labels"][:, first - 1 :]
        return batch
