"""Conversations: rows with messages as examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pera_lab.tasks.examples import Example
from pera_lab.tasks.sources import BadRow, field


def example_of(
    row: dict[str, Any], columns: Mapping[str, str] | None = None, *, template: str = "chat", answered: bool = True
) -> Example:
    """A row with ``prompt`` and ``completion`` (texts or lists of messages), or with ``messages``, as an example.

    Args:
        row: the row.
        columns: names of the columns in the row, by the names above.
        template: "chat", or "plain" for a prompt without roles, which cannot be a list of messages.
        answered: whether the row must have an answer.

    Raises:
        BadRow: a column is missing or has a wrong value.
    """
    names = {name: name for name in ("prompt", "completion", "messages")} | dict(columns or {})
    conversation = row.get(names["messages"]) is not None
    asked = names["messages" if conversation else "prompt"]
    if template == "plain" and isinstance(row.get(asked), list):
        raise BadRow(f"field {asked!r} holds messages, and template 'plain' has no roles; give texts, or use 'chat'.")
    if conversation:
        messages = _messages(row, names["messages"])
        answer = ""
        if answered or messages[-1]["role"] == "assistant":
            *messages, last = messages
            if last["role"] != "assistant" or not messages:
                raise BadRow(f"field {names['messages']!r} should end with an assistant's message after a user's.")
            answer = last["content"]
        return Example(messages[-1]["content"], answer, row, messages=tuple(messages))
    if isinstance(row.get(names["prompt"]), list):
        messages = _messages(row, names["prompt"])
        answer = _assistant_answer(row, names["completion"]) if answered else ""
        return Example(messages[-1]["content"], answer, row, messages=tuple(messages))
    prompt = field(row, names["prompt"])
    return Example(prompt, field(row, names["completion"]) if answered else "", row)


def _assistant_answer(row: dict[str, Any], name: str) -> str:
    messages = _messages(row, name)
    if [message["role"] for message in messages] != ["assistant"]:
        raise BadRow(f"field {name!r} should hold one message, from the assistant.")
    return messages[0]["content"]


def _messages(row: dict[str, Any], name: str) -> list[dict[str, str]]:
    messages = field(row, name, list, "a list of messages")
    if not messages:
        raise BadRow(f"field {name!r} has no messages.")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise BadRow(f"field {name!r} should hold messages such as {{'role': 'user', 'content': '…'}}.")
    return [{"role": m["role"], "content": m["content"]} for m in messages]
