"""Plans: names, types and includes are checked, and the committed plans are valid."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import sequence
from benchmarks.compare import TESTBEDS
from benchmarks.includes import read_included
from benchmarks.plan import Plan
from benchmarks.rivals import RIVALS
from folora.compare.arms import Arm
from folora.config import FoLoraConfig
from folora.errors import ConfigError

PLANS = sorted((Path(__file__).parents[2] / "benchmarks" / "plans").glob("*.yaml"))
CONFIGS = sorted((Path(__file__).parents[2] / "benchmarks" / "configs").glob("*.yaml"))
GOOD: dict[str, Any] = {
    "model": "world", "base": {}, "tasks": ["a"], "seeds": [0], "runs": "r",
    "sweeps": [{"methods": ["lora"], "learning_rates": [1e-3]}],
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of datasets with the files that a plan is checked for."""
    (tmp_path / "PROVENANCE.md").write_text("made up")
    monkeypatch.setenv("FOLORA_DATA_DIR", str(tmp_path))


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_committed_plans_are_valid_and_name_every_arm_once(path: Path, data: None) -> None:
    plan = Plan.load(path)
    check = sequence.check if plan.sequence else TESTBEDS[plan.model].check
    check(plan)
    arms = plan.arms()
    assert len({arm.name for arm in arms}) == len(arms) > 0
    base = FoLoraConfig().changed(plan.base)
    rivals = {} if plan.sequence else {rival.method.name: rival.method for rival in RIVALS}
    for arm in arms:
        base.changed({"method": rivals.get(arm.method, arm.method), **arm.changes})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_committed_configs_are_valid(path: Path) -> None:
    assert FoLoraConfig.from_yaml(path).model is not None


def test_a_wrong_plan_ends_with_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "model": "wrld"}))
    command = [sys.executable, "-m", "benchmarks.compare", "--plan", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if "folora:" in line)
    assert line.startswith("folora: the plan names 'wrld' (did you mean 'world'?)")
    assert "Traceback" not in done.stderr


def test_arms_are_chosen_by_method_and_learning_rate() -> None:
    sweeps = [
        {"methods": ["lora"], "learning_rates": [5e-4, 1e-3]},
        {"methods": ["folora"], "learning_rates": [1e-3]},
    ]
    plan = Plan.of({**GOOD, "sweeps": sweeps})
    every = plan.arms()
    assert len(every) == 3
    assert plan.arms(["lora"], [1e-3]) == [every[1]]
    assert plan.arms(None, [1e-3]) == every[1:]
    assert plan.arms(["lora"]) == every[:2]
    with pytest.raises(ConfigError, match="no such arm with folora"):
        plan.arms(["folora", "lora"], [5e-4])
    with pytest.raises(ConfigError, match=r"no such arm with 0\.01"):
        plan.arms(None, [1e-3, 1e-2])


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
    assert Plan.of(GOOD).arms() == [Arm("lora", {"training.learning_rate": 1e-3})]
    with pytest.raises(ConfigError, match=f"the plan cannot be used: .*{message}"):
        Plan.of({**GOOD, **changes})
    for name in GOOD:
        with pytest.raises(ConfigError, match=name):
            Plan.of({k: v for k, v in GOOD.items() if k != name})


def test_a_plan_can_include_and_override_another(tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_text("tasks: [a, b]\nbase: {x: 1, y: 2}\nsweeps: []\n")
    (tmp_path / "part.yaml").write_text("include: [whole.yaml]\ntasks: [a]\nbase: {y: 3, z: 4}\n")
    assert read_included(tmp_path / "part.yaml") == {
        "tasks": ["a"],
        "base": {"x": 1, "y": 3, "z": 4},
        "sweeps": [],
    }


@pytest.mark.parametrize("text", ["3", "[3]", "x.yaml", "null", "[[x.yaml]]", "{x: y}"])
def test_include_must_be_a_list_of_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text("tasks: [a]\n")
    (tmp_path / "plan.yaml").write_text(f"include: {text}\n")
    with pytest.raises(
        ConfigError, match=r"plan\.yaml: include is .*, but must be a list of files"
    ):
        read_included(tmp_path / "plan.yaml")


def test_indirect_circular_includes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.yaml").write_text("include: [../a/y.yaml]\n")
    (tmp_path / "a" / "y.yaml").write_text("include: [../a/../a/x.yaml]\n")
    with pytest.raises(ConfigError, match="includes itself"):
        read_included(tmp_path / "a" / "x.yaml")
