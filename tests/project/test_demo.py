"""The demo: its questions and queries, its scores, and what it shows."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.tiny import write_qwen3
from demo.__main__ import BUDGET, config, plain_lora
from demo.queries import SHAPES, TEST_TABLES, TRAIN_TABLES, split
from demo.scores import ENGLISH, NEW_TOKENS, PROMPTS, Scores, answer, loss_and_exact
from demo.show import picture, table
from folora.compare.tables import Table
from folora.data.contents import IGNORE, Example

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"Question: ([A-Z].*[.?])\nSQL:")


@pytest.fixture(scope="module")
def database() -> Iterator[sqlite3.Connection]:
    """All tables, each with a row for every value of a column of words."""
    connection = sqlite3.connect(":memory:")
    for t in (*TRAIN_TABLES, *TEST_TABLES):
        connection.execute(f"CREATE TABLE {t.name} ({', '.join(['name', *t.words, *t.numbers])})")
        blanks = ", ".join("?" * (1 + len(t.words) + len(t.numbers)))
        for words in product(*t.words.values()):
            row = ("x", *words, *t.numbers.values())
            connection.execute(f"INSERT INTO {t.name} VALUES ({blanks})", row)
    yield connection
    connection.close()


# Questions and queries


def test_every_query_runs_and_finds_rows(database: sqlite3.Connection) -> None:
    for row in (r for part in split(1000, 500, seed=0) for r in part):
        assert database.execute(row["completion"]).fetchone() not in (None, (0,), (None,)), row


def test_questions_name_all_that_the_query_needs() -> None:
    """A query has no word or number that is not in its question or in the shape of queries."""
    fixed = set(re.findall(r"\w+", " ".join(query for query, *_ in SHAPES))) | {"name"}
    for row in split(1000, 500, seed=1)[0]:
        assert set(row) == {"prompt", "completion"}
        (question,) = ROW.fullmatch(row["prompt"]).groups()
        assert set(re.findall(r"\w+", row["completion"])) - fixed <= set(
            re.findall(r"\w+", question)
        )


def test_held_out_questions_are_about_other_tables() -> None:
    train, test = split(400, 64, seed=0)
    assert (len(train), len(test)) == (400, 64)
    assert len({row["prompt"] for row in train + test}) == 464

    def tables(rows: list[dict[str, str]]) -> set[str]:
        return {re.search(r"FROM (\w+)", row["completion"])[1] for row in rows}

    assert tables(train) == {t.name for t in TRAIN_TABLES}
    assert tables(test) == {t.name for t in TEST_TABLES}
    assert not tables(train) & tables(test)


def test_every_phrasing_occurs_in_training() -> None:
    questions = [row["prompt"] for row in split(400, 0, seed=0)[0]]
    for _, *phrasings in SHAPES:
        for phrasing in phrasings:
            pattern = re.sub(r"\\{\w+\\}", r"\\w+", re.escape(phrasing))
            assert any(re.search(pattern, question) for question in questions), phrasing


def test_rows_depend_on_the_seed_only() -> None:
    assert split(100, 50, seed=3) == split(100, 50, seed=3)
    assert split(100, 50, seed=3) != split(100, 50, seed=4)


# Scores


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Untrained, so that no two models continue a text alike; it has no EOS token."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()


def test_an_exact_row_is_one_that_greedy_decoding_writes(model: LlamaForCausalLM) -> None:
    prompts = torch.randint(5, 20, (3, 4))
    written = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
    )
    rows = [Example(ids, [IGNORE] * 4 + ids[4:]) for ids in written.tolist()]
    other = [*rows[0].input_ids[:-1], (rows[0].input_ids[-1] + 1) % 20]
    rows.append(Example(other, [IGNORE] * 4 + other[4:]))
    loss, exact = loss_and_exact(model, rows)
    assert exact == 0.75
    with torch.no_grad():
        each = [
            model(input_ids=torch.tensor([r.input_ids]), labels=torch.tensor([r.labels])).loss
            for r in rows
        ]
    assert loss == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)


def test_an_answer_is_greedy_and_without_its_prompt(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_qwen3(tmp_path))
    chat = [{"role": "user", "content": "the cat"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    new = tokenizer.decode(ids[0, -NEW_TOKENS:], skip_special_tokens=True)
    assert answer(model, tokenizer, "the cat") == " ".join(new.split())
    model.generation_config.eos_token_id = int(ids[0, -NEW_TOKENS])
    assert answer(model, tokenizer, "the cat").split()[-1] == "[end]"


def test_the_plain_text_is_a_few_paragraphs_of_ascii() -> None:
    paragraphs = ENGLISH.read_text(encoding="ascii").strip().split("\n\n")
    assert len(paragraphs) == 5
    assert all(300 < len(p) < 500 and "\n" not in p for p in paragraphs)


# What is shown


SCORES = {
    name: Scores(
        1.0 - i / 10, i / 4, 0.5, -3.0 - i, 3.0 + i, i / 100, (f"{name} one", f"{name} two")
    )
    for i, name in enumerate(("base", "LoRA", "LoRA, scaled", "folora"))
}


def test_the_table_has_the_scores_and_answers_of_every_model() -> None:
    shown = table(SCORES, "a caption")
    assert shown.header == ("", *SCORES)
    assert shown.rows[1] == ("queries right (held-out tables)", "0.0%", "25.0%", "50.0%", "75.0%")
    assert shown.rows[-1] == (f'"{PROMPTS[1]}"', *(f"{name} two" for name in SCORES))
    # The result file holds the table for README and the docs.
    assert Table(**json.loads(json.dumps(asdict(shown)))).markdown() == shown.markdown()


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    picture(SCORES, tmp_path / "result.png")
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")


def test_lora_has_folora_s_options_but_the_method_and_the_budget(tmp_path: Path) -> None:
    folora = config(tmp_path / "model", tmp_path / "rows.jsonl", tmp_path)
    lora = plain_lora(folora, tmp_path)
    assert (folora.budget, lora.budget, lora.method.name) == (BUDGET, None, "lora")
    assert lora.training == folora.training
    assert lora.adapter == folora.adapter


def test_the_demo_runs_on_a_small_model(tmp_path: Path) -> None:
    """In a process of its own, since it sets up logging."""
    code = f"""
import demo.__main__ as demo
demo.smollm2, demo.STEPS = lambda folder: folder, 3
demo.main(["--output", {str(tmp_path / "output")!r}, "--models", {str(write_qwen3(tmp_path / "model"))!r}])
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
    result = json.loads((tmp_path / "output" / "result.json").read_text())
    scores = result["scores"]
    assert [*scores] == result["table"]["header"][1:] == ["base", "LoRA", "LoRA, scaled", "folora"]
    assert scores["base"]["kl"] == 0 < scores["folora"]["kl"] <= BUDGET
    assert scores["LoRA, scaled"]["kl"] <= min(BUDGET, scores["LoRA"]["kl"])
    assert (tmp_path / "output" / "result.png").exists()
