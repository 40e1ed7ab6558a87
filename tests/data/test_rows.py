"""Tokenized rows: only the response has loss, in every format."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from benchmarks.tiny import make_tokenizer
from folora.config import DataConfig
from folora.data.contents import ALPACA, IGNORE, Example
from folora.data.files import load_rows, local_format
from folora.data.formats import choose_format
from folora.data.rows import Formatter, batches, pad_batch, prepare_task
from folora.errors import DataError


def one(row: dict[str, Any], chat: bool = False, **options: Any) -> tuple[str, str, Example]:
    """The text before the loss, the text with loss, and the example."""
    tokenizer = make_tokenizer(chat=chat)
    example = Formatter(list(row), tokenizer, DataConfig(**options))(row, 0)
    learned = [
        t for t, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORE
    ]
    masked = [
        t for t, label in zip(example.input_ids, example.labels, strict=True) if label == IGNORE
    ]
    assert len(example.input_ids) == len(example.labels)

    def text(ids: list[int]) -> str:
        return "".join(tokenizer.convert_ids_to_tokens(ids))

    return text(masked), text(learned), example


def test_prompt_and_completion_are_kept_verbatim() -> None:
    assert one({"prompt": "1+1=", "completion": "2"})[:2] == ("1+1=", "2</s>")
    assert one({"prompt": "1+1=", "completion": "2"}, chat=True)[:2] == ("1+1=", "2</s>")


def test_instructions_use_the_chat_template_or_alpacas() -> None:
    row = {"instruction": "add", "input": "1 1", "output": "2"}
    assert one(row, chat=True)[:2] == ("<s>u:add\n\n1 1</s><s>a:", "2</s>")
    before, learned, _ = one(row)
    assert learned == "2</s>"
    assert len(before) >= len(ALPACA) - len("{instruction}")
    assert one(row, chat=True, chat_template=False)[1] == "2</s>"


def test_question_and_answer() -> None:
    assert one({"question": "who", "answer": "me"}, chat=True)[:2] == (
        "<s>u:who</s><s>a:",
        "me</s>",
    )


def test_the_loss_covers_every_assistant_turn() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    before, learned, _ = one({"messages": messages}, chat=True)
    assert learned == "b</s>d</s>"
    assert before == "<s>u:a</s><s>a:<s>u:c</s><s>a:"
    row = {"prompt": messages[:3], "completion": messages[3:]}
    assert one(row, chat=True)[1] == "d</s>"


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages|length }}" + str(tokenizer.chat_template)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                        {"role": "user", "content": "c"}]}  # fmt: skip
    with pytest.raises(DataError, match="renders a turn differently"):
        Formatter(list(row), tokenizer, DataConfig())(row, 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": "x", "b": "y"}, "no prompt and response among"),
        ({"prompt": 3, "completion": "y"}, "row 0.*'prompt' holds int"),
        ({"prompt": "x", "completion": ""}, "response is empty"),
        ({"messages": "hello"}, "no chat template|list of"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        one(row)


def test_columns_can_be_named() -> None:
    config = DataConfig(prompt_column="q", response_column="a")
    assert choose_format(["q", "a", "z"], config).columns == ("q", "a")
    with pytest.raises(DataError, match="did you mean 'question'"):
        choose_format(["question", "a"], DataConfig(prompt_column="qestion", response_column="a"))
    with pytest.raises(DataError, match="both"):
        choose_format(["q", "a"], DataConfig(prompt_column="q"))


ROWS = [{"prompt": "p" * (n % 7 + 1), "completion": "c" * (n % 3 + 1)} for n in range(30)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_a_compressed_file_larger_than_memory_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two million bytes of rows with 4 MB of free memory."""
    path = tmp_path / name
    given = [{"prompt": "x" * 1000, "completion": f"{i}{'y' * 1000}"} for i in range(1000)]
    lines = "\n".join(map(json.dumps, given)).encode()
    if name.endswith("parquet"):
        Dataset.from_list(given).to_parquet(path)
    else:
        path.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    assert len(load_rows(str(path))) == 1000
    free = SimpleNamespace(available=4_000_000)
    monkeypatch.setattr("folora.data.files.psutil.virtual_memory", lambda: free)
    with pytest.raises(DataError, match=rf"{name} cannot be read .*more than 0\.001 GB"):
        load_rows(str(path))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet"])
