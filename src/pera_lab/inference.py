"""What a language model writes after prompts, when it stops, and how likely it finds given continuations."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jinja2 import TemplateError
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer


def end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that training teaches as the end of an answer: the tokenizer's end of sequence, else the token that its
    chat template closes a turn with. None if there is neither."""
    eos = tokenizer.eos_token_id
    return turn_end(tokenizer) if eos is None else int(eos)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes after an assistant's message, such as ``<|im_end|>``; None if
    there is no template, or if it writes none."""
    mark = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    if tokenizer.chat_template is None:
        return None
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, ValueError, TypeError):
        return None
    behind = text.rpartition(mark)[2].lstrip()
    ids = tokenizer(behind, add_special_tokens=False).input_ids
    special = next((i for i in ids if i in tokenizer.all_special_ids or i in tokenizer.added_tokens_decoder), None)
    return special if special is not None and behind.startswith(str(tokenizer.convert_ids_to_tokens(special))) else None


def stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which an answer ends.

    These are the end-of-sequence ids of the base model's generation settings and configuration, the token that training
    taught (:func:`end_token`), and the token that the chat template closes a turn with. Ids outside the vocabulary are
    left out, with a warning if they are in the base's generation_config.json.
    """
    plain = base_model(model)
    own, config = getattr(plain, "generation_config", None), getattr(plain, "config", None)
    rows = getattr(config, "vocab_size", None) or len(tokenizer)
    declared = [*end_ids(own), *end_ids(config)]
    known = [i for i in declared if isinstance(i, int) and 0 <= i < rows]
    wrong = [] if getattr(own, "_from_model_config", False) else [i for i in end_ids(own) if i not in known]
    if wrong:
        warnings.warn(
            f"eos_token_id={wrong[0]!r} in the base model's generation_config.json is ignored: the vocabulary has the "
            f"ids 0 to {rows - 1}.",
            stacklevel=2,
        )
    taught = [i for i in (end_token(tokenizer), turn_end(tokenizer)) if i is not None]
    return list(dict.fromkeys([*known, *taught]))


def end_ids(config: Any) -> list[Any]:
    """The end-of-sequence ids in a configuration, which may hold one, several or none."""
    ids = getattr(config, "eos_token_id", None)
    return list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [ids]


def generation_settings(
    model: Any, tokenizer: PreTrainedTokenizerBase, start: GenerationConfig | None = None, **settings: Any
) -> GenerationConfig:
    """The settings of one call: ``settings``, the tokens at which an answer ends, and the library's defaults.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        start: the settings to start from, such as the base model's in a chat. None starts from the defaults.
        settings: fields of transformers' ``GenerationConfig``.
    """
    config: Any = GenerationConfig() if start is None else copy.deepcopy(start)  # type: ignore[no-untyped-call]
    special = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config.update(**special, **settings, eos_token_id=stop_tokens(model, tokenizer) or None)
    found: GenerationConfig = config
    return found


