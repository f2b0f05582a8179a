"""From examples to token ids: how a prompt is presented to the model, and which tokens the loss is on."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from pera.errors import UserError
from pera_lab.inference import end_token, packed, takes_padding, text_of
from pera_lab.tasks.conversations import fitted, render, with_reply
from pera_lab.tasks.examples import Example
from pera_lab.tasks.sources import HALF

IGNORED = -100
"""Label of a token that the loss ignores (PyTorch's ``ignore_index``)."""


CHARACTERS = 256
"""Characters of a text that are tokenized for each token that fits. What is left out of a longer text would not fit."""


class Frame(NamedTuple):
    """How a prompt is presented to the model, and which part of an example the loss is on."""

    text: str | None = None
    """Text around ``{prompt}``, ending with the response marker. None is the model's chat template."""
    loss: Literal["answer", "all"] = "answer"
    """"answer": the loss is on the answer. "all": also on the prompt; prompt and answer are then tokenized as one
    text."""
    end: bool = True
    """Whether the end-of-sequence token is learned."""


CHAT = Frame()
PLAIN = Frame("{prompt}")
"""The answer follows the prompt, with nothing around them."""


class Prompt(NamedTuple):
    """Token ids of a prompt, the user's text in it, and whether the prompt was truncated."""

    ids: list[int]
    text: str
    shortened: bool


class Encoded(NamedTuple):
    """Rows of token ids, the number of examples left out as too long, and the number of truncated examples."""

    rows: Sequence[dict[str, Any]]
    left_out: int
    shortened: int
    largest: int | None = None
    """The largest token id, if it is known."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, frame: Frame = CHAT) -> list[int]:
    """Token ids of a user's message, up to the beginning of the model's answer."""
    if frame.text is None:
        return encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    return _without_end(tokenizer, frame.text.replace("{prompt}", prompt))


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()
) -> list[int]:
    """Token ids of a conversation in the model's chat template, up to the beginning of the model's next answer. Without
    a template the messages are lines of text.

    Raises:
        UserError: the template rejects the messages, or they hold half of a surrogate pair.
    """
    text = render(tokenizer, messages, tools)
    if half := HALF.search(text):
        raise UserError(f"the messages hold {half[0]!r}, half of a surrogate pair, which is not valid text; remove it.")
    if tokenizer.chat_template is None:
        return _without_end(tokenizer, text)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _without_end(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text).input_ids
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_question(
    tokenizer: PreTrainedTokenizerBase, example: Example, frame: Frame, max_length: int | None = None
) -> Prompt:
    """The prompt of an example in its frame.

    A prompt longer than ``max_length`` first loses the oldest turns of its conversation, each from a user's message to
    the next, and then the beginning of the last message's text. It keeps the frame, which ends with the response
    marker, and the end of the question, where the options are.

    Args:
        tokenizer: the tokenizer of the model.
        example: the example.
        frame: how its prompt is presented. Messages always use the chat template.
        max_length: longest prompt in tokens.

    Raises:
        UserError: the chat template rejects the messages, or leaves out a part of them.
    """
    example = fitted(tokenizer, example)
    earlier = list(example.messages[:-1])

    def encode(text: str) -> list[int]:
        if example.messages:
            last = {**example.messages[-1], "content": text}
            return encode_chat(tokenizer, [*earlier, last], example.tools)
        return encode_prompt(tokenizer, text, frame)

    if max_length is None:
        return Prompt(encode(example.prompt), example.prompt, False)
    most = CHARACTERS * max(max_length, 0)
    question = example.prompt[max(len(example.prompt) - most, 0) :]

    def fits() -> list[int] | None:
        if sum(len(message["content"]) for message in earlier) + len(question) > most:
            return None
        return ids if len(ids := encode(question)) <= max_length else None

    ids = fits()
    if ids is not None and question == example.prompt:
        return Prompt(ids, question, False)
    kept = int(bool(earlier) and earlier[0]["role"] == "system")
    while ids is None:
        roles = [message["role"] for message in (*earlier, *example.messages[-1:])]
        if "user" not in roles[kept + 1 :]:
            break
        del earlier[kept : roles.index("user", kept + 1)]
        ids = fits()
    if ids is not None:
        return Prompt(ids, question, True)
    if sum(len(message["content"]) for message in earlier) > most:
        raise UserError(
            f"{example.place or 'messages'}: the messages before the last are longer than the {max_length} tokens that "
            "fit; shorten them."
        )
    low, high = 0, len(question)  # bisect the smallest number of characters to remove
    while low < high:
        middle = (low + high) // 2
        if len(encode(question[middle:])) <= max_length:
            high = middle
        else:
            low = middle + 1
    text = question[low:]
    return Prompt(encode(text), text, True)


def encode_answered(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, frame: Frame, answer: str
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of an answer to it, as in training.

    Args:
        tokenizer: the tokenizer of the model.
        prompt: the prompt from :func:`encode_question`.
        frame: its frame. If the loss is on all tokens, prompt and answer are one text, and the first list is empty.
        answer: the text of the answer.
    """
    if frame.loss == "all" and frame.text is not None:
        ids = _without_end(tokenizer, frame.text.replace("{prompt}", prompt.text) + answer)
        return [], ids
    return prompt.ids, list(tokenizer(answer, add_special_tokens=False).input_ids)


def encode_example(tokenizer: PreTrainedTokenizerBase, example: Example, frame: Frame = CHAT) -> dict[str, Any]:
    """``input_ids``, ``attention_mask`` and ``labels`` of prompt, answer and end token.

    Args:
        tokenizer: the tokenizer of the model.
        example: the example with its answer.
        frame: how the prompt is presented, and which tokens have labels other than :data:`IGNORED`.

    Raises:
        UserError: the end of the answer is to be learned, and the tokenizer has no token for it.
    """
    example = with_reply(tokenizer, example)
    prompt, answer = encode_answered(tokenizer, encode_question(tokenizer, example, frame), frame, example.answer)
    if frame.end:
        if (end := end_token(tokenizer)) is None:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no end of sequence to teach after an answer; set "
                "eos_token in its tokenizer_config.json."
            )
        answer = [*answer, end]
    ids = prompt + answer
    labels = list(ids) if frame.loss == "all" else [IGNORED] * len(prompt) + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def as_written(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str | None]:
    """What a model writes that has learned each text: its tokens, decoded.

    A tokenizer may normalize Unicode, case or spaces. Then a model cannot write the text itself. None stands for a text
    that has unknown or special tokens, which leave out a part of it. A very long text is returned as it is.
    """
    lost = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}

    def written(text: str) -> str | None:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return None if lost.intersection(ids) else text_of(tokenizer, ids)

    return [text if len(text) > _VERY_LONG else written(text) for text in texts]


