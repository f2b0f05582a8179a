"""Conversations: rows with messages as examples, and their text in the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pera.errors import UserError, one_line
from pera_lab.tasks.examples import Example
from pera_lab.tasks.sources import BadRow, field, short

Message = dict[str, Any]

_NEVER_READ = (
    "functions",
    "documents",
    "images",
    "image",
    "videos",
    "video",
    "audios",
    "audio",
    "chat_template_kwargs",
)
"""Columns that other programs show to the model."""
_NEVER_LEARNED = ("weight", "weights", "train", "rejected")
"""Columns that change what other programs learn from a row."""


def example_of(
    row: dict[str, Any], columns: Mapping[str, str] | None = None, *, template: str = "chat", answered: bool = True
) -> Example:
    """A row with ``prompt`` and ``completion`` (texts or lists of messages), or with ``messages``, as an example.

    The column ``tools`` holds the functions that the model can call, as a list or as JSON text. A reply that is more
    than text, such as a tool call, becomes the answer in the wording of the chat template (:func:`with_reply`).

    Args:
        row: the row.
        columns: names of the columns in the row, by the names above.
        template: "chat", or "plain" for a prompt without roles, which cannot be a list of messages.
        answered: whether the row must have an answer.

    Raises:
        BadRow: a column is missing, has a wrong value, or would have no effect.
    """
    names = {name: name for name in ("prompt", "completion", "messages", "tools")} | dict(columns or {})
    for key in (*_NEVER_READ, *(_NEVER_LEARNED if answered else ())):
        if key not in names.values() and row.get(key) not in _NOTHING:
            raise BadRow(f"field {key!r}={short(row[key])} would have no effect here; remove it.")
    tools = _tools(row, names["tools"])
    conversation = row.get(names["messages"]) is not None
    asked = names["messages" if conversation else "prompt"]
    if template == "plain" and (isinstance(row.get(asked), list) or tools):
        what = f"field {asked!r} holds messages" if isinstance(row.get(asked), list) else "field 'tools' is given"
        raise BadRow(f"{what}, and template 'plain' has no roles; give texts, or use 'chat'.")
    if conversation:
        messages = _messages(row, names["messages"])
        reply = {}
        if answered or messages[-1]["role"] == "assistant":
            *messages, reply = messages
            if reply["role"] != "assistant" or not messages:
                raise BadRow(f"field {names['messages']!r} should end with an assistant's message after a user's.")
        return _example(row, names["messages"], messages, reply, tools)
    if isinstance(row.get(names["prompt"]), list):
        messages = _messages(row, names["prompt"])
        return _example(
            row, names["completion"], messages, _completion(row, names["completion"]) if answered else {}, tools
        )
    prompt = field(row, names["prompt"])
    answer = field(row, names["completion"]) if answered else ""
    if answered and not answer.strip():
        raise BadRow(f"field {names['completion']!r}={short(answer)} should be a text.")
    messages = [{"role": "user", "content": prompt}] if tools else []
    return Example(prompt, answer, row, messages=tuple(messages), tools=tools)


def _example(
    row: dict[str, Any], name: str, messages: list[Message], reply: Message, tools: tuple[dict[str, Any], ...]
) -> Example:
    if reply and not reply["content"].strip() and reply.keys() == {"role", "content"}:
        raise BadRow(f"field {name!r}: the last message, from the assistant, is empty; there is nothing to learn.")
    more = reply if reply.keys() > {"role", "content"} else {}
    answer = reply.get("content", "")
    return Example(messages[-1]["content"], answer, row, messages=tuple(messages), tools=tools, reply=more)


def _completion(row: dict[str, Any], name: str) -> Message:
    messages = _messages(row, name)
    if [message["role"] for message in messages] != ["assistant"]:
        raise BadRow(f"field {name!r} should hold one message, from the assistant.")
    return messages[0]


_NOTHING: tuple[Any, ...] = (None, "", [], {})
"""Values that say the same as a missing key."""


def _messages(row: dict[str, Any], name: str) -> list[Message]:
    messages = field(row, name, list, "a list of messages")
    if not messages:
        raise BadRow(f"field {name!r} has no messages.")
    return [_message(message, name, f"field {name!r}, message {i}") for i, message in enumerate(messages, 1)]


def _message(message: Any, name: str, place: str) -> Message:
    """A message with a text as content, and its other keys if they have a value."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRow(f"field {name!r} should hold messages such as {{'role': 'user', 'content': '…'}}.")
    more = {k: v for k, v in message.items() if k not in ("role", "content") and v not in _NOTHING}
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], place)
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, place) for part in content)
    if content is None and more.keys() & {"tool_calls", "function_call"}:
        content = ""
    if not isinstance(content, str):
        raise BadRow(f"field {name!r} should hold messages such as {{'role': 'user', 'content': '…'}}.")
    return {"role": message["role"], "content": content, **more}