def write(
    model: Any, inputs: dict[str, Any], config: GenerationConfig, streamer: BaseStreamer | None = None, **options: Any
) -> list[list[int]]:
    """Token ids that the model writes after a batch of prompts, up to the token at which each answer ends.

    Args:
        model: the language model.
        inputs: ``input_ids`` and ``attention_mask``, padded on the left.
        config: the settings from :func:`generation_settings`. Settings of the model itself have no effect.
        streamer: receives the tokens as they come.
        options: further arguments of ``generate``.
    """
    with _without_own_settings(base_model(model)):
        output = model.generate(**inputs, generation_config=config, streamer=streamer, **options)
    stops = set(config.eos_token_id or ())
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))] for ids in answers]


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Context manager in which a model has no generation settings of its own, which transformers would use for every
    setting that a call leaves open."""
    own = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own


def generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int, num_beams: int = 1
) -> list[str]:
    """The answers to one batch of prompts as text; see :func:`generate_ids`."""
    answers = generate_ids(model, tokenizer, prompts, max_new_tokens, num_beams)
    return [text_of(tokenizer, ids) for ids in answers]


@torch.no_grad()
def generate_ids(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int, num_beams: int = 1
) -> list[list[int]]:
    """Token ids of the answers to one batch of prompts, without sampling.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt.
        max_new_tokens: longest answer in tokens.
        num_beams: beams of the search; 1 is greedy.
    """
    batch: Any = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(next(model.parameters()).device)
    config = generation_settings(model, tokenizer, max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False)
    return write(model, dict(batch), config)


@torch.no_grad()
def token_log_likelihoods(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], answers: list[list[int]]
) -> list[Tensor]:
    """Log-probability of each token of an answer, given the prompt and the tokens before it, over the whole vocabulary.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt of one batch.
        answers: token ids of the answer to each prompt, each with at least one.

    Returns:
        For each answer a tensor with one value per token, in float32.
    """
    if not prompts:
        return []
    if len({len(p) + len(a) for p, a in zip(prompts, answers, strict=True)}) > 1 and not takes_padding(model):
        alone = zip(prompts, answers, strict=True)
        return [token_log_likelihoods(model, tokenizer, [p], [a])[0] for p, a in alone]
    rows = [p + a[:-1] for p, a in zip(prompts, answers, strict=True)]
    batch: Any = tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side="left")
    inputs: dict[str, Any] = dict(batch.to(next(model.parameters()).device))
    accepted, kept = inspect.signature(base_model(model).forward).parameters, max(map(len, answers))
    if "position_ids" in accepted:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = kept
    logits = model(**inputs).logits[:, -kept:].float().log_softmax(-1).cpu()
    pairs = zip(logits, answers, strict=True)
    return [row[-len(ids) :].gather(1, torch.tensor(ids)[:, None])[:, 0] for row, ids in pairs]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer, without special tokens and white space at both ends."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def takes_padding(model: Any) -> bool:
    """Whether a row gives the same output alone and in a batch that pads it on the left.

    A recurrent model such as RWKV reads the padding whatever the attention mask says. Another model may count positions
    from the padding. Both are found by running a few tokens in both ways, once for each model. A classifier is only
    asked whether it takes an attention mask.
    """
    plain = base_model(model)
    if plain not in _takes_padding:
        _takes_padding[plain] = _unchanged_by_padding(plain)
    return _takes_padding[plain]


def largest_batch(model: Any, size: int) -> int:
    """``size``, or 1 for a model whose output changes with padding."""
    return size if size == 1 or takes_padding(model) else 1


_takes_padding: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def _unchanged_by_padding(model: Any) -> bool:
    accepted, was_training = inspect.signature(model.forward).parameters, model.training
    if "attention_mask" not in accepted:
        return False
    if any(parameter.is_meta for parameter in model.parameters()):
        return True  # the process that has the weights finds out
    device = next(model.parameters()).device

    def last_logits(padding: list[int]) -> Tensor:
        ids = torch.tensor([[*padding, *_PROBE]], device=device)
        mask = torch.tensor([[0] * len(padding) + [1] * len(_PROBE)], device=device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in accepted:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        logits: Tensor = model(**inputs).logits
        return logits[0, -1].float() if logits.dim() == 3 else torch.zeros(1)  # a classifier

    model.eval()
    try:
        alone, padded = last_logits([]), last_logits([1, 2, 3] * 3)
    finally:
        model.train(was_training)
    # Rounding changes the logits by less than 1e-2 of their spread, even in bfloat16; ignored masks by 0.2 and more.
    return bool((alone - padded).abs().max() <= 0.05 * (alone.max() - alone.min()))


def packed(rows: Sequence[Sequence[int]], accepted: Collection[str]) -> dict[str, Any]:
    """Inputs that hold several rows one after the other, as one row of a batch.

    transformers computes attention within each row if the positions begin again, and if there is neither an attention
    mask nor a cache.

    Args:
        rows: token ids.
        accepted: names of the arguments that the model takes.
    """
    ids, positions = chain(*rows), chain(*(range(len(row)) for row in rows))
    inputs: dict[str, Any] = {"input_ids": torch.tensor([[*ids]]), "position_ids": torch.tensor([[*positions]])}
    return inputs | ({"use_cache": False} if "use_cache" in accepted else {})


@torch.no_grad()
def takes_packing(model: Any) -> bool:
    """Whether rows give the same outputs one by one and packed (:func:`packed`). A few tokens are run in both ways."""
    accepted, was_training = inspect.signature(base_model(model).forward).parameters, model.training
    if "position_ids" not in accepted:
        return False
    device = next(model.parameters()).device

    def logits(*rows: Sequence[int]) -> Tensor:
        inputs = packed(rows, accepted)
        found: Tensor = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}).logits
        return found[0].float()

    rows = (_PROBE * 3, _PROBE, _PROBE[::-1] * 2)
    model.eval()
    try:
        alone, together = torch.cat([logits(row) for row in rows]), logits(*rows)
    finally:
        model.train(was_training)
    same = alone.shape == together.shape  # a prompt that is learned comes before the rows
    return same and bool((alone - together).abs().max() <= 0.05 * (alone.max() - alone.min()))


_PROBE = (4, 5, 6)
"""Token ids that every vocabulary has."""


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
    that is enough. Otherwise a second pass reads the suffixes with the cached keys and values. A model with recurrent
    states reads each continuation as a whole.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        batch: the texts.
    """
    device = next(model.parameters()).device
    accepted = inspect.signature(base_model(model).forward).parameters

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
    if longer and not _selectable(cache := getattr(output, "past_key_values", None)):
        for i, j in longer:
            whole = [*batch[i].shared, *batch[i].suffixes[j]]
            logits = model(input_ids=torch.tensor([whole[:-1]], device=device)).logits[0].float().log_softmax(-1)
            places = range(len(batch[i].shared), len(whole) - 1)
            found[i][j] += sum(logits[place, whole[place + 1]].item() for place in places)
    elif longer:
        rest = [batch[i].suffixes[j] for i, j in longer]
        tail, tail_mask = padded([suffix[:-1] for suffix in rest], "right")
        rows = torch.tensor([i for i, _ in longer], device=device)
        assert cache is not None
        cache.batch_select_indices(rows)
        inputs = {"input_ids": tail, "past_key_values": cache, "use_cache": True}
        inputs["attention_mask"] = torch.cat([mask[rows], tail_mask], 1)
        if "position_ids" in accepted:
            inputs["position_ids"] = mask[rows].sum(1, keepdim=True) + torch.arange(tail.shape[1], device=device)
        logits = model(**inputs).logits.float().log_softmax(-1)
        for (i, j), row, suffix in zip(longer, logits, rest, strict=True):
            found[i][j] += sum(row[k, token].item() for k, token in enumerate(suffix[1:]))
    return found


def _selectable(cache: Any) -> bool:
    """Whether rows of a cache can be selected. The cache of a recurrent layer has no such method, or a wrong one."""
    layers = getattr(cache, "layers", ())
    return hasattr(cache, "batch_select_indices") and not any(hasattr(layer, "conv_states") for layer in layers)


def base_model(model: Any) -> Any:
    """The model of transformers that a model with or without an adapter consists of."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
