"""Every recipe runs with a random model and a few documents of each dataset; invalid ones are refused."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager
from support.paper_hub import ALPACA, Row
from transformers import PreTrainedTokenizerFast

from benchmarks.paper.__main__ import main
from benchmarks.paper.recipe import TASKS, Rows, read_recipe
from benchmarks.paper.rows import write_rows
from benchmarks.paper.scoring import scorer
from benchmarks.paper.tasks import functions
from folora.compare.results import load_results
from folora.errors import ConfigError, DataError
from folora.methods import METHODS
from folora.training.arguments import sft_config

FOLDER = Path(__file__).parents[3] / "benchmarks" / "paper"
RECIPES = sorted((FOLDER / "recipes").glob("*.yaml"))
PAPER = [p for p in RECIPES if not p.stem.startswith("peft")]


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
def test_every_arm_is_valid_and_named_once(path: Path) -> None:
    recipe = read_recipe(path)
    names = [arm.name for arm in recipe.arms()]
    assert len(set(names)) == len(names) > 5
    sft_config(recipe.config, "unused", evaluates=False, on_cpu=True)


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_recipes_have_the_papers_settings(path: Path) -> None:
    config = read_recipe(path).config
    sampling, training = config.sampling, config.training
    assert (sampling.num_sequences, sampling.min_new_tokens, sampling.max_new_tokens) == (
        2000,
        128,
        512,
    )
    assert config.statistics.task_examples == 256
    assert (training.lr_scheduler_type, training.warmup_steps) == ("cosine", 0.03)
    assert (training.max_grad_norm, training.weight_decay) == (1.0, 0.0)


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_every_benchmark_of_the_paper_is_a_target_or_retained(path: Path) -> None:
    recipe = read_recipe(path)
    missing = set(recipe.benchmarks) - {*recipe.target, *recipe.kept}
    assert missing == ({"longbench_v2"} if recipe.stage == "llama2-7b" else set())
    assert len(recipe.benchmarks) == 14


PEFT_TEXT = (
    "Question: What is 0 + 1? Think step by step.\nAnswer:It is 1.\n#### 1\nThe answer is: 1"
)
FIRST = {  # the first training row, by target
    "math": (f"{ALPACA}What is 0 + 1?\n\n### Response:", "It is 1.\n#### 1\nThe answer is: 1"),
    "code": (f"{ALPACA}Add 0.\n\n### Response:", "```python\nx += 0\n```"),
    "instruction": (f"{ALPACA}Say 0.\n\n### Response:", "I say 0."),
    "peft-metamath": ("", PEFT_TEXT),
    "peft-metamath-mlp": ("", PEFT_TEXT),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_runs_end_to_end(
    path: Path, hub: None, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = "lora,folora-paper,folora" if path.stem == "peft-metamath" else "folora-paper"
    given = ["--recipe", str(path), "--model", model_folder, "--output", str(tmp_path)]
    assert main([*given, "--methods", methods, "--allow-code", "--dry-run"]) == 0
    recipe = read_recipe(path)
    found = load_results(tmp_path / "dry-run/results.jsonl")
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


def test_every_method_runs_end_to_end(hub: None, model_folder: str, tmp_path: Path) -> None:
    path = FOLDER / "recipes" / "llama2-7b-math.yaml"
    given = ["--recipe", str(path), "--model", model_folder, "--output", str(tmp_path)]
    assert main([*given, "--benchmarks", "gsm8k", "--learning-rates", "1e-3", "--dry-run"]) == 0
    found = load_results(tmp_path / "dry-run/results.jsonl")
    assert {r.method for r in found} == set(read_recipe(path).methods)
    for result in found:
        assert result.changes == {"training.learning_rate": 1e-3, "training.seed": 0}
        assert (set(result.base["task"]), result.base["kept"]) == ({"gsm8k"}, {})
        assert 0 < result.readings[-1]["kl"] < 5


def small_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe with one method and one benchmark, with changes."""
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
def test_an_invalid_recipe_is_refused(tmp_path: Path, changes: Row, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe(small_recipe(tmp_path, **changes))


rates = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=3)


@settings(max_examples=25)
@given(
    st.dictionaries(st.sampled_from(sorted(METHODS)), rates, min_size=1, max_size=3),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3),
    st.text(),
    st.sets(st.sampled_from(["methods", "seeds", "data", "base", "benchmarks", "target"])),
)
def test_any_recipe_round_trips_in_one_file_or_two(
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


def test_included_values_are_merged_and_circular_includes_refused(tmp_path: Path) -> None:
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
def test_invalid_arguments_are_refused_before_a_model_is_loaded(
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
    if "paper_gsm'" in message:  # skips the harness's index
        monkeypatch.setattr("folora.metrics.evaluation._harness", lambda _: _Empty())
    recipe = str(small_recipe(tmp_path, **changes))
    given = ["--recipe", recipe, "--model", model_folder, "--output", str(tmp_path / "out")]
    assert main([*given, *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_harnesses_own_code_tasks_are_refused_even_with_permission(
    hub: None, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """They would run programs outside the sandbox."""
    text = (
        (TASKS / "paper_humaneval.yaml").read_text().replace("functions.", f"{functions.__name__}.")
    )
    (tmp_path / "theirs.yaml").write_text(text.replace("paper_humaneval", "theirs"))
    harness = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr("folora.metrics.evaluation._harness", lambda _: harness)
    theirs = {"code": {"task": "theirs", "metric": "pass@1"}}
    recipe = read_recipe(small_recipe(tmp_path, target=[], benchmarks=theirs))
    with pytest.raises(ConfigError, match="'theirs' executes code"):
        scorer(recipe, tokenizer, allow_code=True)


class _Empty:
    """An index without tasks."""

    def __init__(self) -> None:
        self.task_index: dict[str, Any] = {}
        self.all_tasks: list[str] = []


def test_too_few_rows_are_reported_and_long_rows_skipped(hub: None, tmp_path: Path) -> None:
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


def test_pefts_length_limit_counts_the_template() -> None:
    data = read_recipe(FOLDER / "recipes" / "peft-metamath.yaml").data
    query, response = "q" * 500, "r" * 799  # 1300 with the space between them
    text = data.prompt + data.completion.format(query=query, response=response)
    assert len(text) == data.max_characters
