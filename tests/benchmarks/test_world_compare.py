"""The comparison on synthetic worlds runs from a plan, on built-in and custom tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.plans import TINY_PLAN_BASE

from benchmarks.sweeps import checked_plan, planned, read_plan
from benchmarks.world.compare import calibration_texts, main, prepared_run
from benchmarks.world.language import World, tasks
from benchmarks.world.pretrain import pretrain
from folora.compare.comparison import Arm
from folora.compare.methods import configured
from folora.compare.results import load_results
from folora.config import FoLoraConfig
from folora.errors import ConfigError

PLANS = sorted((Path(__file__).parents[2] / "benchmarks" / "plans").glob("*.yaml"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world that was hardly pretrained."""
    folder = tmp_path_factory.mktemp("worlds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.world.pretrain.BATCH", 2)
        pretrain(folder / "7", seed=7, steps=60)
    return folder


@pytest.fixture(autouse=True)
def _few_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each skill: what a world has kept is not judged here, and asking takes the most time."""
    monkeypatch.setattr("benchmarks.world.compare.EVERY", 40)


def plan_file(folder: Path, **changes: object) -> Path:
    plan = {
        "runs": "tiny",
        "tasks": ["difference", "instrument"],
        "seeds": [7],
        "read_at": [0.5, 1.0],
        "base": {**TINY_PLAN_BASE, "sampling.ignore_eos": True},
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
        str(folder / "out"),
    ]
    main(["--plan", str(plan), *places, *more])


def test_a_plan_writes_one_file_per_arm_and_shares_the_base_statistics(
    tmp_path: Path, models: Path
) -> None:
    run(tmp_path, models, plan_file(tmp_path))
    results = load_results(tmp_path / "out")
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
        (tmp_path / "runs" / "tiny" / "7" / task / "2-statistics" / "pre" / "tensors.safetensors")
        for task in ("difference", "instrument")
    ]
    assert pre[0].read_bytes() == pre[1].read_bytes()
    assert pre[0].stat().st_mtime_ns == pre[1].stat().st_mtime_ns  # copied, not measured again

    stamps = {r.path: r.path.stat().st_mtime_ns for r in results}
    run(tmp_path, models, plan_file(tmp_path))
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}


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
    results = load_results(tmp_path / "out")
    assert {r.task for r in results} == {"swap"}
    assert {r.calibration["source"] for r in results} == {"self", "pretraining", "narrow"}
    assert len({r.readings[-1]["kl"] for r in results}) == 3


def test_narrow_texts_hold_sums_only(tmp_path: Path, models: Path) -> None:
    base = FoLoraConfig().changed(yaml.safe_load(plan_file(tmp_path).read_text())["base"])
    task = tasks(World(7))["difference"]
    made = prepared_run(base, models / "7", tmp_path / "run", task, None, 7)
    texts = {
        source: "".join(
            made.tokenizer.decode(ids) for ids in calibration_texts(made, World(7), source, 8)
        )
        for source in ("narrow", "pretraining")
    }
    documents = texts["narrow"].split("<bos>")[1:]
    assert all("sum ".startswith(d[:4]) for d in documents)
    assert not all("sum ".startswith(d[:4]) for d in texts["pretraining"].split("<bos>")[1:])


def test_a_missing_world_is_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.world.compare.STEPS", 60)
    monkeypatch.setattr("benchmarks.world.pretrain.BATCH", 2)
    plan = plan_file(
        tmp_path, tasks=["difference"], sweeps=[{"methods": ["lora"], "learning_rates": [1e-3]}]
    )
    run(tmp_path, tmp_path / "models", plan, "--seeds", "8")
    (result,) = load_results(tmp_path / "out")
    assert (result.stage, result.seed) == ("world-8", 8)
    assert json.loads((tmp_path / "models" / "8" / "world.json").read_text())["seed"] == 8


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_committed_plans_are_valid_and_name_every_arm_once(path: Path) -> None:
    arms = planned(read_plan(path))
    assert len({arm.name for arm in arms}) == len(arms) > 0
    base = FoLoraConfig().changed(read_plan(path)["base"])
    for arm in arms:
        configured(base, arm.method, arm.changes)


def test_a_plan_can_include_and_override_another(tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_text("tasks: [a, b]\nbase: {x: 1, y: 2}\nsweeps: []\n")
    (tmp_path / "part.yaml").write_text("include: [whole.yaml]\ntasks: [a]\nbase: {y: 3, z: 4}\n")
    assert read_plan(tmp_path / "part.yaml") == {
        "tasks": ["a"],
        "base": {"x": 1, "y": 3, "z": 4},
        "sweeps": [],
    }


GOOD: dict[str, Any] = {
    "base": {}, "tasks": ["a"], "seeds": [0], "runs": "r",
    "sweeps": [{"methods": ["lora"], "learning_rates": [1e-3]}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweeps": 3}, "sweeps: "),
        ({"sweeps": [{"methods": ["lora"]}]}, r"sweeps\.0\.learning_rates: "),
        ({"sweeps": [{"methods": [["lora"]], "learning_rates": [1e-3]}]}, r"sweeps\.0\.methods"),
        ({"sweeps": [{**GOOD["sweeps"][0], "knobs": {"adapter.r": 3}}]}, r"knobs\.adapter\.r"),
        ({"base": [1]}, "base: "),
        ({"seeds": None}, "seeds: "),
        ({"sweps": []}, "sweps: "),
    ],
)
def test_a_plan_with_wrong_types_is_refused(changes: dict[str, Any], message: str) -> None:
    assert planned(checked_plan(GOOD)) == [Arm("lora", {"training.learning_rate": 1e-3})]
    with pytest.raises(ConfigError, match=f"the plan cannot be used: .*{message}"):
        checked_plan({**GOOD, **changes})
    for name in GOOD:
        with pytest.raises(ConfigError, match=name):
            checked_plan({k: v for k, v in GOOD.items() if k != name})


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_committed_plans_have_valid_types(path: Path) -> None:
    plan = checked_plan(read_plan(path))
    assert planned(plan) == planned(read_plan(path))


@pytest.mark.parametrize("text", ["3", "[3]", "x.yaml", "null", "[[x.yaml]]", "{x: y}"])
def test_include_must_be_a_list_of_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text("tasks: [a]\n")
    (tmp_path / "plan.yaml").write_text(f"include: {text}\n")
    with pytest.raises(
        ConfigError, match=r"plan\.yaml: include is .*, but must be a list of files"
    ):
        read_plan(tmp_path / "plan.yaml")


def test_indirect_circular_includes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.yaml").write_text("include: [../a/y.yaml]\n")
    (tmp_path / "a" / "y.yaml").write_text("include: [../a/../a/x.yaml]\n")
    with pytest.raises(ConfigError, match="includes itself"):
        read_plan(tmp_path / "a" / "x.yaml")
