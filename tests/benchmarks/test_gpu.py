"""The script for a GPU: its commands parse, a phase ends at its limit, and a trial is short."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.compare import parser as compare_parser
from benchmarks.gpu import PLANS, Phase, Places, phases, run
from benchmarks.plan import Plan
from benchmarks.speed.shapes import SHAPES
from benchmarks.speed.steps import MODES

PARSERS = {
    "benchmarks.compare": "benchmarks.compare",
    "benchmarks.speed": "benchmarks.speed.__main__",
    "benchmarks.speed.whole": "benchmarks.speed.whole",
}


def places(folder: Path) -> Places:
    return Places(PLANS, folder / "models", folder / "runs", folder / "results")


@pytest.mark.parametrize("trial", [False, True])
def test_every_command_parses_and_writes_where_the_report_reads(
    tmp_path: Path, trial: bool
) -> None:
    found = phases(places(tmp_path), "cpu" if trial else "cuda", trial)
    commands = [command for phase in found for command in phase.commands.values()]
    assert {command[0] for command in commands} == set(PARSERS)
    for module, *rest in commands:
        options = import_module(PARSERS[module]).parser().parse_args(rest)
        assert tmp_path / "results" in (options.output, options.output.parent)
        if module == "benchmarks.speed":
            assert set(options.modes) <= set(MODES)
            assert set(options.shapes) <= set(SHAPES)
    assert sum(phase.seconds for phase in found) <= 12 * 60


def test_no_two_commands_train_the_same_arm(tmp_path: Path) -> None:
    first, *_ = phases(places(tmp_path), "cuda")
    parsed = [compare_parser().parse_args(command[1:]) for command in first.commands.values()]
    assert len({(options.plan, *options.seeds) for options in parsed}) == len(parsed) == 6


def test_a_phase_ends_at_its_limit_and_names_the_outcome_of_each_command(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("{}")
    works, fails = ["json.tool", str(tmp_path / "rows.json")], ["json.tool", "gone.json"]
    found = run(Phase(60, {"works": works, "fails": fails}), 60, tmp_path / "logs")
    assert found == {"works": "done", "fails": f"failed, see {tmp_path / 'logs' / 'fails.log'}"}
    assert "gone.json" in (tmp_path / "logs" / "fails.log").read_text()
    sleeps = Phase(60, {"sleeps": ["timeit", "-n1", "-r1", "import time; time.sleep(60)"]})
    assert run(sleeps, 0.1, tmp_path / "logs") == {"sleeps": "stopped at the limit"}


def test_a_trial_shortens_the_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    models = dict.fromkeys(Plan.load(PLANS / f"{n}.yaml").model for n in gpu.EQUATIONS)
    monkeypatch.setattr(gpu, "MODELS", dict.fromkeys(models, lambda _: model_folder))
    short = gpu.shortened(places(tmp_path))
    assert (short.models / model_folder.name / "model.safetensors").exists()
    for name in gpu.EQUATIONS:
        whole, plan = (Plan.load(p.plans / f"{name}.yaml") for p in (places(tmp_path), short))
        assert plan.base["training.max_steps"] == 2
        assert (plan.base["device"], len(plan.seeds)) == ("cpu", 1)
        assert plan.evaluation["documents"] == dict.fromkeys(whole.evaluation["documents"], 1)
        assert plan.arms() == whole.arms()
