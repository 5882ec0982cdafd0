"""Reading chats in common formats, and rendering them with chat templates."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

Chat: TypeAlias = list[Mapping[str, Any]]
"""One conversation: messages with the keys "role" and "content"."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, {"role", "content"} or ShareGPT's {"from", "value"}."""
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in value)
    )


def read_chat(value: Sequence[Mapping[str, Any]], where: str) -> Chat:
    """The messages of a chat with roles; keys whose value is None are dropped, except the content.

    Raises:
        ValueError: an unknown ShareGPT role; `where` names the place.
    """
    chat: Chat = []
    for message in value:
        if "role" not in message:
            role = _SHAREGPT_ROLES.get(str(message["from"]))
            if role is None:
                raise ValueError(
                    f"{where} has a turn from {message['from']!r}, known are {', '.join(_SHAREGPT_ROLES)}. Write the "
                    'chat as {"role": ..., "content": ...} messages.'
                )
            message = {"role": role, "content": message.get("value")}
        # Datasets fill missing keys with None, and templates test whether a key is present.
        kept = {key: item for key, item in message.items() if item is not None and (key != "tool_calls" or item)}
        chat.append({**kept, "content": _content(message.get("content"), where)})
    return chat


def _content(content: Any, where: str) -> str | list[Mapping[str, Any]]:
    """Content of a message: text-only parts are joined to a string, parts with media remain a list."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list | tuple) else [content]
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in parts]
    odd = next((kind for kind in kinds if kind not in ("text", "image", "audio", "video")), None)
    if odd is not None:
        raise ValueError(
            f"{where} has a message with a part of type {odd!r}. The parts of a content are "
            '{"type": "text", "text": ...}, or of type image, audio or video: {"type": "image", "image": ...}.'
        )
    if all(kind == "text" for kind in kinds):
        return "\n".join(str(part.get("text") or "") for part in parts)
    return parts


def chat_text(chat: Chat) -> str:
    """The contents of all messages, without roles."""
    return "\n".join(m["content"] for m in chat if isinstance(m["content"], str))


def render_chat(chat: Chat, tokenizer: Any) -> str:
    """A chat as text, through the tokenizer's chat template.

    Templates accept different forms: content as text or as a list of parts, arguments of tool calls as a mapping or as
    JSON. The first form is used that the template accepts and whose rendering contains the user's text.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses the chat.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"The calibration data holds chats, and {type(tokenizer).__name__} has no chat template. Set "
            "tokenizer.chat_template, or pass the chats as rendered strings."
        )
    said = [_words(m["content"]) for m in chat if m["role"] == "user" and isinstance(m["content"], str)]
    rendered: list[str] = []
    refusals: list[Exception] = []
    for form in _forms(chat):
        try:
            rendered.append(str(tokenizer.apply_chat_template(form, tokenize=False)))
        # A template is arbitrary code and can raise any exception.
        except Exception as error:
            refusals.append(error)
            continue
        if all(words in _words(rendered[-1]) for words in said):
            return rendered[-1]
    if rendered:
        warnings.warn(
            f"The chat template of {type(tokenizer).__name__} leaves out the user's text in some chats. If this is not "
            "intended, render the chats and pass strings.",
            stacklevel=2,
        )
        return rendered[0]
    system = any(m["role"] == "system" for m in chat)
    remedy = "Put the text of the system message into the first user message" if system else "Correct the chat"
    shown, reason = repr(chat), f"{type(refusals[0]).__name__}: {refusals[0]}"
    raise ValueError(
        f"The chat template of {type(tokenizer).__name__} refuses a chat ({reason}): "
        f"{shown if len(shown) <= 160 else shown[:157] + '...'} {remedy}, or pass the chats as rendered strings."
    ) from refusals[0]


def _words(text: str) -> str:
    return " ".join(text.split())


def _forms(chat: Chat) -> Iterator[Chat]:
    parts: Chat = [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m for m in chat
    ]
    for form in (chat, parts):
        yield [_with_arguments(message, as_text=False) for message in form]
        if any("tool_calls" in message for message in chat):
            yield [_with_arguments(message, as_text=True) for message in form]


def _with_arguments(message: Mapping[str, Any], as_text: bool) -> Mapping[str, Any]:
    if not isinstance(message.get("tool_calls"), list | tuple):
        return message
    return {**message, "tool_calls": [_call(call, as_text) for call in message["tool_calls"]]}


def _call(call: Any, as_text: bool) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], as_text)}
    arguments = call.get("arguments")
    if as_text and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments)}
    if not as_text and isinstance(arguments, str):
        try:
            return {**call, "arguments": json.loads(arguments)}
        except json.JSONDecodeError:
            return call
    return call