_VERY_LONG = 1_000_000
"""Characters of an answer that no model here writes."""


def as_scored(tokenizer: PreTrainedTokenizerBase, example: Example) -> Example:
    """The example with the answer that a right output equals. Outputs have no special tokens, so neither has a call."""
    if not example.reply:
        return example
    example = with_reply(tokenizer, example)
    ids = tokenizer(example.answer, add_special_tokens=False).input_ids
    return replace(example, answer=text_of(tokenizer, ids))


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int | None
) -> tuple[dict[str, Any], bool]:
    """Token ids of one text or of a pair, and whether it was truncated.

    Args:
        tokenizer: the tokenizer of the model.
        texts: one text, or two. Of two, the longer one is truncated first.
        max_length: longest row in tokens.
    """
    if max_length is None:
        return dict(tokenizer(*texts)), False
    parts = [text[: CHARACTERS * max_length] for text in texts]
    encoded = dict(tokenizer(*parts, truncation=True, max_length=max_length))
    cut = len(encoded["input_ids"]) == max_length and len(tokenizer(*parts).input_ids) > max_length
    return encoded, cut or parts != list(texts)


class PaddingCollator(DataCollatorWithPadding):
    """Makes batches for a classifier, padded at the end or the beginning as its tokenizer says."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        super().__init__(tokenizer)
        self._model = model

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of rows; raises UserError as :func:`check_lengths`."""
        check_lengths(self._model, features)
        return super().__call__(features)


def check_lengths(model: PreTrainedModel, rows: Sequence[dict[str, Any]]) -> None:
    """Check that rows can be in one batch.

    Raises:
        UserError: they have several lengths, and padding changes what the model computes.
    """
    lengths = sorted({len(row["input_ids"]) for row in rows})
    if len(lengths) > 1 and not takes_padding(model):
        raise UserError(
            f"padding changes what {type(model).__name__} computes, so rows of {lengths[0]} and {lengths[-1]} tokens "
            "cannot share a batch."
        )


def count_labels(labels: torch.Tensor) -> int:
    """The labels in a batch that the loss is on: all of a classifier's ``(batch,)``, or a language model's ``(batch,
    length)`` without :data:`IGNORED` and without the first column, which no token predicts."""
    return int((labels[:, 1:] != IGNORED).sum()) if labels.dim() == 2 else len(labels)


class AnswerCollator:
    """Makes batches for a causal language model, padded on the left so that the answers end together.

    A vocabulary is large and an answer is short. The batch therefore asks for logits of the answers only, if the model
    has ``logits_to_keep``. Loss and gradients are the same as for whole sequences.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        self._pad, self._model = DataCollatorForSeq2Seq(tokenizer, padding=True), model
        self._accepted = inspect.signature(model.forward).parameters

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask``, ``position_ids`` ``(batch, length)``, ``labels`` ``(batch, kept)``, and
        ``logits_to_keep`` with the kept positions: the longest answer and the token before it.

        Raises:
            UserError: the rows have several lengths, and padding changes what the model computes.
        """
        check_lengths(self._model, examples)
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


class PackingCollator:
    """Makes batches for a causal language model without padding: one row, in which each example attends to itself.

    A loss on the answers and its gradients are the same as for rows with padding.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._accepted = inspect.signature(model.forward).parameters

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """``input_ids`` and ``position_ids`` ``(1, tokens)``, ``labels`` ``(1, kept)``, and ``logits_to_keep`` as from
        :class:`AnswerCollator`, for each example."""
        batch = packed([example["input_ids"] for example in examples], self._accepted)
        labels: list[int] = []
        kept: list[int] = []
        for example in examples:
            start, own = len(labels), [IGNORED, *example["labels"][1:]]  # no token of the example predicts its first
            first = next((i for i, label in enumerate(own) if label != IGNORED), len(own))
            labels += own
            kept += range(start + first - 1, start + len(own))
        if "logits_to_keep" in self._accepted:
            batch["logits_to_keep"] = torch.tensor(kept)
            labels = [labels[i] for i in kept]
        return {**batch, "labels": torch.tensor([labels])}
