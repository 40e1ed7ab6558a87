"""The paper's recipes run through on a random model with a few documents in the Hub's columns."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import nltk
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import folora.data.rows
from benchmarks.paper import answers, sandbox
from benchmarks.paper.__main__ import main
from benchmarks.paper.recipe import TASKS, Recipe, Rows, read_recipe
from benchmarks.paper.rows import write_rows
from benchmarks.paper.sandbox import Limits, permission, run
from benchmarks.paper.scoring import load_passages, scorer, token_loss
from benchmarks.paper.tasks import functions
from benchmarks.tiny import make_llama
from folora.compare.methods import METHODS
from folora.compare.results import load_results
from folora.errors import ConfigError, DataError
from folora.metrics.evaluation import Evaluation
from folora.training.trainer import sft_config

FOLDER = Path(__file__).parents[1] / "benchmarks" / "paper"
RECIPES = sorted((FOLDER / "recipes").glob("*.yaml"))
PAPER = [p for p in RECIPES if not p.stem.startswith("peft")]

Row = dict[str, Any]

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n"
)

# Two documents of every data set, in the columns that it has on the Hub.

GSM8K = [
    {"question": "Ann has 3 pens and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    {"question": "A car costs $1,000 and a bus twice that. The bus?", "answer": "2 x\n#### 2,000"},
]
MATH = [
    {
        "problem": "What is $1/2 + 1/4$?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": "It is $\\boxed{\\frac{3}{4}}$.",
    }
]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Sum."""\n',
        "canonical_solution": "    return sum(xs)\n",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
        "entry_point": "total",
    }
]
MBPP = [
    {
        "task_id": i,
        "text": "Write a function to double a number.",
        "code": "def double(n):\r\n  return 2 * n",
        "test_list": [f"assert double({n}) == {2 * n}" for n in (1, 2, i)],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    for i in range(1, 6)
]
IFEVAL = [
    {
        "key": 1,
        "prompt": "Write four words without a comma.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [
            {"relation": None, "num_words": None},
            {"relation": "at least", "num_words": 4},
        ],
    }
]
TRIVIA = [
    {
        "question": "Capital of France?",
        "question_id": "a",
        "answer": {"aliases": ["Paris", "paris"]},
    }
]
TRUTHFUL = [
    {
        "question": "Do cats fly?",
        "mc1_targets": {"choices": ["No.", "Yes."], "labels": [1, 0]},
        "mc2_targets": {"choices": ["No.", "They do not.", "Yes."], "labels": [1, 1, 0]},
    }
]
SQUAD = [
    {
        "id": str(i),
        "title": "Cats",
        "context": "The cat sat on the mat.",
        "question": question,
        "answers": {"text": texts, "answer_start": [15] * len(texts)},
    }
    for i, (question, texts) in enumerate([("Where?", ["the mat", "on the mat"]), ("When?", [])])
]
MMLU = [
    {"question": f"What is {i} + 1?", "subject": "x", "choices": ["1", "2", "3", "4"], "answer": 1}
    for i in range(5)
]
GPQA = [
    {
        "Question": f"Which is {name}?",
        "Correct Answer": f"{name}\n",
        **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)},
    }
    for name in ("red", "green", "blue", "white")
]
BABILONG = [{"input": "Ann went home.", "question": "Where is Ann? ", "target": "home"}]
LONGBENCH = [
    {
        "context": "A long text. " * 9,
        "question": "Who?",
        "choices": ["a", "b", "c", "d"],
        "answer": 2,
    }
]


needs_data = pytest.mark.skipif(
    not os.environ.get("FOLORA_DATA_DIR"), reason="FOLORA_DATA_DIR is not set"
)


