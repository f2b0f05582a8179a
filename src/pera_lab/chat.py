"""Chat with a model in the terminal, optionally side by side with its base model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TextStreamer

from pera.errors import UserError
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
        temperature: sampling temperature; 0 decodes greedily.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        base: bool = False,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> None:
        self._model, self._tokenizer, self._base = model, tokenizer, base
        self._longest, self._max_new_tokens = longest_input(model, tokenizer), max_new_tokens
        self._options: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            self._options["temperature"] = temperature
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
        with self._model.disable_adapter() if self._base else nullcontext():
            output = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pad_token_id=self._tokenizer.pad_token_id,
                streamer=streamer,
                max_new_tokens=min(self._max_new_tokens, self._longest - len(encoded)),
                **self._options,
            )
        text = str(self._tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return text


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
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not plain.can_generate():
        raise UserError(f"{location.base!r} is a classifier here and generates no text; use: pera predict")
    names = ["base", "adapter"] if compare else ["base" if not isinstance(model, PeftModel) else "adapter"]

    def start() -> dict[str, Conversation]:
        adapted = isinstance(model, PeftModel)
        return {n: Conversation(model, tokenizer, base=adapted and n == "base", **options) for n in names}

    talks = start()
    console.print(HELP, style="dim")
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
                console.print(Columns([Panel(Text(visible(a)), title=n, width=width) for n, a in answers.items()]))
            elif message:
                talks[names[0]].answer(message, _Streamer(tokenizer, console))
        except UserError as error:
            console.print(Text(visible(str(error))), style="yellow")


class _Streamer(TextStreamer):
    """Prints an answer word by word, with markup and terminal escapes shown as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._console = console

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._console.print(Text(visible(text)), end="\n" if stream_end else "", soft_wrap=True)
