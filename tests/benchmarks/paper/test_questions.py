"""Evaluation prompts: templates, few-shot examples, order of choices, and that they are the same in every call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support.paper_hub import ALPACA, GPQA, GSM8K, HUMANEVAL, IFEVAL, MATH
from transformers import PreTrainedTokenizerFast

from benchmarks.paper.recipe import TASKS, read_recipe
from benchmarks.paper.tasks import functions
from benchmarks.tiny import make_llama
from folora.metrics.evaluation import Evaluation

FOLDER = Path(__file__).parents[3] / "benchmarks" / "paper"


def task_of(name: str, tokenizer: PreTrainedTokenizerFast, shots: int | None = None) -> Any:
    evaluation = Evaluation(
        {name: None}, tokenizer, folder=TASKS, num_fewshot=shots, allow_code=True
    )
    return evaluation._tasks[name]


def prompt_of(task: Any) -> str:
    shots = task.get_config("num_fewshot")
    return str(task.fewshot_context(task.eval_docs[0], num_fewshot=shots))


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        (
            "paper_gsm8k",
            f"{ALPACA}{GSM8K[0]['question']}\n\n### Response: Let's think step by step.",
        ),
        (
            "paper_math",
            f"{ALPACA}{MATH[0]['problem']}\n\n### Response: Let's think step by step.",
        ),
        ("paper_humaneval", HUMANEVAL[0]["prompt"]),
        ("paper_ifeval", f"{ALPACA}{IFEVAL[0]['prompt']}\n\n### Response:"),
        ("peft_gsm8k", f"Question: {GSM8K[0]['question']} Think step by step.\nAnswer:"),
        (
            "paper_squad_v2",
            "Title: Cats\n\nBackground: The cat sat on the mat.\n\nQuestion: Where?\n\nAnswer:",
        ),
    ],
)
def test_prompts(hub: None, tokenizer: PreTrainedTokenizerFast, name: str, prompt: str) -> None:
    assert prompt_of(task_of(name, tokenizer)) == prompt


def test_training_and_evaluation_prompts_match(
    hub: None, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = read_recipe(FOLDER / "recipes" / "qwen3-1.7b-math.yaml").data
    trained = data.prompt.format(query=GSM8K[0]["question"])
    assert prompt_of(task_of("paper_gsm8k", tokenizer)).startswith(trained)


def test_mbpp_prompts_have_three_examples(hub: None, tokenizer: PreTrainedTokenizerFast) -> None:
    text = prompt_of(task_of("paper_mbpp", tokenizer, shots=3))
    assert text.count("[BEGIN]") == 4
    assert text.count("[DONE]") == 3
    assert [f"double({i}) == {2 * i}" in text for i in (2, 3, 4)] == [True] * 3
    assert "double(5)" not in text  # task 5 is not an example
    assert text.endswith("assert double(1) == 2\n[BEGIN]\n")


def test_math_covers_all_seven_subjects(hub: None) -> None:
    assert len(functions.math_rows()["test"]) == 7


def test_the_order_of_gpqas_choices_depends_on_the_question_only() -> None:
    rows = Dataset.from_list(GPQA)
    first, again = functions.gpqa_rows(rows), functions.gpqa_rows(rows)
    assert first["choices"] == again["choices"]
    assert len(set(first["gold"])) > 1
    for row in first:
        assert row["choices"][row["gold"]] == row["Correct Answer"].strip()


def test_instructions_are_checked_by_the_harness(
    hub: None, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = task_of("paper_ifeval", tokenizer)
    doc = task.eval_docs[0]
    assert task.process_results(doc, ["one two three four"])["prompt_level_strict_acc"]
    assert not task.process_results(doc, ["one, two three four"])["prompt_level_strict_acc"]
    assert not task.process_results(doc, ["one two three"])["prompt_level_strict_acc"]


def test_few_shot_examples_are_the_same_in_every_call(
    hub: None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base and its adapted models must get the same prompts."""
    text = (TASKS / "paper_mbpp.yaml").read_text()
    text = text.replace("sampler: first_n, split: prompt, process_docs: !function functions.mbpp_shots", "split: prompt")  # fmt: skip
    text = text.replace("functions.mbpp", "benchmarks.paper.tasks.functions.mbpp")
    (tmp_path / "drawn.yaml").write_text(text.replace("paper_mbpp", "drawn"))
    ask = Evaluation(
        {"drawn": 1}, tokenizer, folder=tmp_path, max_new_tokens=1, num_fewshot=3, allow_code=True
    )
    seen: list[list[str]] = []

    def asked(lm: Any, tasks: Any, **_: Any) -> Any:
        task = ask._tasks["drawn"]
        docs = list(task.eval_docs) * 4
        seen.append([task.fewshot_context(doc, num_fewshot=3) for doc in docs])
        return {"results": {}}

    monkeypatch.setattr("folora.metrics.evaluation.evaluate", asked)
    model = make_llama(vocab=len(tokenizer))
    ask(model)
    ask(model)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > 2  # and they are sampled
