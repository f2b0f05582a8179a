"""Chat with a model in the terminal, optionally side by side with its base model."""

from __future__ import annotations

from contextlib import nullcontext
from copy import copy
from typing import Any

import torch
from peft import PeftModel
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.configuration_utils import METADATA_FIELDS

from pera.errors import UserError, one_line
from pera_lab.inference import base_model, generation_settings, text_of, write
from pera_lab.models import check_tokens, longest_input
from pera_lab.opening import Location, open_model
from pera_lab.tasks.encoding import encode_chat
from pera_lab.text import visible

HELP = "Type a message. /new starts a new conversation; /quit or Ctrl-D exits."


class Conversation:
    """A chat whose history is kept as far as it fits into the model's context.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        base: answer with the adapter disabled.
        max_new_tokens: longest answer in tokens, if the model's context allows it.
        temperature: sampling temperature; 0 decodes greedily. None keeps the base model's own settings.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        base: bool = False,
        max_new_tokens: int = 256,
        temperature: float | None = None,
    ) -> None:
        self._model, self._tokenizer, self._base = model, tokenizer, base
        self._longest, self._max_new_tokens = longest_input(model, tokenizer), max_new_tokens
        chosen = {} if temperature is None else {"do_sample": temperature > 0, "temperature": temperature or None}
        one = {"max_length": None, "num_return_sequences": 1, "return_dict_in_generate": False}
        self.settings = generation_settings(model, tokenizer, base_model(model).generation_config, **chosen, **one)
        """The base model's generation settings, with ``temperature``. One answer is returned."""
        self.messages: list[dict[str, str]] = []

    @torch.no_grad()
    def answer(self, message: str, streamer: TextStreamer | None = None) -> str:
        """The model's answer to ``message``. Both join the history, and the oldest turns are dropped to make room.

        Raises:
            UserError: the message alone does not fit into the model's context.
        """
        messages = [*self.messages, {"role": "user", "content": message}]
        encoded = encode_chat(self._tokenizer, messages)
        room = min(self._max_new_tokens, self._longest // 4)
        while len(encoded) + room > self._longest and len(messages) > 1:
            messages = messages[2:]
            encoded = encode_chat(self._tokenizer, messages)
        if len(encoded) >= self._longest:
            raise UserError(
                f"the message has {len(encoded)} tokens, but the model reads at most {self._longest}; shorten it."
            )
        check_tokens(self._model, self._tokenizer, [encoded])
        ids = torch.tensor([encoded], device=next(self._model.parameters()).device)
        config = copy(self.settings)
        config.max_new_tokens = min(self._max_new_tokens, self._longest - len(encoded))
        beams = (config.num_beams or 1) > 1  # which transformers does not stream
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with self._model.disable_adapter() if self._base else nullcontext():
            try:
                (answer,) = write(self._model, inputs, config, None if beams else streamer, tokenizer=self._tokenizer)
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"the base model's generation_config.json has settings that cannot be used: {one_line(error)}"
                ) from error
        text = text_of(self._tokenizer, answer)
        if beams and streamer is not None:
            streamer.on_finalized_text(text, stream_end=True)
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return text


def settings_that_matter(config: GenerationConfig) -> dict[str, Any]:
    """The settings that change what a model writes, apart from length and special tokens, if they are not the
    library's defaults."""
    defaults = GenerationConfig._get_default_generation_params()
    known = vars(GenerationConfig()).keys() - METADATA_FIELDS  # type: ignore[no-untyped-call]
    chosen = {key: value for key, value in config.to_diff_dict().items() if value != defaults.get(key)}
    without_effect = _OTHERS if config.do_sample else _OTHERS | _SAMPLING
    return {key: value for key, value in chosen.items() if key in known - without_effect}


_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
_OTHERS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens"),
    *("num_return_sequences", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores"),
    *("output_logits", "use_cache", "cache_implementation", "cache_config"),
}


def chat(location: Location, console: Console, *, compare: bool = False, dtype: str = "auto", **options: Any) -> None:
    """Chat with a model until the input ends.

    Args:
        location: a run, an adapter or a model.
        console: the terminal that messages are read from and answers printed to.
        compare: show the answers of the base model and the adapter side by side.
        dtype: dtype of the model, as in :func:`pera_lab.opening.open_model`.
        options: ``max_new_tokens`` and ``temperature`` of :class:`Conversation`.

    Raises:
        UserError: ``compare`` without an adapter, or the model is a classifier.
    """
    if compare and location.adapter is None:
        raise UserError(
            f"--compare needs an adapter, but {location.base!r} has none; give a run folder or an adapter folder."
        )
    model, tokenizer = open_model(location, dtype)
    if not base_model(model).can_generate():
        raise UserError(f"{location.base!r} is a classifier here and generates no text; use: pera predict")
    names = ["base", "adapter"] if compare else ["base" if not isinstance(model, PeftModel) else "adapter"]

    def start() -> dict[str, Conversation]:
        adapted = isinstance(model, PeftModel)
        return {n: Conversation(model, tokenizer, base=adapted and n == "base", **options) for n in names}

    talks = start()
    console.print(HELP, style="dim")
    if settings := settings_that_matter(talks[names[0]].settings):
        shown = ", ".join(f"{key}={value}" for key, value in settings.items())
        console.print(Text(visible(f"The base model's generation settings apply: {shown}.")), style="dim")
    while True:
        try:
            message = console.input("[bold]> [/bold]").strip()
        except EOFError:
            console.print()
            return
        if message == "/quit":
            return
        try:
            if message == "/new":
                talks = start()
                console.print("New conversation.", style="dim")
            elif message and compare:
                answers = {name: talk.answer(message) for name, talk in talks.items()}
                width = max(20, console.width // 2 - 1)
                panels = [Panel(Text(visible(a)), title=n, width=width) for n, a in answers.items()]
                console.print(Columns(panels), soft_wrap=False)
            elif message:
                talk = talks[names[0]]
                talk.answer(message, _Streamer(tokenizer, console, talk.settings.eos_token_id or []))
        except UserError as error:
            console.print(Text(visible(str(error))), style="yellow")


class _Streamer(TextStreamer):
    """Prints an answer word by word, without the token that ends it, and with markup and terminal escapes as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console, stops: list[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._console, self._stops = console, torch.tensor(stops)

    def put(self, value: torch.Tensor) -> None:
        shown = value if self.next_tokens_are_prompt else value[~torch.isin(value.cpu(), self._stops)]
        super().put(shown)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._console.print(Text(visible(text)), end="\n" if stream_end else "", soft_wrap=True)
