"""From example to tokens: how a prompt is put to the model, and a loss mask that leaves only the answer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jinja2 import TemplateError
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from pera.errors import UserError

if TYPE_CHECKING:
    from pera_lab.tasks.base import Example, Labelled, Task

IGNORED = -100
"""Label of a token that takes no part in the loss (PyTorch's ``ignore_index``)."""


class Frame(NamedTuple):
    """How a prompt is put to the model, and what of the example the loss is on."""

    text: str | None = None
    """The words around ``{prompt}``, ending with the response marker; None is the model's chat template."""
    loss: Literal["answer", "all"] = "answer"
    """On the answer only, or on the prompt as well; prompt and answer are then one text to the tokenizer."""
    end: bool = True
    """Whether the end-of-sequence token is learned."""


CHAT = Frame()


class Prompt(NamedTuple):
    """Token ids of a prompt, and whether something was cut from it."""

    ids: list[int]
    text: str
    """What the user says in it."""
    shortened: bool


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, frame: Frame = CHAT) -> list[int]:
    """Token ids of a user's message up to where the model's answer begins."""
    if frame.text is None:
        return encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    return _unended(tokenizer, frame.text.replace("{prompt}", prompt))


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the model's next answer begins, in the model's chat template; without
    one, the messages line by line.

    Raises:
        UserError: the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        return _unended(tokenizer, "".join(f"{m['content']}\n" for m in messages))
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        roles, reason = ", ".join(m["role"] for m in messages), " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"messages of the roles {roles} are refused by the model's chat template: {reason}; give others."
        ) from error
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _unended(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text).input_ids
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_question(
    tokenizer: PreTrainedTokenizerBase, example: Example, frame: Frame, max_length: int | None = None
) -> Prompt:
    """The prompt of an example, in its frame.

    One of more than ``max_length`` tokens loses the oldest turns of a conversation, two at a time, and then the
    beginning of what the user says; never the frame, whose end is the response marker, nor the end of the question,
    where options stand.
    """
    earlier = list(example.messages[:-1])

    def encode(text: str) -> list[int]:
        if example.messages:
            return encode_chat(tokenizer, [*earlier, {**example.messages[-1], "content": text}])
        return encode_prompt(tokenizer, text, frame)

    ids = encode(example.prompt)
    if max_length is None or len(ids) <= max_length:
        return Prompt(ids, example.prompt, False)
    kept = int(bool(earlier) and earlier[0]["role"] == "system")
    while len(ids) > max_length and len(earlier) > kept:
        del earlier[kept : kept + 2]
        ids = encode(example.prompt)
    if len(ids) <= max_length:
        return Prompt(ids, example.prompt, True)
    low, high = 0, len(example.prompt)  # the fewest characters to take off
    while low < high:
        middle = (low + high) // 2
        if len(encode(example.prompt[middle:])) <= max_length:
            high = middle
        else:
            low = middle + 1
    text = example.prompt[low:]
    return Prompt(encode(text), text, True)


def encode_answered(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, frame: Frame, answer: str
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of an answer to it, as they are trained on: as one text, where the loss is on all."""
    if frame.loss == "all" and frame.text is not None:
        ids = _unended(tokenizer, frame.text.replace("{prompt}", prompt.text) + answer)
        return [], ids
    return prompt.ids, list(tokenizer(answer, add_special_tokens=False).input_ids)


def encode_example(tokenizer: PreTrainedTokenizerBase, example: Example, frame: Frame = CHAT) -> dict[str, Any]:
    """``input_ids``, ``attention_mask`` and ``labels`` of prompt, answer and end-of-sequence token; the loss is
    on the answer and the end-of-sequence token only, or on everything, as the frame says."""
    prompt, answer = encode_answered(tokenizer, encode_question(tokenizer, example, frame), frame, example.answer)
    answer = [*answer, *([tokenizer.eos_token_id] if frame.end else [])]
    ids = prompt + answer
    labels = list(ids) if frame.loss == "all" else [IGNORED] * len(prompt) + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, row: Labelled, max_length: int | None, *, real: bool
) -> tuple[dict[str, Any], bool]:
    """The tokens of one text or of a pair, the longer of which is cut to fit, with ``labels``, and whether it was
    cut."""
    encoded = dict(tokenizer(*row.texts, truncation=max_length is not None, max_length=max_length))
    cut = len(encoded["input_ids"]) == max_length and len(tokenizer(*row.texts).input_ids) > max_length
    return {**encoded, "labels": float(row.label) if real else int(row.label)}, cut


class Encoded(NamedTuple):
    """Encoded examples, how many were left out as too long, and how many were cut."""

    rows: list[dict[str, Any]]
    left_out: int
    shortened: int


def encode_task(
    task: Task, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Any], max_length: int | None = None
) -> Encoded:
    """Examples of a task as what its model takes, with ``labels``. Those above ``max_length`` tokens are left out where
    the model should write, because the answer stands at the end, and cut where it should classify."""
    if task.labels is not None:
        pairs = [encode_texts(tokenizer, row, max_length, real=task.labels == 1) for row in examples]
        return Encoded([encoded for encoded, _ in pairs], 0, sum(cut for _, cut in pairs))
    frame: Frame = task.frame  # type: ignore[attr-defined]
    encoded = [encode_example(tokenizer, example, frame) for example in examples]
    rows = [e for e in encoded if max_length is None or len(e["input_ids"]) <= max_length]
    return Encoded(rows, len(encoded) - len(rows), 0)


def task_collator(task: Task, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Any:
    """What makes batches of :func:`encode_task`'s rows."""
    return AnswerCollator(tokenizer, model) if task.labels is None else DataCollatorWithPadding(tokenizer)


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
            first = max(1, int((batch["labels"] != IGNORED).int().argmax(1).min()))
            # Positions, not a count: indexing with them gives the contiguous states a matrix product wants.
            batch["logits_to_keep"] = torch.arange(first - 1, length)
            batch["labels"] = batch["labels"][:, first - 1 :]
        return batch