def test_local_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    lines = "\n".join(json.dumps(r) for r in ROWS)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith("parquet"):
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        path.write_text(json.dumps(ROWS) if name.endswith(".json") else lines)
    assert load_rows(str(path)) == ROWS
    assert local_format(name) == ("parquet" if name.endswith("parquet") else "json")


def test_json_values_are_read_verbatim(tmp_path: Path) -> None:
    """Dates stay text; a byte order mark, multi-line objects and several on a line are accepted."""
    row = {"prompt": "when", "completion": "2020-01-02"}
    for text in (json.dumps(row), "\ufeff" + json.dumps(row), json.dumps(row, indent=1)):
        (tmp_path / "rows.json").write_text(text, encoding="utf-8")
        assert load_rows(str(tmp_path / "rows.json")) == [row]
    (tmp_path / "rows.json").write_text(json.dumps(row) + " " + json.dumps(row))
    assert load_rows(str(tmp_path / "rows.json")) == [row, row]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "is empty"),
        ("text.txt", b"hello", "must end in"),
        ("broken.jsonl", b'{"prompt": "a", ', "cannot be read"),
        ("latin.jsonl", b'{"prompt": "\xe9\xff", "completion": "a"}', "cannot be read"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_rows(str(tmp_path / name))
    assert name in str(error.value)


def test_the_split_is_seeded_and_complete() -> None:
    tokenizer = make_tokenizer()
    a = prepare_task(ROWS, tokenizer, DataConfig(eval_rows=3))
    b = prepare_task(ROWS, tokenizer, DataConfig(eval_rows=3))
    c = prepare_task(ROWS, tokenizer, DataConfig(eval_rows=3), seed=1)
    assert a == b
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert (len(a.train), len(a.held_out)) == (27, 3)
    assert len(prepare_task(ROWS, tokenizer, DataConfig()).held_out) == 3  # at most a tenth
    assert len(prepare_task(ROWS[:1], tokenizer, DataConfig()).train) == 1


def test_rows_whose_response_is_truncated_away_are_dropped() -> None:
    tokenizer = make_tokenizer()
    rows = [{"prompt": "p" * n, "completion": "ccc"} for n in (2, 9, 20)]
    data = prepare_task(rows, tokenizer, DataConfig(max_length=10))
    assert data.dropped == 1
    assert [len(e.input_ids) for e in data.train] == [6, 10]
    with pytest.raises(DataError, match="max_length = 2"):
        prepare_task(rows, tokenizer, DataConfig(max_length=2))


def test_batches_are_padded_and_masked() -> None:
    examples = [Example([1, 2, 3], [IGNORE, 2, 3]), Example([4], [4]), Example([5, 6], [IGNORE, 6])]
    batch = pad_batch(examples, 9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9], [5, 6, 9]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 1, 2]
    assert batch["labels"][1].tolist() == [4, IGNORE, IGNORE]
    seen = torch.cat([b["attention_mask"].sum(1) for b in batches(examples, 2)])
    assert seen.tolist() == [3, 2, 1]


def test_reading_requests_no_more_memory_than_a_file_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One read() up to the memory limit would allocate as much as the limit."""
    free = SimpleNamespace(available=2**60)
    monkeypatch.setattr("folora.data.files.psutil.virtual_memory", lambda: free)
    content = (json.dumps(ROWS[0]) + "\n").encode()
    (tmp_path / "rows.jsonl").write_bytes(content)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        assert load_rows(str(tmp_path / name)) == ROWS[:1]


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ({"messages": [{"role": "\ud800"}, {"role": "assistant"}]}, "the chat"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "\udfff"}]}, "the chat"),
        ({"instruction": "x", "input": "\ud800", "response": "y"}, "column 'input'"),
        ({"instruction": "x", "input": "z", "response": "\ud800"}, "column 'response'"),
    ],
)
def test_lone_surrogates_are_refused_anywhere(row: dict[str, Any], where: str) -> None:
    for message in row.get("messages", []):
        message.setdefault("content", "x")
    formatter = Formatter(list(row), make_tokenizer(chat=True), DataConfig())
    with pytest.raises(DataError, match=f"row 3: {where} holds half of a surrogate pair"):
        formatter(row, 3)
