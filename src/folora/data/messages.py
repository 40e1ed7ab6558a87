"""Convert the messages of a chat from common layouts to the list that chat templates expect.

A message is ``{"role", "content", ...}``. ShareGPT's ``{"from", "value"}``, Capybara's ``{"input",
"output"}``, contents in text blocks and tool calls whose arguments are JSON text are converted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from folora.errors import DataError

Message = dict[str, Any]

NO_CHAT = "a chat must be a list of {'role': name, 'content': text}"
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "bing": "assistant", "bard": "assistant",
    "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
WEIGHTS = ("weight", "train")


def read_messages(given: Any, *, texts: bool = False) -> list[Message]:
    """The messages of a chat; if `texts`, a list of strings alternates between user and assistant.

    Raises:
        DataError: The value is not a list of messages, a sender is unknown, or a content is not text.
    """
    if not isinstance(given, list):
        raise DataError(NO_CHAT)
    if texts and given and all(isinstance(text, str) for text in given):
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(given)]
    return [message for entry in given for message in _read(entry)]


def learns(message: Message) -> bool:
    """Whether a message has loss, by OpenAI's ``weight`` and Axolotl's ``train``."""
    weights = [message[key] for key in WEIGHTS if key in message]
    if not all(weight in (0, 1) for weight in weights):
        raise DataError(f"a message has the weight {weights[0]!r}, but weights must be 0 or 1")
    return all(weights)


def read_tools(given: Any) -> list[Any]:
    """JSON schemas of tools, from a list or JSON text, in the form that chat templates expect."""
    tools = without_nulls(from_json(given, "column 'tools'", list)) or []
    if not all(isinstance(tool, dict) for tool in tools):
        raise DataError("column 'tools' must hold a list of JSON schemas")
    return [t if "function" in t else {"type": "function", "function": t} for t in tools]


def from_json(value: Any, what: str, kind: type) -> Any:
    """A value of type `kind`, which may be given as JSON text; None if there is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "null")
        except (ValueError, RecursionError) as error:
            raise DataError(f"{what} must hold a {kind.__name__} or its JSON: {error}") from None
    if value is not None and not isinstance(value, kind):
        raise DataError(f"{what} must hold a {kind.__name__}, not {type(value).__name__}")
    return value


def without_nulls(value: Any) -> Any:
    """Remove keys whose value is None, recursively: Arrow gives every row the keys of all rows."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def _read(given: Any) -> list[Message]:
    if not isinstance(given, Mapping):
        raise DataError(NO_CHAT)
    message = {key: value for key, value in given.items() if value is not None}
    if "role" not in message and {"input", "output"} <= set(message):
        turn = (("user", message["input"]), ("assistant", message["output"]))
        return [{"role": role, "content": _content(text)} for role, text in turn]
    if "role" not in message and {"from", "value"} <= set(message):
        sender = message.pop("from")
        if not isinstance(sender, str) or sender not in ROLES:
            raise DataError(
                f"a message is from {sender!r}; known are {', '.join(ROLES)}. Give a tool call as "
                "{'role': 'assistant', 'tool_calls': [...]}"
            )
        message = {"role": ROLES[sender], "content": message.pop("value"), **message}
    if not isinstance(message.get("role"), str):
        raise DataError(NO_CHAT)
    calls = from_json(message.pop("tool_calls", None), "a message's tool_calls", list)
    if calls:
        message["tool_calls"] = [_tool_call(without_nulls(call)) for call in calls]
        message.setdefault("content", "")
    return [{**message, "content": _content(message.get("content"))}]


def _content(content: Any) -> str:
    """The text of a message, given as text or as a list of text blocks."""
    if isinstance(content, list) and all(isinstance(block, dict) for block in content):
        other = sorted({str(block.get("type")) for block in content} - {"text"})
        if other:
            raise DataError(f"{NO_CHAT}; content of type {', '.join(other)} is not supported")
        texts = [block.get("text") for block in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(content, str):
        raise DataError(NO_CHAT)
    return content


def _tool_call(call: Any) -> Any:
    """A tool call whose arguments are an object instead of JSON text, as chat templates expect."""
    if not isinstance(call, dict):
        raise DataError("a message's tool_calls must be a list of objects")
    if isinstance(call.get("function"), dict):
        return {**call, "function": _tool_call(call["function"])}
    arguments = from_json(call.get("arguments"), "arguments of a tool call", dict)
    return {**call, "arguments": arguments or {}}
