"""A chat by a tokenizer's chat template, and which of its tokens the assistant says.

Templates are programs: some render a turn differently once others follow, drop its reasoning, or
begin the answer in the prompt. So several ways are tried, the strictest first; a way is taken only
if the template shows every message and the tokens of every answer are found.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise, takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from folora.data.formats import Chat, check_unicode
from folora.data.messages import WEIGHTS, Message
from folora.errors import DataError

MARKERS = re.compile(r"\{%-?\s*generation\b")
REASONING = ("reasoning_content", "reasoning", "thinking")
NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
# For templates that write today's date: the same rows must give the same tokens tomorrow.
DATE = datetime(2024, 7, 26, tzinfo=UTC)  # what Llama 3's write where they know none
DIFFERENT = (
    "this chat template renders a turn differently once others follow, so the assistant's tokens "
    "cannot be found. Give prompt/completion rows, or a template with {% generation %} markers "
    "(TRL, where it is installed, has one for many models)"
)

STRICT = "the chat template"

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """The tokens of a chat, and where those of each learned answer begin and end."""

    input_ids: list[int]
    answers: list[Span]


class ChatTokenizer:
    """Tokenizes chats by one tokenizer's template.

    Attributes:
        ways: How often each way of finding the answers was taken.
        unended: How many chats end without a token that the model could stop by.
        unused: Fields of messages that the template does not read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ways: Counter[str] = Counter()
        self.unended = 0
        self.unused: set[str] = set()

    def __call__(self, chat: Chat) -> Rendered:
        """The tokens of a chat.

        Raises:
            DataError: The template refuses the chat or leaves something of it out, or the tokens of
                an answer cannot be found.
        """
        if self.tokenizer.chat_template is None:
            raise DataError(
                "the data are chats, but this tokenizer has no chat template. Take the tokenizer of "
                "an instruction-tuned model, or give prompt/completion rows"
            )
        own = self.tokenizer.get_chat_template(tools=[*chat.tools] or None)
        last: DataError | None = None
        for way, find in self._ways(chat, own):
            try:
                found = find()
            except DataError as error:
                last = error
                continue
            self.ways[way] += 1
            self.unended += not self._ends(found)
            self.unused |= {k for m in chat.messages for k in m if k not in own} - {
                *WEIGHTS,
                *REASONING,
            }
            return found
        raise last or DataError(DIFFERENT)

    def _ways(self, chat: Chat, own: str) -> Iterator[tuple[str, Callable[[], Rendered]]]:
        yield STRICT, lambda: self._by_prefixes(chat, strict=True)
        if MARKERS.search(own):
            yield "the generation markers", lambda: self._by_markers(chat, own)
        if training := self._training_template:
            yield "TRL's training template", lambda: self._by_markers(chat, training)
        yield "the chat template and the contents", lambda: self._by_prefixes(chat)

    @cached_property
    def _training_template(self) -> str | None:
        """TRL's version of this template that is fit for training, if TRL is there and has one."""
        if find_spec("trl") is None:
            return None
        try:
            found: str | None = import_module("trl.chat_template_utils").get_training_chat_template(
                self.tokenizer
            )
        except Exception:  # a template that it does not know, or an older TRL
            return None
        return found

    # Ways to find the answers

    def _by_prefixes(self, chat: Chat, *, strict: bool = False) -> Rendered:
        """An answer is what follows the messages before it and the header of an answer.

        Strictly, the prompt and the chat up to the answer must be prefixes of the whole chat, and the
        answer must end by a special token. Else an answer may begin where its prompt and the chat
        part, and end by the first special token behind its content.
        """
        ids = self._tokens(self._whole(chat))
        answers = []
        for i in chat.learned:
            prompt = self._prompt(chat, i)
            start = _common(prompt, ids)
            upto = self._tokens(self._render(chat, i + 1))
            end = len(upto) if ids[: len(upto)] == upto else None
            if i and start < len(prompt):  # it begins the answer, with "<think>" for example
                before = _common(self._tokens(self._render(chat, i)), ids)
                if strict or start <= before:
                    raise DataError(DIFFERENT)
            if end is None:
                if strict:
                    raise DataError(DIFFERENT)
                end = self._end(ids, start, chat.messages[i : i + 2])
            answers.append((start, end))
        found = Rendered(ids, answers)
        _check_order(found)
        if strict and not self._ends(found):
            raise DataError("the chat template ends an answer without a special token")
        return found

    def _by_markers(self, chat: Chat, template: str) -> Rendered:
        """An answer is what the template marks, without what its prompt gives already."""
        self._whole(chat, template)
        try:
            read: Any = self.tokenizer.apply_chat_template(
                self._given(chat.messages), tokenize=True, return_dict=True,
                return_assistant_tokens_mask=True, **self._arguments(chat, template),
            )  # fmt: skip
        except Exception as error:  # a template is a program; a slow tokenizer has no offsets
            raise DataError(f"the markers of the chat template fail: {error}") from error
        ids, marked = read["input_ids"], _runs(read["assistant_masks"])
        said = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
        if len(marked) == len(said):
            answers = [
                (max(start, min(_common(self._prompt(chat, i, template), ids), end - 1)), end)
                for i, (start, end) in zip(said, marked, strict=True)
                if i in chat.learned
            ]
        elif marked and [*chat.learned] == said:  # several marks in one answer
            answers = marked
        else:
            raise DataError(DIFFERENT)
        found = Rendered(ids, answers)
        _check_order(found)
        if not self._ends(found):
            raise DataError("the markers leave out the token that ends an answer")
        return found

    def _prompt(self, chat: Chat, i: int, template: str | None = None) -> list[int]:
        """What the model reads before answer `i`, up to where it writes itself.

        Before the first message there is no chat to render; the chat with another content there begins
        by the same tokens.
        """
        if i:
            return self._tokens(self._render(chat, i, template, prompt=True))
        first = chat.messages[0]
        other = {**first, "content": "1" if first["content"].lstrip()[:1] != "1" else "2"}
        changed = replace(chat, messages=[other, *chat.messages[1:]])
        return self._tokens(self._render(changed, len(chat.messages), template))

    # Where an answer ends

    def _end(self, ids: list[int], start: int, messages: Sequence[Message]) -> int:
        """Behind the first special token that comes after the content of the first message."""
        content = _squeezed(messages[0]["content"])
        merged = any(message["role"] == "assistant" for message in messages[1:])
        if content and not merged and "tool_calls" not in messages[0]:
            for i in range(start, len(ids)):
                if ids[i] in self._special and content in _squeezed(self._decode(ids[start:i])):
                    return i + 1
        raise DataError(DIFFERENT)

    def _ends(self, found: Rendered) -> bool:
        """Whether the last answer ends by a special token, so that a model learns to stop."""
        answer = found.input_ids[slice(*found.answers[-1])]
        last = next((token for token in reversed(answer) if self._decode([token]).strip()), None)
        return last in self._special

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.get_added_vocab().values()
        return frozenset({*added, *self.tokenizer.all_special_ids})

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    # Rendering

    def _whole(self, chat: Chat, template: str | None = None) -> str:
        """The text of a chat, if the template leaves nothing of it out."""
        count = len(chat.messages)
        text = self._render(chat, count, template)
        shown = _squeezed(text)
        for i, message in enumerate(chat.messages):
            for what, value in _parts(message, learned=i in chat.learned):
                if _squeezed(value) not in shown and _squeezed(_quoted(value)) not in shown:
                    raise DataError(
                        _left_out(f"{what} of message {i} ({message['role']}), {value[:40]!r}")
                    )
        without = {"the column 'tools'": replace(chat, tools=())} if chat.tools else {}
        for i in (i for i in chat.learned if "tool_calls" in chat.messages[i]):
            bare = {k: v for k, v in chat.messages[i].items() if k != "tool_calls"}
            messages = [*chat.messages[:i], bare, *chat.messages[i + 1 :]]
            without[f"the tool calls of message {i}"] = replace(chat, messages=messages)
        for what, changed in without.items():
            if text == self._attempt(changed, template):
                raise DataError(_left_out(what))
        return text

    def _attempt(self, chat: Chat, template: str | None) -> str | None:
        """The text of a chat; None if the template refuses it."""
        try:
            return self._render(chat, len(chat.messages), template)
        except DataError:
            return None

    def _render(
        self, chat: Chat, count: int, template: str | None = None, *, prompt: bool = False
    ) -> str:
        """The text of the first messages; with `prompt` the header of an answer follows."""
        if not count:
            return ""
        text = self._apply(
            self._given(chat.messages[:count]), add_generation_prompt=prompt, **self._arguments(chat, template),
        )  # fmt: skip
        check_unicode(text, "the chat")  # a role, or whatever the template adds
        return text

    def _apply(self, messages: list[Message], **arguments: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **arguments))
        except Exception as error:  # a template is a program, and may raise what it likes
            raise DataError(f"the tokenizer's chat template refuses this chat: {error}") from error

    def _arguments(self, chat: Chat, template: str | None) -> dict[str, Any]:
        tools = [*chat.tools] or None
        text = template or self.tokenizer.get_chat_template(tools=tools)
        return {"tools": tools, "chat_template": NOW.sub(_date, text), **chat.options}

    def _given(self, messages: Sequence[Message]) -> list[Message]:
        """Messages as the template takes them."""
        plain = [{k: v for k, v in m.items() if k not in WEIGHTS} for m in messages]
        return [_in_blocks(m) for m in plain] if self._takes_blocks else plain

    @cached_property
    def _takes_blocks(self) -> bool:
        """Whether the template shows contents as lists of blocks alone, as those for pictures do."""
        message = {"role": "user", "content": "0#folora#0"}
        for given in (message, _in_blocks(message)):
            try:
                if message["content"] in self._apply([given]):
                    return given is not message
            except DataError:
                continue
        return False

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _parts(message: Message, *, learned: bool) -> Iterator[tuple[str, str]]:
    """What must be seen of a message; earlier reasoning may go, as it does in use."""
    if learned or message["role"] != "assistant":
        yield "the content", message["content"]
    if learned:
        yield from ((f"{k!r}", message[k]) for k in REASONING if isinstance(message.get(k), str))


def _left_out(what: str) -> str:
    return f"the chat template leaves out {what}. Remove it, or take a template that shows it"


def _date(call: re.Match[str]) -> str:
    return json.dumps(DATE.strftime(call[2]))


def _in_blocks(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _squeezed(text: str) -> str:
    """Without white space, which templates trim and add."""
    return "".join(text.split())


def _quoted(text: str) -> str:
    """As it stands in JSON, in which some templates show what a tool gave."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _runs(mask: Sequence[int]) -> list[Span]:
    """Where the mask is 1, run by run."""
    edges = [i for i, (a, b) in enumerate(pairwise([0, *mask, 0])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _check_order(found: Rendered) -> None:
    borders = [border for answer in found.answers for border in answer]
    empty = any(start >= end for start, end in found.answers)
    if empty or borders != sorted(borders) or borders[-1] > len(found.input_ids):
        raise DataError(DIFFERENT)