def local_rows(name: str) -> list[Row]:
    """Rows of a real data set."""
    with gzip.open(Path(os.environ["FOLORA_DATA_DIR"]) / f"{name}.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def _two(rows: list[Row]) -> list[Row]:
    return (rows * 2)[:2]


HUB: dict[str, dict[str, list[Row]]] = {
    "mandarjoshi/trivia_qa": {"train": TRIVIA, "validation": _two(TRIVIA)},
    "google-research-datasets/nq_open": {
        split: _two([{"question": "who sat", "answer": ["the cat", "a cat"]}])
        for split in ("train", "validation")
    },
    "stanfordnlp/web_questions": {
        split: [{"url": "u", "question": "who sat?", "answers": ["The Cat", "A cat"]}]
        for split in ("train", "test")
    },
    "openai/gsm8k": {"train": GSM8K, "test": GSM8K},
    "EleutherAI/hendrycks_math": {"train": MATH, "test": MATH},
    "openai/openai_humaneval": {"test": HUMANEVAL},
    "google-research-datasets/mbpp": {"prompt": MBPP, "test": MBPP[:2]},
    "google/IFEval": {"train": IFEVAL},
    "truthfulqa/truthful_qa": {"validation": TRUTHFUL},
    "rajpurkar/squad_v2": {"train": SQUAD, "validation": SQUAD},
    "cais/mmlu": {"test": MMLU[:2], "dev": MMLU},
    "Idavidrein/gpqa": {"train": GPQA},
    "RMT-team/babilong-1k-samples": {f"qa{i}": _two(BABILONG) for i in range(1, 6)},
    "recursal/longbench-v2": {"train": LONGBENCH},
    "HuggingFaceFW/finewiki": {
        "train": [
            {"id": str(i), "text": f"Text {i} is about cats and mats. " * 5} for i in range(9)
        ]
    },
    "meta-math/MetaMathQA": {
        "train": [
            {
                "type": "GSM_Rephrased",
                "query": f"What is {i} + 1?",
                "original_question": "",
                "response": f"It is {i + 1}.\n#### {i + 1}\nThe answer is: {i + 1}",
            }
            for i in range(40)
        ]
    },
    "m-a-p/CodeFeedback-Filtered-Instruction": {
        "train": [
            {
                "query": f"Add {i}.",
                "answer": f"```python\nx += {i}\n```",
                "resource": "r",
                "lang": "python",
            }
            for i in range(40)
        ]
    },
    "WizardLMTeam/WizardLM_evol_instruct_V2_196k": {
        "train": [
            {
                "idx": f"w{i}",
                "conversations": [
                    {"from": "human", "value": f"Say {i}."},
                    {"from": "gpt", "value": f"I say {i}."},
                ],
            }
            for i in range(40)
        ]
    },
}
NAMES = {  # configurations that the recipes have to ask for
    "mandarjoshi/trivia_qa": "rc.nocontext",
    "openai/gsm8k": "main",
    "google-research-datasets/mbpp": "full",
    "truthfulqa/truthful_qa": "multiple_choice",
    "Idavidrein/gpqa": "gpqa_main",
    "RMT-team/babilong-1k-samples": "2k",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's data sets without the Hub; IFEval's packages, where they are missing, as husks.

    The checks of IFEVAL's document use neither language detection nor sentences.
    """
    read_file = datasets.load_dataset

    def load(
        path: str, name: str | None = None, split: str | None = None, **options: Any
    ) -> Dataset | DatasetDict:
        if path == "json":
            return read_file(path, name=name, split=split, **options)
        if path not in HUB:
            raise FileNotFoundError(path)
        assert name == NAMES.get(path, name)
        found = {s: Dataset.from_list(rows) for s, rows in HUB[path].items()}
        return found[split] if split else DatasetDict(found)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(folora.data.rows, "load_dataset", load)
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    for name in ("langdetect", "immutabledict"):
        if importlib.util.find_spec(name) is None:
            husk = ModuleType(name)
            husk.immutabledict = dict  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, husk)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Any text, in pieces of a few characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [path.read_text() for path in TASKS.glob("*.yaml")] + [json.dumps(HUB)]
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> str:
    """What a recipe's model is replaced by; a trial takes the tokenizer alone from it."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


# Recipes.


def test_there_is_a_recipe_for_every_model_and_target() -> None:
    assert {p.stem for p in PAPER} == {
        f"{model}-{task}"
        for model in ("llama2-7b", "qwen3-1.7b")
        for task in ("math", "code", "instruction")
    }
    assert {p.stem for p in RECIPES} - {p.stem for p in PAPER} == {
        "peft-metamath",
        "peft-metamath-mlp",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_arm_is_possible_and_named_once(path: Path) -> None:
    recipe = read_recipe(path)
    names = [arm.name for arm in recipe.arms()]
    assert len(set(names)) == len(names) > 5
    sft_config(recipe.config.training, "unused", evaluates=False, on_cpu=True)


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_the_paper_s_settings_are_in_the_recipes(path: Path) -> None:
    config = read_recipe(path).config
    sampling, training = config.sampling, config.training
    assert (sampling.num_sequences, sampling.min_new_tokens, sampling.max_new_tokens) == (
        2000,
        128,
        512,
    )
    assert config.statistics.task_examples == 256
    assert (training.lr_scheduler_type, training.warmup_ratio) == ("cosine", 0.03)
    assert (training.max_grad_norm, training.weight_decay) == (1.0, 0.0)


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_every_benchmark_of_the_paper_is_target_or_kept(path: Path) -> None:
    recipe = read_recipe(path)
    missing = set(recipe.benchmarks) - {*recipe.target, *recipe.kept}
    assert missing == ({"longbench_v2"} if recipe.stage == "llama2-7b" else set())
    assert len(recipe.benchmarks) == 14


PEFT_TEXT = (
    "Question: What is 0 + 1? Think step by step.\nAnswer:It is 1.\n#### 1\nThe answer is: 1"
)
FIRST = {  # what a model is trained on, by target
    "math": (f"{ALPACA}What is 0 + 1?\n\n### Response:", "It is 1.\n#### 1\nThe answer is: 1"),
    "code": (f"{ALPACA}Add 0.\n\n### Response:", "```python\nx += 0\n```"),
    "instruction": (f"{ALPACA}Say 0.\n\n### Response:", "I say 0."),
    "peft-metamath": ("", PEFT_TEXT),
    "peft-metamath-mlp": ("", PEFT_TEXT),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_runs_through(
    path: Path, hub: None, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = "lora,folora-paper,folora" if path.stem == "peft-metamath" else "folora-paper"
    given = ["--recipe", str(path), "--model", model_folder, "--output", str(tmp_path)]
    assert main([*given, "--methods", methods, "--allow-code", "--dry-run"]) == 0
    recipe = read_recipe(path)
    found = load_results(tmp_path)
    assert {r.method for r in found} == set(methods.split(","))
    for result in found:
        assert (result.stage, result.task) == (recipe.stage, recipe.task)
        for reading in (result.base, *result.readings):
            assert set(reading["task"]) == set(recipe.target)
            assert set(reading["kept"]) == set(recipe.kept)
            scores = [*reading["task"].values(), *reading["kept"].values()]
            assert all(0 <= score <= 1 for score in scores)
        assert [r["step"] for r in result.readings] == [2]
        assert result.readings[0]["kl"] > 0
    rows = [json.loads(line) for line in (tmp_path / "dry-run/rows.jsonl").read_text().splitlines()]
    assert len(rows) == 22
    assert rows[0] == {"prompt": FIRST[recipe.task][0], "completion": FIRST[recipe.task][1]}
    printed = capsys.readouterr().out
    assert sum(f"{result.method}--" in printed for result in found) == len(found)
    assert ("finewiki forgetting" in printed) == ("peft" in path.stem)


def test_every_method_runs_through(hub: None, model_folder: str, tmp_path: Path) -> None:
    path = FOLDER / "recipes" / "llama2-7b-math.yaml"
    given = ["--recipe", str(path), "--model", model_folder, "--output", str(tmp_path)]
    assert main([*given, "--benchmarks", "gsm8k", "--learning-rates", "1e-3", "--dry-run"]) == 0
    found = load_results(tmp_path)
    assert {r.method for r in found} == set(read_recipe(path).methods)
    for result in found:
        assert result.changes == {"training.learning_rate": 1e-3, "training.seed": 0}
        assert (set(result.base["task"]), result.base["kept"]) == ({"gsm8k"}, {})
        assert 0 < result.readings[-1]["kl"] < 5


def small_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe of one method and one question, with something changed."""
    values = {
        "stage": "tiny",
        "task": "math",
        "data": {
            "dataset": "meta-math/MetaMathQA",
            "count": 20,
            "prompt": "{query}",
            "completion": "{response}",
        },
        "base": {"model": "gone/away", "data.eval_rows": 2},
        "methods": {"lora": [1e-3]},
        "seeds": [0],
        "read_at": [1.0],
        "target": ["gsm8k"],
        "kept": ["code"],
        "benchmarks": {
            "gsm8k": {"task": "paper_gsm8k", "metric": "exact_match"},
            "code": {"task": "paper_humaneval", "metric": "pass@1"},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": 1}, "unknown entry 'tasks'"),
        ({"seeds": []}, "'seeds' is empty"),
        ({"data": {"dataset": "x", "count": 5, "prompt": "p"}}, "data.completion is missing"),
        ({"target": ["gsm"]}, "no benchmark 'gsm'.*did you mean 'gsm8k'"),
        ({"kept": ["gsm8k"]}, "both target and kept: gsm8k"),
        ({"methods": {"loro": [1e-3]}}, "unknown method 'loro'.*'lora'"),
        ({"base": {"adapter.rank": 3}}, "unknown option 'adapter.rank'"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, changes: Row, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe(small_recipe(tmp_path, **changes))


rates = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(METHODS)), rates, min_size=1, max_size=3),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3),
    st.text(),
    st.sets(st.sampled_from(["methods", "seeds", "data", "base", "benchmarks", "target"])),
)
def test_any_recipe_is_read_as_it_was_written_in_one_file_or_two(
    methods: dict[str, list[float]], seeds: list[int], prompt: str, outside: set[str]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = {"dataset": "x", "count": 5, "prompt": prompt, "completion": "{y}"}
        path = small_recipe(Path(folder), methods=methods, seeds=seeds, data=data)
        recipe = read_recipe(path)
        assert (recipe.methods, recipe.seeds, recipe.data.prompt) == (methods, seeds, prompt)
        arms = recipe.arms()
        assert len(arms) == len(seeds) * sum(map(len, methods.values()))
        assert {(a.method, a.changes["training.learning_rate"]) for a in arms} == {
            (method, rate) for method, chosen in methods.items() for rate in chosen
        }
        values = yaml.safe_load(path.read_text())
        parts = {name: value for name, value in values.items() if name in outside}
        rest = {name: value for name, value in values.items() if name not in outside}
        (Path(folder) / "part.yaml").write_text(yaml.safe_dump(parts))
        path.write_text(yaml.safe_dump({**rest, "include": ["part.yaml"]}))
        assert read_recipe(path) == recipe


def test_included_values_are_joined_and_a_circle_is_refused(tmp_path: Path) -> None:
    outer = tmp_path / "outer.yaml"
    small_recipe(tmp_path)
    outer.write_text("include: [recipe.yaml]\nbase: {adapter.r: 3}\nseeds: [5]\n")
    recipe = read_recipe(outer)
    assert (recipe.config.adapter.r, recipe.config.model) == (3, "gone/away")
    assert recipe.seeds == [5]
    (tmp_path / "recipe.yaml").write_text("include: [outer.yaml]\n")
    with pytest.raises(ConfigError, match="includes itself"):
        read_recipe(outer)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, (), "code run programs.*--allow-code"),
        ({}, ("--allow-code", "--methods", "lara"), "no method 'lara'.*did you mean 'lora'"),
        ({}, ("--benchmarks", "gsm"), "no benchmark 'gsm'"),
        ({"data": Rows(dataset="meta-math/MetaMathQA", count=9, prompt="{question}",
                       completion="{response}").__dict__},
         ("--allow-code",), "template '{question}'.*columns are type, query"),
        ({"benchmarks": {"gsm8k": {"task": "paper_gsm", "metric": "exact_match"}}, "kept": []},
         (), "unknown evaluation task 'paper_gsm'"),
        ({"benchmarks": {"gsm8k": {"task": "paper_gsm8k", "metric": "acc"}}, "kept": []},
         (), "'paper_gsm8k' has no metric 'acc'.*it has exact_match"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_found_before_a_model_is_loaded(
    hub: None,
    monkeypatch: pytest.MonkeyPatch,
    model_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: Row,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("folora.pipeline.run.load_model", never)
    if "paper_gsm'" in message:  # no harness index for one wrong name
        monkeypatch.setattr("folora.metrics.evaluation._harness", lambda _: _Empty())
    recipe = str(small_recipe(tmp_path, **changes))
    given = ["--recipe", recipe, "--model", model_folder, "--output", str(tmp_path / "out")]
    assert main([*given, *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_harness_s_own_code_tasks_are_refused_even_with_permission(
    hub: None, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """They would run programs outside of the sandbox."""
    text = (
        (TASKS / "paper_humaneval.yaml").read_text().replace("functions.", f"{functions.__name__}.")
    )
    (tmp_path / "theirs.yaml").write_text(text.replace("paper_humaneval", "theirs"))
    harness = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr("folora.metrics.evaluation._harness", lambda _: harness)
    theirs = {"code": {"task": "theirs", "metric": "pass@1"}}
    recipe = read_recipe(small_recipe(tmp_path, target=[], benchmarks=theirs))
    with pytest.raises(ConfigError, match="'theirs' runs programs"):
        scorer(recipe, tokenizer, allow_code=True)


class _Empty:
    """An index of tasks without any."""

    def __init__(self) -> None:
        self.task_index: dict[str, Any] = {}
        self.all_tasks: list[str] = []


def test_too_few_rows_are_said_and_long_ones_passed_over(hub: None, tmp_path: Path) -> None:
    wanted = Rows(
        dataset="meta-math/MetaMathQA", count=9, prompt="{query}", completion="{response}"
    )
    write_rows(wanted, 3, tmp_path / "rows.jsonl")
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 12
    short = Rows(**{**wanted.__dict__, "max_characters": len("What is 0 + 1?It is 1.\n#### 1\nThe answer is: 1")})  # fmt: skip
    write_rows(short, 0, tmp_path / "rows.jsonl")  # nine rows of one digit; 9 + 1 is longer
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert "What is 8" in lines[-1]
    with pytest.raises(DataError, match=r"9 rows that can be used.*need 10"):
        write_rows(short, 1, tmp_path / "rows.jsonl")


def test_peft_s_length_limit_counts_the_template() -> None:
    data = read_recipe(FOLDER / "recipes" / "peft-metamath.yaml").data
    query, response = "q" * 500, "r" * 799  # 1300 with the blank between them
    text = data.prompt + data.completion.format(query=query, response=response)
    assert len(text) == data.max_characters


# Questions and what counts as an answer to them.


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


def test_a_trained_prompt_is_the_asked_one(hub: None, tokenizer: PreTrainedTokenizerFast) -> None:
    data = read_recipe(FOLDER / "recipes" / "qwen3-1.7b-math.yaml").data
    trained = data.prompt.format(query=GSM8K[0]["question"])
    assert prompt_of(task_of("paper_gsm8k", tokenizer)).startswith(trained)


def test_mbpp_shows_its_three_examples(hub: None, tokenizer: PreTrainedTokenizerFast) -> None:
    text = prompt_of(task_of("paper_mbpp", tokenizer, shots=3))
    assert text.count("[BEGIN]") == 4
    assert text.count("[DONE]") == 3
    assert [f"double({i}) == {2 * i}" in text for i in (2, 3, 4)] == [True] * 3
    assert "double(5)" not in text  # task 5 is no example
    assert text.endswith("assert double(1) == 2\n[BEGIN]\n")


def test_math_asks_all_seven_subjects(hub: None) -> None:
    assert len(functions.math_rows()["test"]) == 7


def test_gpqa_s_choices_are_ordered_by_the_question_alone() -> None:
    rows = Dataset.from_list(GPQA)
    first, again = functions.gpqa_rows(rows), functions.gpqa_rows(rows)
    assert first["choices"] == again["choices"]
    assert len(set(first["gold"])) > 1
    for row in first:
        assert row["choices"][row["gold"]] == row["Correct Answer"].strip()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7. The answer is: 7", 7),
        ("So she pays $18.\n#### 18\nThe answer is: 18", 18),
        ("#### 1,234", 1234),
        ("The answer is $1,234.50.", Fraction("1234.5")),
        ("Hence $x = \\boxed{42}$.", 42),
        ("Hence \\boxed{\\frac{3}{4}} of it", Fraction(3, 4)),
        ("Hence \\boxed{1{,}000}", 1000),
        ("The answer is: -5.", -5),
        ("the final answer is 70% of them", 70),
        ("The answer is 3/4", Fraction(3, 4)),
        ("First 5, then 9 remain.", 9),
        ("The answer is 5. But 6 is next", 5),
        ("The answer is: 3. Wait. The answer is: 4", 4),
        ("The answer is 3/0", None),
        ("I do not know.", None),
    ],
)
def test_numbers(text: str, number: Any) -> None:
    assert answers.number(text) == number


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("so $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}", True),
        ("so $\\boxed{\\dfrac{1}{2}}$.", "\\frac12", True),
        ("The answer is: $\\frac{1}{2}$", "\\frac{1}{2}", True),
        ("The answer is: 1/2", "\\frac{1}{2}", True),
        ("The answer is: 0.5.", "\\frac{1}{2}", True),
        ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "(3,\\frac{\\pi}{2})", True),
        ("\\boxed{\\{1, \\{2\\}\\}}", "\\{1,\\{2\\}\\}", True),
        ("The answer is $5 \\text{ cm}$.", "5", True),
        ("The answer is: 90^\\circ", "90", True),
        ("The answer is \\boxed{7}. I hope it is right.", "7", True),
        ("The answer is odd. It is less than 9, so it is $\\boxed{7}$.", "7", True),
        ("The answer is: 12\n### Instruction: next", "12", True),
        ("The answer is: 2.5", "2.5", True),
        ("\\boxed{3} or rather \\boxed{4}", "3", False),
        ("The answer is: \\frac{1}{3}", "\\frac{1}{2}", False),
        ("It is 7.", "7", False),
        ("\\boxed{7", "7", False),
    ],
)
def test_expressions(text: str, gold: str, right: bool) -> None:
    assert answers.same_expression(answers.expression(text), gold) == right


@pytest.mark.parametrize(
    "completion",
    [
        "    return sum(xs)\n",
        "    return sum(xs)\n\nThis function adds all the numbers.\n",
        "    return sum(xs)\nDone\n",
        "    total = 0\n    for x in xs:\n        total += x\n    return total\n\nprint(total([1]))\n",
        "    return sum(xs)\n```\nExplanation: `sum` adds.",
        "Here it is:\n```python\ndef total(xs):\n    return sum(xs)\n```\nIt works by adding.",
        "```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)",
        "```python\n    return sum(xs)\n```",
        "    return sum(xs)\n\ndef other(",
    ],
)
def test_functions_are_found_in_chatter(completion: str) -> None:
    doc = HUMANEVAL[0]
    with permission():
        assert functions.humaneval(doc, [completion]) == {"pass@1": 1.0}


@pytest.mark.parametrize(
    "completion", ["", "    return 4\n", "    return sum(xs", "no code at all"]
)
def test_wrong_functions_do_not_pass(completion: str) -> None:
    with permission():
        assert functions.humaneval(HUMANEVAL[0], [completion]) == {"pass@1": 0.0}


@pytest.mark.parametrize(
    ("completion", "passes"),
    [
        ("def double(n):\r\n  return 2 * n\r\n", 1.0),
        (
            "Sure:\n```python\ndef double(n):\n    return 2 * n\n```\nand\n```\n$ python x.py\n```",
            1.0,
        ),
        ("def double(n):\n    return 2 * n\n\nThe function doubles n.", 1.0),
        ("def double(n):\n    return n * n\n", 0.0),
        ("def double(n):\n    raise SystemExit(0)\n", 0.0),
        ("", 0.0),
    ],
)
def test_programs_of_descriptions(completion: str, passes: float) -> None:
    with permission():
        assert functions.mbpp(MBPP[0], [completion]) == {"pass@1": passes}


def test_what_a_task_sets_up_may_need_the_program() -> None:
    """As in MBPP's task 367, whose set-up builds a tree of the program's own class."""
    doc = {**MBPP[0], "test_setup_code": "two = double(1)", "test_list": ["assert two == 2"]}
    with permission():
        assert functions.mbpp(doc, ["def double(n):\n    return 2 * n\n"]) == {"pass@1": 1.0}


@needs_data
def test_reference_answers_are_right() -> None:
    """Of the real data sets: every one of GSM8K and MATH, and some of the programs."""
    for row in local_rows("gsm8k/test"):
        said = row["answer"].rpartition("#### ")[2]
        for text in (
            row["answer"],
            f"So.\n#### {said}\nThe answer is: {said}",
            f"\\boxed{{{said}}}",
        ):
            assert functions.gsm8k(row, [text]) == {"exact_match": 1.0}
        assert functions.peft_gsm8k(row, [f"The answer is: {said}"]) == {"accuracy": 1.0}
    problems = local_rows("math/test")
    for row in problems:
        said = f"So.The answer is: ${row['answer']}$"
        assert functions.math(row, [said]) == {"exact_match": 1.0}
    solved = sum(functions.math(row, [row["solution"]])["exact_match"] for row in problems)
    assert solved >= len(problems) - 1  # one goes on: "The final answer is positive, because"
    with permission():
        for row in local_rows("humaneval/test")[::16]:
            fenced = f"Here:\n```python\n{row['prompt']}{row['canonical_solution']}\n```\nDone."
            for text in (row["canonical_solution"], fenced):
                assert functions.humaneval(row, [text]) == {"pass@1": 1.0}
            assert functions.humaneval(row, ["    pass\n"]) == {"pass@1": 0.0}
        for row in local_rows("mbpp/test")[::50]:
            assert functions.mbpp(row, [row["code"]]) == {"pass@1": 1.0}


@pytest.mark.parametrize(
    ("doc", "said", "exact", "f1"),
    [
        (SQUAD[0], " The mat.", 1.0, 1.0),
        (SQUAD[0], "on a big mat", 0.0, 0.8),
        (SQUAD[0], "unanswerable", 0.0, 0.0),
        (SQUAD[1], "Unanswerable.", 1.0, 1.0),
        (SQUAD[1], "", 1.0, 1.0),
        (SQUAD[1], "yesterday", 0.0, 0.0),
    ],
)
def test_squad(doc: Row, said: str, exact: float, f1: float) -> None:
    assert functions.squad_v2(doc, [said]) == {"exact": exact, "f1": pytest.approx(f1)}


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (" 3 + 4 = 7. The answer is: 7", True),
        (" The answer is: 7.0 \n\nQuestion: another", True),
        (" The final answer is $7$.", True),
        (" The answer is: 14/2", True),
        (" The answer is: 3.5/.5", True),
        (" #### 7", True),
        (" The answer is: seven", False),
        (" It is 7", False),
        (" The answer is: 7 pens", False),
        # The first mark of the list decides, wherever it stands: PEFT's rule, kept as it is.
        (" The answer is: 8\n#### 7", False),
    ],
)
def test_peft_s_accuracy(said: str, right: bool) -> None:
    assert functions.peft_gsm8k(GSM8K[0], [said]) == {"accuracy": float(right)}


def test_peft_does_not_read_thousands() -> None:
    """ "2,000" is no number for PEFT, so that 2000 does not match it; what is said must be the same."""
    assert functions.peft_gsm8k(GSM8K[1], [" The answer is: 2,000"]) == {"accuracy": 1.0}
    assert functions.peft_gsm8k(GSM8K[1], [" The answer is: 2000"]) == {"accuracy": 0.0}


def test_instructions_are_checked_by_the_harness(
    hub: None, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = task_of("paper_ifeval", tokenizer)
    doc = task.eval_docs[0]
    assert task.process_results(doc, ["one two three four"])["prompt_level_strict_acc"]
    assert not task.process_results(doc, ["one, two three four"])["prompt_level_strict_acc"]
    assert not task.process_results(doc, ["one two three"])["prompt_level_strict_acc"]


def test_shots_are_the_same_from_call_to_call(
    hub: None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base and its adapted models must be asked the same questions."""
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
    assert len(set(seen[0])) > 2  # and they are drawn


# Loss on texts.


def test_the_loss_is_that_of_every_token_alike(
    hub: None, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, initializer_range=0.5,
        )
    ).train()  # fmt: skip
    texts = ["the cat sat on the mat", "a"]
    found = token_loss(model, tokenizer, texts, max_length=6)
    assert model.training
    losses: list[float] = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:6]
        with torch.no_grad():
            chances = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-float(chances[i - 1, ids[i]]) for i in range(1, len(ids))]
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_passages_are_the_first_ones(hub: None) -> None:
    passages = read_recipe(FOLDER / "recipes" / "peft-metamath.yaml").passages["finewiki"]
    assert (passages.count, passages.max_length) == (100, 768)
    texts = load_passages(type(passages)(**{**passages.__dict__, "count": 3}))
    assert [text[:6] for text in texts] == ["Text 0", "Text 1", "Text 2"]
    with pytest.raises(DataError, match="no column 'body'; there are id, text"):
        load_passages(type(passages)(**{**passages.__dict__, "column": "body"}))


def test_a_score_of_passages_gives_the_forgetting_back(
    hub: None, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = FOLDER / "recipes" / "peft-metamath.yaml"
    recipe: Recipe = read_recipe(path)
    only = Recipe(**{**recipe.__dict__, "target": []})
    score = scorer(only, tokenizer, allow_code=False)
    found = score(make_llama(vocab=len(tokenizer)))
    assert found["task"] == {}
    assert -math.log(found["kept"]["finewiki"]) == pytest.approx(found["other"]["finewiki.nats"])


# The sandbox.


@pytest.fixture
def allowed() -> Iterator[Callable[..., sandbox.Outcome]]:
    def go(program: str, seconds: float = 20.0, **limits: int) -> sandbox.Outcome:
        return run(program, Limits(seconds=seconds, **limits))

    with permission():
        yield go


def test_nothing_runs_without_permission() -> None:
    with pytest.raises(ConfigError, match="--allow-code"):
        run("pass")
    with permission():
        assert run("pass").passed
    with pytest.raises(ConfigError, match="--allow-code"):
        functions.humaneval(HUMANEVAL[0], ["    return sum(xs)\n"])


def test_a_right_program_passes_and_a_wrong_one_says_why(allowed: Any) -> None:
    assert allowed("assert sum([1, 2]) == 3").passed
    wrong = allowed("assert sum([1, 2]) == 4")
    assert not wrong.passed
    assert "AssertionError" in wrong.output
    assert wrong.reason == "failed with status 1"


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)\nassert False",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "import sys\nsys.stdout.write('passed')\nquit = 1\nraise SystemExit(0)",
    ],
)
def test_leaving_early_is_not_passing(allowed: Any, program: str) -> None:
    outcome = allowed(program)
    assert not outcome.passed
    assert outcome.reason == "ended before its tests"


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)"])
def test_a_program_without_end_is_stopped(allowed: Any, program: str) -> None:
    began = time.monotonic()
    outcome = allowed(program, seconds=1.0)
    assert not outcome.passed
    assert time.monotonic() - began < 10


