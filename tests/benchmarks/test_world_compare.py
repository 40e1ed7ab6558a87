"""The comparison on synthetic worlds runs from a plan, on built-in and custom tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.plans import TINY_PLAN_BASE

from benchmarks.compare import main, task_run
from benchmarks.plan import Plan
from benchmarks.world.testbed import WorldTestbed
from folora.compare.results import load_results
from folora.config import FoLoraConfig
from folora.errors import ConfigError

PLANS = sorted((Path(__file__).parents[2] / "benchmarks" / "plans").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _few_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few probes per skill: accuracy is not tested here, and scoring takes most of the time."""
    monkeypatch.setattr("benchmarks.world.testbed.EVERY", 40)


def plan_file(folder: Path, **changes: object) -> Path:
    plan = {
        "model": "world",
        "runs": "tiny",
        "tasks": ["difference", "instrument"],
        "seeds": [7],
        "read_at": [0.5, 1.0],
        "base": TINY_PLAN_BASE,
        "sweeps": [{"methods": ["folora", "null-frozen"], "learning_rates": [1e-3]}],
        **changes,
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    return path


def run(folder: Path, models: Path, plan: Path, *more: str) -> None:
    places = [
        "--models",
        str(models),
        "--runs",
        str(folder / "runs"),
        "--output",
        str(folder / "out.jsonl"),
    ]
    main(["--plan", str(plan), *places, *more])


def test_a_plan_adds_one_line_per_arm_and_shares_the_base_statistics(
    tmp_path: Path, models: Path
) -> None:
    run(tmp_path, models, plan_file(tmp_path))
    results = load_results(tmp_path / "out.jsonl")
    found = {(r.task, r.method, r.seed, r.stage) for r in results}
    assert found == {
        (task, method, 7, "world-7")
        for task in ("difference", "instrument")
        for method in ("folora", "null-frozen")
    }
    for result in results:
        assert len(result.base["kept"]) == 8
        assert set(result.base["task"]) == {"accuracy"}
        assert [r["step"] for r in result.readings] == [2, 4]
        assert "--plan" in result.command
        assert result.config["training.seed"] == 7
    pre = [
        (
            tmp_path
            / "runs"
            / "world"
            / "tiny"
            / "7"
            / task
            / "2-statistics"
            / "pre"
            / "tensors.safetensors"
        )
        for task in ("difference", "instrument")
    ]
    assert pre[0].read_bytes() == pre[1].read_bytes()
    assert pre[0].stat().st_mtime_ns == pre[1].stat().st_mtime_ns  # copied, not recomputed

    stamp = (tmp_path / "out.jsonl").stat().st_mtime_ns
    run(tmp_path, models, plan_file(tmp_path))
    assert stamp == (tmp_path / "out.jsonl").stat().st_mtime_ns


def test_a_custom_task_and_other_calibration_sets(tmp_path: Path, models: Path) -> None:
    rows = [
        {"prompt": f"swap {a}{b} >", "completion": f" {b}{a}"} for a in "abcdef" for b in "ghij"
    ]
    for name in ("swap", "swap_test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plan = plan_file(
        tmp_path,
        calibration=[
            {"source": source, "count": 4} for source in ("self", "pretraining", "narrow")
        ],
        sweeps=[{"methods": ["folora"], "learning_rates": [1e-2]}],
    )
    own = ["--train", str(tmp_path / "swap.jsonl"), "--test", str(tmp_path / "swap_test.jsonl")]
    run(tmp_path, models, plan, *own, "--seeds", "7")
    results = load_results(tmp_path / "out.jsonl")
    assert {r.task for r in results} == {"swap"}
    assert {r.calibration["source"] for r in results} == {"self", "pretraining", "narrow"}
    assert len({r.readings[-1]["kl"] for r in results}) == 3


def test_narrow_texts_hold_sums_only(tmp_path: Path, models: Path) -> None:
    plan = Plan.load(plan_file(tmp_path))
    testbed = WorldTestbed(plan, 7, models)
    base = FoLoraConfig().changed(plan.base)
    made = task_run(base, testbed, tmp_path / "run", "difference", None)
    texts = {
        source: "".join(
            made.context.tokenizer.decode(ids) for ids in testbed.texts(made, source, 8)
        )
        for source in ("narrow", "pretraining")
    }
    documents = texts["narrow"].split("<bos>")[1:]
    assert all("sum ".startswith(d[:4]) for d in documents)
    assert not all("sum ".startswith(d[:4]) for d in texts["pretraining"].split("<bos>")[1:])


def test_replayed_text_is_that_of_pretraining(tmp_path: Path, models: Path) -> None:
    sweep = {"methods": ["lora", "lora-replay-5"], "learning_rates": [1e-2]}
    plan = plan_file(tmp_path, tasks=["difference"], replay="pretraining", sweeps=[sweep])
    run(tmp_path, models, plan)
    plain, replayed = load_results(tmp_path / "out.jsonl")
    assert (plain.method, replayed.method) == ("lora", "lora-replay-5")
    assert plain.readings[-1]["kl"] != replayed.readings[-1]["kl"]
    lines = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    found = [line["made_from"].get("replayed_text", [None])[0] for line in lines]
    assert found == [None, "pretraining"]


def test_a_missing_world_is_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.world.testbed.STEPS", 60)
    monkeypatch.setattr("benchmarks.world.pretrain.BATCH", 2)
    plan = plan_file(
        tmp_path, tasks=["difference"], sweeps=[{"methods": ["lora"], "learning_rates": [1e-3]}]
    )
    run(tmp_path, tmp_path / "models", plan, "--seeds", "8")
    (result,) = load_results(tmp_path / "out.jsonl")
    assert (result.stage, result.seed) == ("world-8", 8)
    assert json.loads((tmp_path / "models" / "world" / "8" / "world.json").read_text())["seed"] == 8


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"tasks": ["shfit"]}, [], "did you mean 'shift'"),
        ({"model": "wrld"}, [], "did you mean 'world'"),
        ({"calibration": [{"source": "wide", "count": 8}]}, [], "source must be in"),
        ({"replay": "narrow"}, [], "known: pretraining"),
        ({"sequence": True}, [], "run it by python -m benchmarks.sequence"),
        ({}, ["--train", "rows.jsonl"], "--train and --test belong together"),
        ({"model": "smollm2"}, ["--train", "a.jsonl", "--test", "b.jsonl"], "plans of worlds"),
    ],
)
def test_a_wrong_plan_is_refused_before_a_world_is_pretrained(
    tmp_path: Path, changes: dict[str, Any], more: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, tmp_path / "models", plan_file(tmp_path, **changes), *more)
    assert not (tmp_path / "models").exists()
