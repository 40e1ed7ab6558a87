"""Every format of rows is read, or refused with a remedy; no column is dropped silently.

The rows have TRL's formats and types, and the columns of well-known instruction sets.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from support import chat_templates

from folora.config import DataConfig
from folora.data.files import load_rows
from folora.data.formats import FORMATS
from folora.data.rows import IGNORE, prepare_task
from folora.errors import DataError

Row = dict[str, Any]
DOCS = Path(__file__).parents[2] / "docs" / "data.md"

TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|{{ m.role[0] }}|>{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)


def read(rows: Sequence[Row], chat: bool = True, **options: Any) -> tuple[str, str]:
    """The text of the tokenized rows, and of the tokens with loss."""
    tokenizer = chat_templates.byte_tokenizer(TEMPLATE if chat else None)
    task = prepare_task(rows, tokenizer, DataConfig(eval_rows=0, **options))
    ids = [token for e in task.train for token in e.input_ids]
    learned = [token for e in task.train for token in e.labels if token != IGNORE]
    return tokenizer.decode(ids), tokenizer.decode(learned)


def turn(role: str, content: Any) -> Row:
    return {"role": role, "content": content}


def said(sender: str, value: str, **more: Any) -> Row:
    return {"from": sender, "value": value, **more}


USER, ANSWER = turn("user", "u"), turn("assistant", "a")
CHAT = [USER, ANSWER]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
BOTH = "<|u|>u<|end|><|a|>a<|end|>"

# TRL's types of rows, standard and conversational.

TRL: dict[str, tuple[Row, str | tuple[str, str]]] = {
    "language modeling": ({"text": "t"}, ("t</s>", "t</s>")),
    "language modeling, chat": ({"messages": CHAT}, (BOTH, "a<|end|>")),
    "language modeling, tools": (
        {"messages": CHAT, "tools": TOOLS},
        (f"<|tools|>{json.dumps(TOOLS)}{BOTH}", "a<|end|>"),
    ),
    "prompt-only": ({"prompt": "u"}, "prompt alone.*Add a completion"),
    "prompt-only, chat": ({"prompt": [USER]}, "prompt alone.*Add a completion"),
    "prompt-completion": ({"prompt": "u", "completion": "a"}, ("ua</s>", "a</s>")),
    "prompt-completion, chat": ({"prompt": [USER], "completion": [ANSWER]}, (BOTH, "a<|end|>")),
    "preference": ({"prompt": "u", "chosen": "a", "rejected": "b"}, "preference.*rename chosen"),
    "preference, chat": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]},
        "preference.*rename chosen",
    ),
    "preference, implicit prompt": ({"chosen": "ua", "rejected": "ub"}, "preference.*rename chosen"),
    "preference, implicit prompt, chat": ({"chosen": CHAT, "rejected": CHAT}, "to messages or text"),
    "unpaired preference": (
        {"prompt": "u", "completion": "a", "label": False},
        "unpaired preference.*keep the rows whose label is true",
    ),
    "unpaired preference, chat": (
        {"prompt": [USER], "completion": [ANSWER], "label": True},
        "unpaired preference.*keep the rows whose label is true",
    ),
    "stepwise supervision": (
        {"prompt": "u", "completions": ["a", "b"], "labels": [True, False]},
        "stepwise supervision.*Join the steps",
    ),
    "text with images": ({"messages": CHAT, "images": ["x.png"]}, "'images' changes what a row"),
    "image in the content": (
        {"messages": [turn("user", [{"type": "image"}, {"type": "text", "text": "u"}]), ANSWER]},
        "content of type image is not supported",
    ),
    "blocks of text": (
        {"messages": [turn("user", [{"type": "text", "text": "u"}]), ANSWER]},
        (BOTH, "a<|end|>"),
    ),
}  # fmt: skip

# Well-known instruction sets.

SETS: dict[str, tuple[Row, str | tuple[str, str]]] = {
    "Alpaca": (
        {"instruction": "i", "input": "n", "output": "a", "text": "Below is ..."},
        ("<|u|>i\n\nn<|end|><|a|>a<|end|>", "a<|end|>"),
    ),
    "Alpaca with a system prompt and a history": (
        {"instruction": "i", "output": "a", "system": "s", "history": [["x", "y"]]},
        "'history' changes what a row means",
    ),
    "Dolly": (
        {"instruction": "i", "context": "c", "response": "a", "category": "qa"},
        ("<|u|>i\n\nc<|end|><|a|>a<|end|>", "a<|end|>"),
    ),
    "OpenAssistant": (
        {"message_id": "1", "parent_id": None, "text": "u", "role": "prompter", "lang": "en"},
        "text/role.*are refused",
    ),
    "OpenAssistant reply": (
        {"message_id": "2", "parent_id": "1", "text": "u", "role": "assistant", "lang": "en"},
        "message tree.*Follow parent_id",
    ),
    "Guanaco": ({"text": "### Human: u### Assistant: a"}, ("### Human: u### Assistant: a</s>",) * 2),
    "ShareGPT": (
        {"id": "1", "conversations": [said("human", "u"), said("gpt", "a", markdown=None)]},
        (BOTH, "a<|end|>"),
    ),
    "OpenOrca": (
        {"id": "1", "system_prompt": "s", "question": "u", "response": "a"},
        (f"<|s|>s<|end|>{BOTH}", "a<|end|>"),
    ),
    "OpenOrca without a system prompt": (
        {"id": "1", "system_prompt": "", "question": "u", "response": "a"},
        (BOTH, "a<|end|>"),
    ),
    "SlimOrca": (
        {"conversations": [said("system", "s", weight=None), said("human", "u", weight=0.0),
                           said("gpt", "a", weight=1.0)]},
        (f"<|s|>s<|end|>{BOTH}", "a<|end|>"),
    ),
    "UltraChat": ({"prompt": "u", "prompt_id": "1", "messages": CHAT}, (BOTH, "a<|end|>")),
    "UltraChat, raw": ({"id": "1", "data": ["u", "a"]}, r"columns \['data', 'id'\]; known are"),
    "WizardLM": ({"instruction": "u", "output": "a"}, (BOTH, "a<|end|>")),
    "LIMA": ({"conversations": ["u", "a"], "source": "wiki"}, (BOTH, "a<|end|>")),
    "Tulu 3": ({"id": "1", "messages": CHAT, "source": "x"}, (BOTH, "a<|end|>")),
    "OpenHermes 2.5": (
        {"conversations": [said("human", "u", weight=None), said("gpt", "a", weight=None)],
         "system_prompt": None, "title": None, "idx": None, "source": "x", "custom_instruction": None},
        (BOTH, "a<|end|>"),
    ),
    "GSM8K": ({"question": "u", "answer": "a"}, (BOTH, "a<|end|>")),
    "MetaMathQA": (
        {"query": "u", "response": "a", "type": "x", "original_question": "v"},
        (BOTH, "a<|end|>"),
    ),
    "CodeAlpaca": ({"instruction": "u", "input": "", "output": "a"}, (BOTH, "a<|end|>")),
    "Magicoder": ({"lang": "py", "problem": "u", "solution": "a", "seed": "x"}, (BOTH, "a<|end|>")),
    "FLAN": ({"inputs": "u", "targets": "a", "task": "x"}, (BOTH, "a<|end|>")),
    "P3": (
        {"inputs": [1, 2], "inputs_pretokenized": "u", "targets": [3], "targets_pretokenized": "a"},
        (BOTH, "a<|end|>"),
    ),
    "SQuAD": (
        {"id": "1", "title": "t", "context": "c", "question": "u",
         "answers": {"text": ["a"], "answer_start": [0]}},
        r"columns \['answers', 'context', 'id', 'question', 'title'\]; known are",
    ),
    "SQuAD with one answer": (
        {"id": "1", "context": "c", "question": "u", "answer": "a"},
        ("<|u|>c\n\nu<|end|><|a|>a<|end|>", "a<|end|>"),
    ),
    "Natural Questions": (
        {"question": "u", "answer": ["a", "b"]},
        "'answer' holds list, not text",
    ),
    "CommonsenseQA": (
        {"question": "u", "choices": ["a", "b"], "answer": "a"},
        "'choices' changes what a row means",
    ),
    "UltraFeedback": (
        {"prompt": "u", "prompt_id": "1", "chosen": CHAT, "rejected": CHAT, "messages": CHAT,
         "score_chosen": 9.0},
        "preference.*remove rejected",
    ),
    "HH-RLHF": ({"chosen": "Human: u", "rejected": "Human: v"}, "preference.*or text"),
    "HelpSteer": ({"prompt": "u", "response": "a", "helpfulness": 4}, "rename prompt to instruction"),
    "Capybara": (
        {"source": "x", "conversation": [{"input": "u", "output": "a"}]},
        (BOTH, "a<|end|>"),
    ),
    "No Robots": (
        {"prompt": "u", "prompt_id": "1", "messages": CHAT, "category": "x"},
        (BOTH, "a<|end|>"),
    ),
    "xLAM function calls": (
        {"id": 1, "query": "u", "answers": '[{"name": "f", "arguments": {}}]', "tools": "[]"},
        "in tool_calls of an assistant's message",
    ),
    "Glaive function calls": ({"system": "s", "chat": "USER: u"}, r"columns \['chat', 'system'\]; known"),
    "ToolBench": (
        {"conversations": [said("human", "u"), said("function_call", "{}")], "tools": TOOLS},
        "from 'function_call'; known are .*tool_calls",
    ),
    "NuminaMath": (
        {"source": "x", "problem": "u", "solution": "a", "messages": CHAT},
        (BOTH, "a<|end|>"),
    ),
    "OpenMathInstruct-2": (
        {"problem": "u", "generated_solution": "a", "expected_answer": "7", "problem_source": "x"},
        (BOTH, "a<|end|>"),
    ),
    "MATH": ({"problem": "u", "level": "1", "solution": "a", "answer": "7"}, (BOTH, "a<|end|>")),
    "MBPP": ({"text": "u", "code": "a"}, "--data.prompt_column text --data.response_column code"),
    "IMDB": ({"text": "t", "label": 1}, "'label' changes what a row means"),
    "C4": ({"text": "t", "timestamp": "x", "url": "y"}, ("t</s>", "t</s>")),
    "OpenAI's weights": (
        {"messages": [USER, {**ANSWER, "weight": 0}, turn("user", "v"), turn("assistant", "b")]},
        (f"{BOTH}<|u|>v<|end|><|a|>b<|end|>", "b<|end|>"),
    ),
}  # fmt: skip

# Tokenized rows, and columns that contradict each other.

TOKENS: dict[str, tuple[Row, str | tuple[str, str]]] = {
    "tokens": ({"input_ids": [64, 65]}, ("ab", "ab")),
    "labels": ({"input_ids": [64, 65], "labels": [-100, 65]}, ("ab", "b")),
    "completion mask": ({"input_ids": [64, 65], "completion_mask": [0, 1]}, ("ab", "b")),
    "both masks": (
        {"input_ids": [64, 65, 66], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]},
        ("abc", "b"),
    ),
    "padding": (
        {"input_ids": [9, 64, 65, 9], "attention_mask": [0, 1, 1, 0], "labels": [-100, -100, 65, -100]},
        ("ab", "b"),
    ),
    "tokens and text": ({"text": "x", "input_ids": [64, 65]}, ("ab", "ab")),
    "gap in the attention mask": ({"input_ids": [64, 65, 66], "attention_mask": [1, 0, 1]}, "0 between tokens"),
    "attention mask of zeros": (
        {"input_ids": [64, 65], "attention_mask": [0, 0]},
        "attention_mask is 0 for every token",
    ),
    "shifted labels": ({"input_ids": [64, 65], "labels": [65, -100]}, "not shifted"),
    "labels of another length": ({"input_ids": [64, 65], "labels": [65]}, "1 entries, but 'input_ids' 2"),
    "empty tokens": ({"input_ids": [], "labels": []}, "must hold token ids"),
    "nested lists": ({"input_ids": [[64], [65]]}, "list of integers"),
    "packed": ({"input_ids": [64, 65], "position_ids": [0, 0]}, "'position_ids' changes"),
    "number as input": ({"instruction": "i", "input": 0, "output": "a"}, "'input' holds int, not text"),
    "two system prompts": (
        {"instruction": "i", "output": "a", "system": "s", "system_prompt": "t"},
        "system and system_prompt differ",
    ),
    "system column equal to the system message": (
        {"messages": [turn("system", "s"), *CHAT], "system": "s"},
        (f"<|s|>s<|end|>{BOTH}", "a<|end|>"),
    ),
    "system column different from the system message": (
        {"messages": [turn("system", "s"), *CHAT], "system": "t"},
        "the system prompts in the column and in the messages differ",
    ),
    "system column with text": ({"prompt": "u", "completion": "a", "system": "s"}, "'system' is for chats"),
    "tools column with text": ({"prompt": "u", "completion": "a", "tools": TOOLS}, "'tools' is for chats"),
    "context column with text": ({"prompt": "u", "completion": "a", "context": "c"}, "'context' changes"),
    "tools that are not JSON": ({"messages": CHAT, "tools": "f(x)"}, "'tools' must hold a list or its JSON"),
    "completion that ends with EOS": ({"prompt": "u", "completion": "a</s>"}, ("ua</s>", "a</s>")),
    "text block without text": ({"messages": [turn("user", [{"type": "text"}]), ANSWER]}, "must be a list of"),
    "sender that is not a string": ({"conversations": [said(["x"], "u")]}, "known are human"),
    "template option that folora sets": (
        {"messages": CHAT, "chat_template_kwargs": {"add_generation_prompt": True}},
        "holds 'add_generation_prompt', which folora sets itself",
    ),
    "template options that are not a dict": ({"messages": CHAT, "chat_template_kwargs": [1]}, "must hold a dict, not list"),
    "empty answer of a chat": ({"question": "u", "answer": ""}, ("<|u|>u<|end|><|a|><|end|>", "<|end|>")),
    "label beside an instruction": ({"instruction": "u", "output": "a", "label": 0}, "'label' changes"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*(TRL | SETS | TOKENS).values()], ids=[*(TRL | SETS | TOKENS)])
def test_every_documented_format_is_read_or_refused(
    case: tuple[Row, str | tuple[str, str]],
) -> None:
    row, expected = case
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            read([row])
    else:
        assert read([row]) == expected


def test_without_a_template_the_system_prompt_precedes_the_alpaca_text() -> None:
    row = {"system": "Be kind.", "instruction": "i", "context": "c", "response": "a"}
    text, learned = read([row], chat=False)
    assert text.startswith("Be kind.\n\nBelow is an instruction")
    assert "### Instruction:\ni\n\nc\n\n### Response:\na</s>" in text
    assert learned == "a</s>"
    with pytest.raises(DataError, match="'tools' and 'chat_template_kwargs' need a chat template"):
        read([{**row, "tools": TOOLS}], chat=False)


def test_named_columns_are_used_with_context_and_system() -> None:
    named = {"prompt_column": "question", "response_column": "reply"}
    row: Row = {"question": "u", "reply": "a", "context": "c", "system": "s"}
    text, _ = read([row], **named)
    assert text == "<|s|>s<|end|><|u|>c\n\nu<|end|><|a|>a<|end|>"
    with pytest.raises(DataError, match="'label' changes"):
        read([{**row, "label": 0}], **named)
    pairs = [{"prompt": "u", "chosen": "a", "rejected": "b"}]
    assert read(pairs, prompt_column="prompt", response_column="chosen") == ("ua</s>", "a</s>")
    assert (
        read([{"text": "u", "label": "a"}], prompt_column="text", response_column="label")[1]
        == "a<|end|>"
    )


def test_unused_columns_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    read(
        [
            {
                "instruction": "i",
                "context": "c",
                "response": "a",
                "category": "qa",
                "id": 3,
                "note": None,
            }
        ]
    )
    assert "rows are read as instruction: columns instruction, context, response" in caplog.text
    assert "columns not used: category, id" in caplog.text
    caplog.clear()
    read([{"prompt": "u", "completion": "a"}])
    assert "not used" not in caplog.text


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ({"prompt": "u", "completion": "a", "label": False}, "unpaired preference"),
        ({"prompt": "u", "completion": "a", "context": "c"}, "'context' changes"),
        ({"question": "u", "answer": "a"}, "row 5: column 'prompt' holds NoneType"),
        ({"messages": CHAT}, "row 0: a chat must be"),
    ],
)  # fmt: skip
def test_every_row_is_checked(later: Row, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read([{"prompt": "u", "completion": "a"}] * 5 + [later])


def test_columns_that_only_later_rows_fill_are_used() -> None:
    rows = [{"instruction": "i", "output": "a"}] * 5 + [
        {"instruction": "i", "input": "n", "output": "a"}
    ]
    assert "i\n\nn" in read(rows)[0]


def test_truncated_rows_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    read(
        [{"prompt": "u", "completion": "a" * 20}, {"prompt": "u", "completion": "a"}], max_length=5
    )
    assert "1 of 2 rows truncated to data.max_length = 5 tokens" in caplog.text


def test_messages_in_the_columns_of_an_instruction_are_a_chat() -> None:
    assert read([{"question": [USER], "answer": [ANSWER]}]) == (BOTH, "a<|end|>")


@pytest.mark.parametrize("prompt", ["u", "<s>u"])
def test_bos_and_eos_of_the_tokenizer_are_not_doubled(prompt: str) -> None:
    tokenizer = chat_templates.byte_tokenizer(None)
    tokenizer.add_bos_token = tokenizer.add_eos_token = True
    rows = [{"prompt": prompt, "completion": "a"}]
    (example,) = prepare_task(rows, tokenizer, DataConfig()).train
    assert tokenizer.decode(example.input_ids) == "<s>ua</s>"


# Data sets in memory

ROWS = [{"prompt": "u", "completion": str(i)} for i in range(12)]


def test_splits_of_a_dataset() -> None:
    both = DatasetDict(train=Dataset.from_list(ROWS[:8]), test=Dataset.from_list(ROWS[8:]))
    assert load_rows(both) == ROWS[:8]
    assert load_rows(both, "test") == ROWS[8:]
    with pytest.raises(DataError, match=r"no split 'dev', only \['test', 'train'\]"):
        load_rows(both, "dev")


def test_columns_of_tensors_are_read() -> None:
    rows = Dataset.from_list([{"input_ids": [64, 65], "labels": [-100, 65]}]).with_format("torch")
    assert read(load_rows(rows)) == ("ab", "b")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (IterableDataset.from_generator(lambda: iter(ROWS)), r"list\(dataset.take\(10000\)\)"),
        ((row for row in ROWS), "generator has no length"),
        ({"prompt": ["u"], "completion": ["a"]}, r"no split 'train', only \['completion', 'prompt'\]"),
        (["u", "a"], "row 0 of the data set is str, but must be a dict"),
        ([{1: "u", 2: "a"}], "dict of named columns"),
        (Dataset.from_list(ROWS).to_pandas(), r"frame.to_dict\('records'\)"),
        ([], "has no rows"),
    ],
    ids=["IterableDataset", "generator", "columns", "texts", "numbers", "DataFrame", "nothing"],
)  # fmt: skip
def test_values_that_are_not_rows_are_refused(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(given)


# Real data sets and the documentation

REAL = Path(os.environ.get("FOLORA_DATA_DIR", "/nowhere"))
USED = {
    "gsm8k/train": "question/answer", "math/train": "problem/solution", "flan_cot/train": "question/answer",
    "gpteacher_codegen/train": "instruction/response", "dolly_hhrlhf/train": "instruction/response",
    "oasst_octopack/train": "instruction/response", "squad_v2_answerable/validation_sub": "question/answer", "wikitext2/test": "text",
}  # fmt: skip
REFUSED = {
    "mawps/train": "'answer' holds float", "mbpp/train": "text/code", "arc_easy/train": "known are",
    "nq_open/validation": "'answer' holds list", "ifeval/test": "prompt alone",
}  # fmt: skip


@pytest.mark.skipif(not REAL.is_dir(), reason="needs FOLORA_DATA_DIR")
@pytest.mark.parametrize("name", [*USED, *REFUSED])
def test_real_datasets_are_read(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rows = load_rows(str(REAL / f"{name}.jsonl.gz"))[:12]
    if message := REFUSED.get(name):
        with pytest.raises(DataError, match=message):
            read(rows, max_length=100_000)
        return
    text, learned = read(rows, max_length=100_000)
    columns = USED[name].split("/")
    assert all(name in caplog.text for name in columns)
    for row in rows:
        assert row[columns[-1]] in learned
        assert all(row[c] in text for c in ("context", "input") if c in row)


def test_the_documentation_lists_the_formats() -> None:
    def code(names: Sequence[str]) -> str:
        return ", ".join(f"`{name}`" for name in names)

    listed = [
        f"| {f.name} | {code(f.columns)} | {code(f.optional)} | {'' if f.read else 'Refused. '}{f.note} |"
        for f in FORMATS
    ]
    text = DOCS.read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if re.match(r"\| \w.*`", line)]
    assert table == listed