def test_what_a_stopped_program_started_is_gone(allowed: Any, tmp_path: Path) -> None:
    """Also where it gets past the hook, as a fork by hand does not."""
    for start in ("os.fork()", "os.forkpty()", "os.system('sleep 30')"):
        outcome = allowed(f"import os\nwhile True: {start}", seconds=5.0)
        assert not outcome.passed
        assert "the sandbox refuses" in outcome.output


def test_memory_is_limited(allowed: Any) -> None:
    outcome = allowed("x = bytearray(1 << 29)", memory=1 << 28)
    assert not outcome.passed
    assert "MemoryError" in outcome.output


@pytest.mark.parametrize(
    "program",
    [
        "open({path!r}, 'w').write('x')",
        "open({path!r}, 'a')",
        "import os\nos.open({path!r}, os.O_CREAT | os.O_WRONLY)",
        "import pathlib\npathlib.Path({path!r}).touch()",
        "import os\nos.symlink({folder!r}, 'link')\nopen('link/new', 'w')",
        "import os\nos.mkdir({path!r})",
    ],
)
def test_nothing_is_written_outside(allowed: Any, tmp_path: Path, program: str) -> None:
    path = tmp_path / "new"
    outcome = allowed(program.format(path=str(path), folder=str(tmp_path)))
    assert not outcome.passed
    assert not path.exists()


