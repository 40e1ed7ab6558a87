"""The script for a GPU, on the CPU: all that it starts runs, within its limits, and writes where the report reads."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_trial
from benchmarks.compare import parser as compare_parser
from benchmarks.gpu import COMPARED, MINUTES, MODES, PLANS, Phase, Places, phases, run, run_all
from benchmarks.gpu_trial import shortened
from benchmarks.models import MODELS
from benchmarks.plan import Plan
from benchmarks.report.source import Source
from benchmarks.speed import __main__ as speed
from benchmarks.speed.shapes import SHAPES, Shape

MAINS = {
    "benchmarks.models": "benchmarks.models",
    "benchmarks.compare": "benchmarks.compare",
    "benchmarks.speed": "benchmarks.speed.__main__",
    "benchmarks.speed.whole": "benchmarks.speed.whole",
}
SMALL = Shape(64, 96, 4, 2, 16, 3, 1e6, 4)


def places(folder: Path, plans: Path = PLANS) -> Places:
    return Places(plans, folder / "models", folder / "runs", folder / "results")


def commands(found: list[Phase]) -> list[list[str]]:
    return [command for phase in found for command in phase.commands.values()]


def test_the_trial_takes_the_whole_way_and_the_report_reads_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command's own `main`, with the arguments of the trial."""
    if not os.environ.get("FOLORA_DATA_DIR"):
        pytest.skip("FOLORA_DATA_DIR is not set")
    monkeypatch.setitem(SHAPES, "smollm2-135m", SMALL)
    for name, value in shortened([PLANS / f"{name}.yaml" for name in COMPARED], tmp_path).items():
        monkeypatch.setenv(name, value)
    trial = places(tmp_path, tmp_path / "plans")
    for module, *rest in commands(phases(trial, trial=True)):
        monkeypatch.setattr("sys.argv", [module, *rest])
        import_module(MAINS[module]).main()
    found = Source.load(trial.results, trial.plans, tmp_path / "no demo")
    for name in COMPARED:
        assert not found.missing(name)
        assert {r.method for r in found.chosen(name, "equations")} == {"lora", "folora", "lora-kl"}
    assert set(found.measured("cpu", "smollm2-135m")[0]["steps"]["modes"]) == set(MODES)
    whole = json.loads((trial.results / "speed" / "setup-cpu-smollm2-mawps.json").read_text())
    assert whole["trained_steps"] == 2


def test_the_gpu_gets_the_same_commands_with_all_seeds_and_sizes(tmp_path: Path) -> None:
    whole, trial = (phases(places(tmp_path), trial) for trial in (False, True))
    assert [[*phase.commands] for phase in whole] == [[*phase.commands] for phase in trial]
    for module, *rest in commands(whole):
        assert hasattr(import_module(MAINS[module]), "main")
        if module == "benchmarks.models":
            assert rest[0] in MODELS
            continue
        options = import_module(MAINS[module]).parser().parse_args(rest)
        assert tmp_path / "results" in (options.output, options.output.parent)
        assert not getattr(options, "skip_setup", False)
        if module == "benchmarks.speed":
            assert set(options.shapes) <= set(SHAPES)
            assert set(options.modes) <= set(speed.MODES)
    parsed = [compare_parser().parse_args(c[1:]) for c in whole[-1].commands.values()]
    assert len({(options.plan, *options.seeds) for options in parsed}) == len(parsed) == 6


def test_times_leave_the_trainings_more_than_half_of_the_minutes(tmp_path: Path) -> None:
    *others, trainings = phases(places(tmp_path))
    assert sum(phase.seconds for phase in others) < 30 * MINUTES
    assert trainings.seconds >= 60 * MINUTES  # that is, whatever is left


def test_a_phase_ends_at_its_limit_and_names_the_outcome_of_each_command(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("{}")
    works, fails = ["json.tool", str(tmp_path / "rows.json")], ["json.tool", "gone.json"]
    found = run(Phase(60, {"works": works, "fails": fails}), 60, tmp_path / "logs")
    assert found == {"works": "done", "fails": f"failed, see {tmp_path / 'logs' / 'fails.log'}"}
    assert "gone.json" in (tmp_path / "logs" / "fails.log").read_text()


def test_a_failed_or_stopped_command_costs_the_others_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text("{}")
    chosen = [
        Phase(0.1, {"sleeps": ["timeit", "-n1", "-r1", "import time; time.sleep(60)"]}),
        Phase(60, {"fails": ["json.tool", "gone.json"]}),
        Phase(60, {"works": ["json.tool", str(rows), str(tmp_path / "made.json")]}),
    ]
    found = run_all(chosen, 30, tmp_path / "logs")
    assert (found["sleeps"], found["works"]) == ("stopped at the limit", "done")
    assert found["fails"].startswith("failed")
    assert (tmp_path / "made.json").read_text().strip() == "{}"
    assert "sleeps: stopped at the limit" in capsys.readouterr().out
    assert run_all(chosen[2:], 0.0, tmp_path / "logs") == {"works": "stopped at the limit"}


@pytest.mark.parametrize(("works", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_says_whether_a_command_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool, code: int
) -> None:
    (tmp_path / "rows.json").write_text("{}")
    command = ["json.tool", str(tmp_path / "rows.json") if works else "gone.json"]
    monkeypatch.setattr(gpu, "phases", lambda *_: [Phase(60, {"it": command})])
    words = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert gpu.main(words) == code


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data folder with one long file."""
    folder = tmp_path / "all"
    (folder / "mawps").mkdir(parents=True)
    (folder / "PROVENANCE.md").write_text("made up")
    with gzip.open(folder / "mawps" / "train.jsonl.gz", "wt") as lines:
        lines.writelines(f'{{"n": {n}}}\n' for n in range(500))
    monkeypatch.setenv("FOLORA_DATA_DIR", str(folder))
    yield folder
    shutil.rmtree(folder)


def test_a_trial_shortens_plans_models_and_data(tmp_path: Path, data: Path) -> None:
    files = [PLANS / f"{name}.yaml" for name in COMPARED]
    few = Path(shortened(files, tmp_path)["FOLORA_DATA_DIR"])
    with gzip.open(few / "mawps" / "train.jsonl.gz", "rt") as lines:
        assert len([*lines]) == gpu_trial.ROWS
    for file in files:
        whole, plan = Plan.load(file), Plan.load(tmp_path / "plans" / file.name)
        assert plan.base["training.max_steps"] == 2
        assert (plan.base["device"], len(plan.seeds)) == ("cpu", 1)
        assert plan.evaluation["documents"] == dict.fromkeys(whole.evaluation["documents"], 1)
        assert {arm.method for arm in plan.arms()} == {arm.method for arm in whole.arms()}
        assert any("budget" in arm.changes for arm in plan.arms())
        model = MODELS[plan.model](tmp_path / "models")  # no download
        assert (model / "model.safetensors").stat().st_size < 2**20