def _part(part: Any, place: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise BadRow(f"{place}: content has a part {short(part)}, which is not text; only text can be learned.")
    return str(part["text"])


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """The calls with their arguments as objects."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        inner: Any = call.get("function", call) if isinstance(call, dict) else None
        arguments: Any = inner.get("arguments", {}) if isinstance(inner, dict) else None
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict) or not isinstance(inner.get("name"), str):
            raise BadRow(
                f"{place}: tool_calls should hold calls such as {{'type': 'function', 'function': {{'name': 'f', "
                f"'arguments': {{…}}}}}}, not {short(call)}."
            )
        outer = {k: v for k, v in call.items() if v is not None} if "function" in call else {}
        found.append({"type": "function", **outer, "function": {**inner, "arguments": arguments}})
    return found


def _tools(row: dict[str, Any], name: str) -> tuple[dict[str, Any], ...]:
    tools = row.get(name)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"field {name!r}={short(tools)} should be a list of functions, or its JSON text.") from error
    if tools in _NOTHING:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        raise BadRow(f"field {name!r}={short(tools)} should be a list of functions, or its JSON text.")
    return tuple(tools)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] = (),
    *,
    asking: bool = True,
) -> str:
    """The text of a conversation in the model's chat template. Without a template the messages are lines of text.

    Args:
        tokenizer: the tokenizer of the model.
        messages: the messages.
        tools: the functions that the model can call.
        asking: whether the text continues to the beginning of the model's next answer.

    Raises:
        UserError: the template rejects the messages.
    """
    if tokenizer.chat_template is None:
        return "".join(f"{message['content']}\n" for message in messages)
    options: dict[str, Any] = {"tools": list(tools)} if tools else {}
    options |= {"add_generation_prompt": asking, "tokenize": False}
    try:
        return str(tokenizer.apply_chat_template(list(messages), **options))
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        listed = ", ".join(message["role"] for message in messages)
        roles = listed if len(listed) <= 100 else f"{listed[:97]}..."
        raise UserError(
            f"messages with the roles {roles}: the model's chat template rejects them: {one_line(error).rstrip('.')}."
        ) from error


def fitted(tokenizer: PreTrainedTokenizerBase, example: Example) -> Example:
    """The example with the arguments of its calls as the chat template takes them: as objects, else as JSON text.

    Raises:
        UserError: the template rejects the messages, or leaves out a part of them.
    """
    if not example.messages:
        return example
    try:
        if any("tool_calls" in message for message in (*example.messages, example.reply)):
            example = _with_arguments(tokenizer, example)
        _check_rendered(tokenizer, [*example.messages, *([example.reply] if example.reply else [])], example.tools)
    except UserError as error:
        raise UserError(f"{example.place}: {error}" if example.place else str(error)) from error
    return example


def with_reply(tokenizer: PreTrainedTokenizerBase, example: Example) -> Example:
    """The example with the chat template's text of its reply as the answer, if the reply is more than text.

    Raises:
        UserError: as :func:`fitted`, or the template does not write the reply behind the prompt.
    """
    if not example.reply:
        return example
    example = fitted(tokenizer, example)
    mark = "§answer§"
    prompt = render(tokenizer, example.messages, example.tools)
    whole, plain = (
        render(tokenizer, [*example.messages, last], example.tools, asking=False)
        for last in (example.reply, {"role": "assistant", "content": mark})
    )
    end = plain.rpartition(mark)[2]
    answer = whole.removeprefix(prompt).removesuffix(end)
    if not whole.startswith(prompt) or not answer.strip():
        keys = ", ".join(key for key in example.reply if key not in ("role", "content"))
        raise UserError(
            f"{example.place or 'messages'}: the model's chat template does not write the assistant's {keys} behind "
            "its prompt, so they cannot be learned; use a model whose template does."
        )
    return replace(example, answer=answer)


def _with_arguments(tokenizer: PreTrainedTokenizerBase, example: Example) -> Example:
    messages = [*example.messages, *([example.reply] if example.reply else [])]
    objects = [call["function"]["arguments"] for m in messages for call in m.get("tool_calls", ())]
    if all(isinstance(arguments, str) for arguments in objects):
        return example
    try:
        text = render(tokenizer, messages, example.tools, asking=False)
    except UserError:
        text = None
    written = [(repr(each), json.dumps(each, ensure_ascii=False)) for each in objects]
    if text is not None and not any(code != wanted and code in text for code, wanted in written):
        return example
    as_text = [_arguments_as_text(message) for message in messages]
    reply = as_text.pop() if example.reply else {}
    return replace(example, messages=tuple(as_text), reply=reply)


def _arguments_as_text(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": calls}


_rendered: WeakKeyDictionary[PreTrainedTokenizerBase, set[Any]] = WeakKeyDictionary()
"""Shapes of conversations that the template of a tokenizer was found to write in full."""


def _check_rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Sequence[Any]) -> None:
    """Check that the chat template writes every part of a conversation: leaving a part out must change the text.

    Identifiers (``tool_call_id``, and ``name`` of a tool's result) are not checked, because the order says the same.
    """
    shape = tuple((m["role"], bool(m["content"]), *sorted(m)) for m in messages)
    known = _rendered.setdefault(tokenizer, set())
    if (key := (str(tokenizer.chat_template), bool(tools), shape)) in known:
        return
    whole = render(tokenizer, messages, tools, asking=False)

    def left_out(changed: list[Message], functions: Sequence[Any] = tools) -> bool:
        try:
            return render(tokenizer, changed, functions, asking=False) == whole
        except UserError:
            return False

    if tools and left_out(messages, ()):
        raise UserError("field 'tools': the model's chat template leaves the tools out; use a model that takes tools.")
    for i, message in enumerate(messages):
        keys = message.keys() - {"role", "tool_call_id", *(["name"] if message["role"] in ("tool", "function") else [])}
        for name in sorted(keys):
            if name == "content" and not message["content"]:
                continue
            everywhere = [{k: v for k, v in m.items() if k != name} for m in messages]
            marked = {**message, "content": f"{message['content']}§"}
            changed = [*messages[:i], marked, *messages[i + 1 :]] if name == "content" else everywhere
            if left_out(changed) or (name == "tool_calls" and left_out([_other_arguments(m) for m in messages])):
                raise UserError(
                    f"message {i + 1}: the model's chat template leaves its {name!r} out; remove it, or use a model "
                    "whose template writes it."
                )
    known.add(key)


def _other_arguments(message: Message) -> Message:
    calls = []
    for call in message.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        other = {**arguments, "§": "§"} if isinstance(arguments, dict) else f"{arguments}§"
        calls.append({**call, "function": {**call["function"], "arguments": other}})
    return {**message, "tool_calls": calls} if calls else message