def test_nothing_is_removed_outside(allowed: Any, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("x")
    for call in ("os.remove", "os.unlink", "os.truncate", "shutil.rmtree"):
        extra = ", 0" if "truncate" in call else ""
        assert not allowed(f"import os, shutil\n{call}({str(kept)!r}{extra})").passed
    assert kept.read_text() == "x"


def test_its_own_folder_is_a_program_s_to_use(allowed: Any) -> None:
    program = (
        "import os\nos.mkdir('d')\nopen('d/a', 'w').write('x')\nos.remove('d/a')\nos.rmdir('d')"
    )
    assert allowed(program).passed


def test_output_is_limited(allowed: Any) -> None:
    outcome = allowed("while True: print('x' * 1000)", output=1 << 16)
    assert not outcome.passed
    assert outcome.reason == "wrote too much"
    assert len(outcome.output) <= 2000


def test_there_is_no_input_no_environment_and_no_network(allowed: Any, monkeypatch: Any) -> None:
    assert "EOFError" in allowed("input()").output
    monkeypatch.setenv("TOKEN", "secret")
    assert allowed(
        "import os\nassert 'TOKEN' not in os.environ\nassert 'HOME' not in os.environ"
    ).passed
    outcome = allowed("import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)")
    assert not outcome.passed
    assert outcome.network is ("--net" not in sandbox.isolation().prefix)
