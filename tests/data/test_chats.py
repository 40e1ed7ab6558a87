"""Chats: the loss covers the assistant's tokens, and no message is dropped silently."""

from __future__ import annotations

import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import support.chat_templates as t
from transformers import PreTrainedTokenizerFast

import folora.data.chats
from folora.config import DataConfig
from folora.data.rows import IGNORE, prepare_task
from folora.errors import DataError

Row = dict[str, Any]


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def says(content: Any, **more: Any) -> Row:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be kind."}
ONE = [user("one?"), says("two")]
MORE = [*ONE, user("three?"), says("four")]
THOUGHT = [user("one?"), says("<think>\nwhy\n</think>\n\ntwo")]
THOUGHTS = [*THOUGHT, user("three?"), says("<think>\nhow\n</think>\n\nfour")]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLS = [
    user("weather?"),
    says("", tool_calls=[CALL]),
    {"role": "tool", "name": "weather", "content": 'it "rains"'},
    says("Rain."),
]
LONG = DataConfig(max_length=100_000)
END, CLOSED = "<|im_end|>", "<|im_end|>\n"


def learned(tokenizer: PreTrainedTokenizerFast, row: Row) -> list[str]:
    """The texts with loss, one for each run of tokens."""
    (example,) = prepare_task([row], tokenizer, LONG).train
    runs: list[list[int]] = []
    on = False
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            runs = [*runs[:-1], [*runs[-1], token]] if on else [*runs, [token]]
        on = label != IGNORE
    return [tokenizer.decode(run) for run in runs]


def whole(tokenizer: PreTrainedTokenizerFast, row: Row) -> str:
    (example,) = prepare_task([row], tokenizer, LONG).train
    return str(tokenizer.decode(example.input_ids))


EMPTY = "<think>\n\n</think>\n\n"
FOUND = {
    "one turn": (t.CHATML, ONE, ["two" + CLOSED]),
    "two turns": (t.CHATML, MORE, ["two" + CLOSED, "four" + CLOSED]),
    "system": (t.CHATML, [SYSTEM, *ONE], ["two" + CLOSED]),
    "default system": (t.DEFAULT_SYSTEM, MORE, ["two" + CLOSED, "four" + CLOSED]),
    "spaces trimmed": (t.TRIMS, [user(" one?\n"), says("\ntwo ")], ["two" + CLOSED]),
    "thinking added": (t.STRIPS_THINKING, ONE, [EMPTY + "two" + CLOSED]),
    "thinking kept": (t.STRIPS_THINKING, THOUGHT, ["<think>\nwhy\n</think>\n\ntwo" + CLOSED]),
    "thinking added at the end": (t.STRIPS_THINKING, MORE, ["two" + END, EMPTY + "four" + CLOSED]),
    "prompt begins to think": (t.BEGINS_THINKING, ONE, ["two<|end|>"]),
    "prompt begins to think, two turns": (t.BEGINS_THINKING, MORE, ["two<|end|>", "four<|end|>"]),
    "empty thinking": (t.EMPTY_THINKING, MORE, ["</think>two" + CLOSED, "</think>four" + CLOSED]),
    "the generation prompt begins the reasoning": (t.EMPTY_THINKING, THOUGHT, ["why\n</think>\n\ntwo" + CLOSED]),
    "another end": (t.DATED, MORE, ["<|message|>two<|end|>", "<|message|>four<|return|>"]),
    "one EOS": (t.ENDS_ONCE, MORE, ["two<|end|>", "four<|end|>\n</s>"]),
    "markers": (t.MARKED, MORE, ["two" + END, "four" + END]),
    "two marks in an answer": (
        t.MARKED.replace("{% generation %}", "{% generation %}={% endgeneration %} {% generation %}"),
        MORE, ["=", "two" + END, "=", "four" + END],
    ),
    "system in the user's": (t.INST, [SYSTEM, *MORE], [" two</s>", " four</s>"]),
    "another name": (t.NO_SYSTEM, MORE, ["two<end_of_turn>\n", "four<end_of_turn>\n"]),
    "no end": (t.NO_END, MORE, ["two", "four"]),
    "blocks": (t.BLOCKS, MORE, ["two" + CLOSED, "four" + CLOSED]),
    "an answer first": (t.INST, [says("hi"), *ONE], ["hi</s>", " two</s>"]),
}  # fmt: skip

FOUND["an answer first, behind a system prompt"] = (
    "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}" + t.DROPS_SYSTEM,
    [says("hi"), SYSTEM, *ONE],
    ["hi" + END, "two" + CLOSED],
)


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND)
def test_assistant_tokens_are_found(case: tuple[str, list[Row], list[str]]) -> None:
    template, messages, answers = case
    assert learned(t.byte_tokenizer(template), {"messages": messages}) == answers


LEFT_OUT = {
    "system": (t.DROPS_SYSTEM, {"messages": [SYSTEM, *ONE]}, r"leaves out the content of message 0 \(sys"),
    "system refused": (t.NO_SYSTEM, {"messages": [SYSTEM, *ONE]}, "System role not supported"),
    "earlier reasoning": (t.STRIPS_THINKING, {"messages": THOUGHTS}, "leaves out the content of message 1"),
    "reasoning": (t.BEGINS_THINKING, {"messages": THOUGHT}, "leaves out the content of message 1"),
    "marked reasoning": (t.MARKED, {"messages": THOUGHTS}, "leaves out the content of message 1"),
    "reasoning by its name": (t.CHATML, {"messages": [user("a"), says("b", reasoning_content="why")]},
                              "leaves out 'reasoning_content' of message 1"),
    "tools": (t.CHATML, {"messages": ONE, "tools": [TOOL]}, "leaves out the column 'tools'"),
    "tool calls": (t.CHATML, {"messages": CALLS}, "leaves out the tool calls of message 1"),
    "a turn of two messages": (t.MERGES, {"messages": [*ONE, says("three", weight=0), user("b")]},
                               "renders a turn differently"),
    "a count": (t.COUNTS, {"messages": MORE}, "renders a turn differently"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT.values(), ids=LEFT_OUT)
def test_templates_that_drop_part_of_a_chat_are_refused(case: tuple[str, Row, str]) -> None:
    template, row, message = case
    with pytest.raises(DataError, match=message):
        learned(t.byte_tokenizer(template), row)


def test_templates_may_drop_earlier_reasoning_outside_the_loss() -> None:
    """A template drops it at inference as well."""
    tokenizer = t.byte_tokenizer(t.STRIPS_THINKING)
    row = {"prompt": THOUGHTS[:3], "completion": THOUGHTS[3:]}
    assert learned(tokenizer, row) == ["<think>\nhow\n</think>\n\nfour" + CLOSED]
    weighted = [user("one?"), says("<think>\nwhy\n</think>\n\ntwo", weight=0), *THOUGHTS[2:]]
    assert learned(tokenizer, {"messages": weighted}) == ["<think>\nhow\n</think>\n\nfour" + CLOSED]


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_their_calls_reach_the_template(as_json: bool) -> None:
    tokenizer = t.byte_tokenizer(t.TOOLS)
    row: Row = {
        "messages": CALLS,
        "tools": [TOOL["function"]],
    }  # without "type", as in some data sets
    if as_json:
        arguments = {"name": "weather", "arguments": '{"city": "Oslo"}'}
        call = says(None, tool_calls=[{"type": "function", "function": arguments}])
        schema = '{"type": "object", "properties": {"city": {"type": "string"}}}'
        tools = f'[{{"name": "weather", "parameters": {schema}}}]'
        row = {"messages": [CALLS[0], call, *CALLS[2:]], "tools": tools}
    call_text = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    assert learned(tokenizer, row) == [call_text + CLOSED, "Rain." + CLOSED]
    assert '"properties": {"city": {"type": "string"}}' in whole(tokenizer, row)
    asked = {"instruction": "weather?", "output": "Rain.", "tools": [TOOL]}
    assert '"name": "weather"' in whole(tokenizer, asked)


def test_a_tool_use_template_is_chosen_for_rows_with_tools() -> None:
    tokenizer = t.byte_tokenizer({"default": t.CHATML, "tool_use": t.TOOLS})
    assert "weather" in whole(tokenizer, {"messages": CALLS, "tools": [TOOL]})
    assert learned(tokenizer, {"messages": ONE}) == ["two" + CLOSED]


def test_null_keys_added_by_arrow_are_ignored() -> None:
    tokenizer = t.byte_tokenizer(t.TOOLS)
    null = {"tool_calls": None, "name": None}
    call = {
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": "Oslo", "unit": None}},
    }
    messages = [{**null, **m} for m in [user("weather?"), says("", tool_calls=[call]), *CALLS[2:]]]
    assert learned(tokenizer, {"messages": messages}) == learned(tokenizer, {"messages": CALLS})


def test_templates_render_a_fixed_date() -> None:
    assert "Current date: 2024-07-26" in whole(t.byte_tokenizer(t.DATED), {"messages": ONE})


def test_message_weights_and_template_options() -> None:
    tokenizer = t.byte_tokenizer(t.CHATML)
    for key in ("weight", "train"):
        messages = [user("one?"), says("two", **{key: 0}), user("three?"), says("four", **{key: 1})]
        assert learned(tokenizer, {"messages": messages}) == ["four" + CLOSED]
    with pytest.raises(DataError, match=r"weight 0\.5, but weights must be 0 or 1"):
        learned(tokenizer, {"messages": [user("a"), says("b", weight=0.5)]})
    optional = t.byte_tokenizer("{% if loud %}LOUD{% endif %}" + t.CHATML)
    row = {"messages": ONE, "chat_template_kwargs": {"loud": True}}
    assert whole(optional, row).startswith("LOUD")


def test_ignored_fields_and_trailing_messages_are_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    learned(t.byte_tokenizer(t.NO_END), {"messages": [user("a"), says("b", score=3)]})
    assert "fields of messages not used: score" in caplog.text
    assert "1 chats end without a special token" in caplog.text


NAMES = {"HEAD", "FOOT", "PROMPT"}
TEMPLATES = {
    n: v for n, v in vars(t).items() if n.isupper() and isinstance(v, str) and n not in NAMES
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_loss_covers_assistant_tokens_only_in_any_chat(template: str) -> None:
    """In random chats that are accepted, exactly the answers with a nonzero weight have loss."""
    draw = random.Random(7)
    tokenizer = t.byte_tokenizer(template)
    for _ in range(25):
        kinds = draw.choice([["user", "assistant"] * 2, ["assistant", "user", "assistant"],
                             draw.choices(["user", "assistant", "system"], k=4)])  # fmt: skip
        if draw.random() < 0.3:
            kinds = ["system", *kinds]
        messages = [{"role": kind, "content": f"{kind[0]}{i}{'xyz'[i % 3] * draw.randrange(1, 4)}."}
                    for i, kind in enumerate(kinds)]  # fmt: skip
        for message in messages:
            message["content"] = (
                draw.choice(["", " "]) + message["content"] + draw.choice(["", "\n"])
            )
            if message["role"] == "assistant" and draw.random() < 0.2:
                message["weight"] = 0
        try:
            text = "".join(learned(tokenizer, {"messages": messages}))
        except DataError:
            continue
        for message in messages:
            wanted = message["role"] == "assistant" and message.get("weight", 1) == 1
            assert (message["content"].strip() in text) == wanted, (messages, text)


# Templates of real models, from TRL

FOLDER = (
    Path(find_spec("trl").origin or "").parent / "chat_templates" if find_spec("trl") else Path()
)
FAMILIES = sorted(p.stem for p in FOLDER.glob("*.jinja") if not p.stem.endswith("_training"))


@pytest.mark.parametrize("trl", [True, False], ids=["with TRL", "without TRL"])
@pytest.mark.parametrize("family", FAMILIES)
def test_templates_of_models(family: str, trl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer begins after its generation prompt and ends with a special token."""
    if not trl:
        monkeypatch.setattr(folora.data.chats, "find_spec", lambda _: None)
    tokenizer = t.byte_tokenizer((FOLDER / f"{family}.jinja").read_text(encoding="utf-8"))
    special = re.escape(tokenizer.eos_token) + "|" + t.SPECIAL.pattern + "|<end_of_utterance>"
    for messages, contents in ((ONE, ["two"]), (MORE, ["two", "four"]), (THOUGHT, ["two"])):
        if messages is THOUGHT and family in DROPS_REASONING[trl]:
            with pytest.raises(DataError, match="leaves out the content of message 1"):
                learned(tokenizer, {"messages": messages})
            continue
        answers = learned(tokenizer, {"messages": messages})
        assert len(answers) == len(contents)
        for answer, content in zip(answers, contents, strict=True):
            before, after = answer.split(content)
            assert not re.search("assistant|one|three", before)
            assert ("why" in before) == (messages is THOUGHT)
            if trl or family != "glm4moe":
                assert re.fullmatch(f"({special}|\\s)+", after)


DROPS_REASONING = {
    True: {"deepseekv3"},
    False: {"deepseekv3", "deepseek_r1_distill"},
}


@pytest.mark.skipif(not FAMILIES, reason="needs TRL")
@pytest.mark.parametrize(
    "family", ["qwen3", "qwen3_6", "gptoss", "phi3", "deepseekv3", "nemotron_3_nano"]
)
def test_the_loss_mask_matches_trl(family: str) -> None:
    """Except for the header of an answer, which the generation prompt contains."""
    from trl.chat_template_utils import get_training_chat_template

    tokenizer = t.byte_tokenizer((FOLDER / f"{family}.jinja").read_text(encoding="utf-8"))
    (example,) = prepare_task([{"messages": MORE}], tokenizer, LONG).train
    theirs = tokenizer.apply_chat_template(
        MORE, chat_template=get_training_chat_template(tokenizer), return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    ours = [label != IGNORE for label in example.labels]
    if family != "gptoss":  # its template renders the current date
        assert example.input_ids == theirs["input_ids"]
    extra = [
        token
        for token, mine, other in zip(
            theirs["input_ids"][::-1], ours[::-1], theirs["assistant_masks"][::-1], strict=False
        )
        if other and not mine
    ]
    header = tokenizer.decode(extra[::-1])
    assert not re.search("two|four|end", header)
    assert sum(ours) + len(extra) == sum(theirs["assistant_masks"])
