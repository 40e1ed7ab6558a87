"""The command line: wrong input ends with one sentence, exit code 2, and no changed file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import folora
from benchmarks.tiny import make_llama, make_tokenizer, tiny_config
from folora.cli.main import main
from folora.cli.parsing import COMMANDS, USES, parse
from folora.config import FIRST_LOOK, FoLoraConfig, option_names
from folora.pipeline.planning import plan


@pytest.fixture(autouse=True)
def measures_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan measures full rows and does not extrapolate, however busy the machine is."""
    monkeypatch.setattr("folora.pipeline.planning.MAX_SECONDS", 1e6)


@pytest.fixture
def nan_model(tmp_path: Path) -> Path:
    model = make_llama()
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    make_tokenizer().save_pretrained(tmp_path / "nan")
    return tmp_path / "nan"


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


def test_wrong_input_of_every_kind(
    model_folder: Path, rows_file: Path, nan_model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": ')
    (tmp_path / "nothing").mkdir()
    good = {"model": str(model_folder), "dataset": str(rows_file), "output": str(out)}

    def run(extra: list[str] | None = None, **changes: str | None) -> str:
        values = {k: v for k, v in {**good, **changes}.items() if v is not None}
        flags = [part for k, v in values.items() for part in (f"--{k}", v)]
        length = ["--sampling.max_new_tokens", "200"]  # the tiny model's context is 256
        return fails(["run", *flags, *length, "--device", "cpu", *(extra or [])], capsys)

    assert "--model is required" in run(model=None)
    assert "--output is required" in run(output=None)
    assert "--dataset is required" in run(dataset=None)
    assert "does not exist" in run(dataset=str(tmp_path / "no.jsonl"))
    assert "is empty" in run(dataset=str(tmp_path / "empty.jsonl"))
    assert "cannot be read" in run(dataset=str(tmp_path / "broken.jsonl"))
    assert "does not exist" in run(model=str(tmp_path / "no" / "model"))
    assert "config.json is missing" in run(model=str(tmp_path / "nothing"))
    assert "cannot be loaded" in run(model="nobody/nothing-of-this-name")
    assert "did you mean '--adapter.r'" in run(["--adapter.rr", "4"])
    assert "did you mean '--spectrum.tau'" in run(["--spectrum.tua=4"])
    assert "spectrum.s_min is 2" in run(["--spectrum.s_min", "2"])
    assert "did you mean '--training.packing'" in run(["--training.pakcing", "true"])
    column = ["--data.prompt_column", "promt", "--data.response_column", "completion"]
    assert "did you mean 'prompt'" in run(column)
    assert "not a token" in run(["--sampling.start_token", "nonsense"])
    assert "device is 'cuda:77'" in run(["--device", "cuda:77"])
    assert not out.exists()  # nothing was started

    assert "r is 999" in run(["--r", "999"])
    assert "down_proj" in run(model=str(nan_model))
    assert not list(out.rglob("shard-*"))


def test_a_stage_without_its_input_is_refused(
    model_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(model_folder), "--dataset", str(rows_file), "--output", str(tmp_path)]
    assert "folora sample" in fails(["measure", *flags, "--device", "cpu"], capsys)


def test_plan(model_folder: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        "--model",
        str(model_folder),
        "--dataset",
        str(rows_file),
        "--device",
        "cpu",
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "14 layers read 8 inputs" in text
    assert "48" in text
    assert "A forward and backward pass over 8 rows of" in text
    for stage in ("sample", "measure", "solve", "train", "export"):
        assert stage in text
    assert "Memory by spectrum.directions" in text


def test_plan_recommends_directions_that_fit_into_memory(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FoLoraConfig.from_dict(
        {"model": str(model_folder), "device": "cpu", "dtype": "float32"}
    )
    whole = config.changed({"spectrum.directions": "all"})
    found = plan(whole)
    every = sum(4 * g.d_in**2 for g in found.coverage.groups)
    leading = sum(4 * 16 * g.d_in for g in found.coverage.groups)
    assert [(s.directions, s.bases) for s in found.sizes] == [(None, every), (16, leading)]
    assert [s.directions for s in plan(config).sizes] == [16, None]
    without = found.sizes[0].training - every
    for room, advised in ((every, [None]), (every - 1, [16]), (leading - 1, [])):
        monkeypatch.setattr(
            "folora.pipeline.planning.free_bytes", lambda _, room=room: without + room + 1
        )
        advice = plan(whole).advice
        assert [size.directions for size in [advice] if size] == advised


def test_plan_uses_the_training_batch_size(model_folder: Path) -> None:
    config = FoLoraConfig.from_dict(
        {"model": str(model_folder), "device": "cpu", "dtype": "float32"}
    ).changed({"training.per_device_train_batch_size": 3, "data.max_length": 100})
    found, shorter = plan(config), plan(config, longest=40)
    assert (found.batch, shorter.batch) == ((3, 100), (3, 40))
    assert 0.3 < shorter.activations / found.activations < 0.45
    saved = found.activations - shorter.activations
    assert found.sizes[0].training - shorter.sizes[0].training == saved > 0
    packed = config.changed({"training.packing": True, "training.max_length": 64})
    assert plan(packed, longest=40).batch == (3, 64)
    less = plan(config.changed({"training.gradient_checkpointing": True}))
    assert less.activations < found.activations


def test_plan_divides_work_among_processes(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2000 sequences are 32 batches, and 8 inputs are solved: at most 11 and 3 for each of 3 processes."""
    monkeypatch.setattr("folora.pipeline.planning._speed", lambda *_: 1e9)
    monkeypatch.setattr("folora.pipeline.planning.free_bytes", lambda _: 12_000_000)
    config = FoLoraConfig.from_dict({"model": str(model_folder), "device": "cpu"})
    one, three = plan(config, 9000, 90), plan(config, 9000, 90, processes=3)
    share = {
        a.name: b.seconds / a.seconds
        for a, b in zip(one.stages, three.stages, strict=True)
        if a.seconds is not None and b.seconds is not None
    }
    wanted = {"sample": 11 / 32, "measure": 1 / 3, "solve": 3 / 8, "train": 1 / 3}
    assert share == pytest.approx(wanted)
    assert [s.memory for s in one.stages] == [s.memory for s in three.stages]
    assert one.free == 3 * three.free


def test_plan_excludes_sampling_on_a_server(model_folder: Path) -> None:
    config = FoLoraConfig.from_dict({"model": str(model_folder), "device": "cpu"})
    own = plan(config).stages
    other = plan(config.changed({"sampling.server": "http://localhost:8000"})).stages
    assert own[0].seconds is not None and other[0].seconds is None
    assert own[0].memory > other[0].memory > 0
    assert [s.memory for s in own[1:]] == [s.memory for s in other[1:]]


def test_plan_gives_the_minimum_if_sampling_stops_at_its_first_check(
    model_folder: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first check is after one of 32 batches of 64 sequences."""
    monkeypatch.setattr("folora.pipeline.planning._speed", lambda *_: 1e9)
    config = FoLoraConfig(model=str(model_folder), device="cpu", dataset=str(rows_file))
    stages = {stage.name: stage for stage in plan(config).stages}
    sampling, measuring = stages["sample"], stages["measure"]
    assert sampling.seconds and sampling.soonest == pytest.approx(sampling.seconds / 32)
    assert measuring.seconds and measuring.soonest
    task = config.statistics.task_examples * 256
    length = (config.sampling.min_new_tokens + config.sampling.max_new_tokens) // 2
    assert measuring.soonest / measuring.seconds == pytest.approx(
        (FIRST_LOOK * length + task) / (2000 * length + task)
    )
    never = plan(config.changed({"sampling.tolerance": None})).stages
    no_task = plan(config.changed({"dataset": None})).stages  # early stopping needs a task
    assert all(stage.soonest == stage.seconds for stage in (*never, *no_task))
    assert [stage.seconds for stage in never] == [stage.seconds for stage in plan(config).stages]


def test_plan_counts_the_passes_that_a_small_memory_needs(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With half of the memory there are two passes: twice the forward passes, half of the matrices."""
    monkeypatch.setattr("folora.pipeline.planning._speed", lambda *_: 1e9)
    config = FoLoraConfig.from_dict({"model": str(model_folder), "device": "cpu"})
    whole = plan(config)
    needed = sum(4 * g.d_in**2 for g in whole.coverage.groups) / 1e9
    half = plan(config.changed({"statistics.memory_gb": needed / 2}))
    a, b = (next(s for s in found.stages if s.name == "measure") for found in (whole, half))
    assert a.seconds is not None
    assert b.seconds is not None
    length = (config.sampling.min_new_tokens + config.sampling.max_new_tokens) // 2
    tokens = config.sampling.num_sequences * length + config.statistics.task_examples * 256
    assert b.seconds - a.seconds == pytest.approx(2 * whole.parameters * tokens / 1e9)
    assert a.memory - b.memory == pytest.approx(needed * 1e9)


def test_stages_run_one_by_one(
    model_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    config = tiny_config(
        model=str(model_folder), dataset=str(rows_file), output=str(out),
        sampling={"num_sequences": 32}, adapter={"r": 2}, training={"max_steps": 2},
    )  # fmt: skip
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    flags = ["--config", str(tmp_path / "c.yaml")]
    for command in ("sample", "measure", "solve", "train", "export"):
        assert main([command, *flags]) == 0, command
        flags = ["--output", str(out)]  # the rest is in its config.yaml
    assert FoLoraConfig.from_yaml(out / "config.yaml") == config
    assert main(["export", *flags, "--rank", "1", "--to", str(tmp_path / "small")]) == 0
    text = capsys.readouterr().out
    assert "definition" in text and "KL to the base is" in text
    assert "relative error of the update" in text
    assert (out / "5-adapter" / "adapter_config.json").exists()
    assert (tmp_path / "small" / "adapter_model.safetensors").exists()


def test_later_stages_take_their_options_from_the_run_folder(tmp_path: Path) -> None:
    """Flags win over it, and a file that is given replaces it; a first stage reads none."""
    (tmp_path / "config.yaml").write_text("sampling: {num_sequences: 99}\nspectrum: {tau: 0.5}\n")
    (tmp_path / "other.yaml").write_text("spectrum: {tau: 0.25}\n")
    output = ["--output", str(tmp_path)]

    def options(*words: str) -> tuple[int, float]:
        found = parse([*words, *output])
        assert found is not None
        return found[1].sampling.num_sequences, found[1].spectrum.tau

    for command in ("measure", "solve", "train", "export"):
        assert options(command) == (99, 0.5)
        assert options(command, "--config", str(tmp_path / "other.yaml")) == (2000, 0.25)
    assert options("solve", "--spectrum.tau", "0.1") == (99, 0.1)
    for command in ("run", "sample", "base", "plan", "compare"):
        assert options(command) == (2000, 1e-3)


def test_the_module_runs_and_libraries_are_silent(model_folder: Path) -> None:
    """With every extra installed; bitsandbytes logs when it is imported."""
    command = [sys.executable, "-m", "folora"]
    done = subprocess.run(
        [*command, "plan", "--model", str(model_folder), "--device", "cpu"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "Stages" in done.stdout
    assert done.stderr == ""
    version = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True)
    assert version.stdout == f"folora {folora.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_options_that_a_command_uses(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In groups, with type, interval and default; every other option is refused by name."""
    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    for name, option in option_names().items():
        used = {name, name.partition(".")[0]} & {*USES[command]}
        assert (f"--{name}" in text.replace(",", "").split()) == bool(used)
        if not used:
            assert f"does not use --{name};" in fails([command, f"--{name}", "1"], capsys)
        elif option.default not in (None, ""):
            assert f"default: {str(option.default).lower()}" in text.lower()
        if used and option.allowed:
            assert f"must {option.allowed}" in text


def test_a_group_of_options_has_its_heading(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for heading in ("model, data and method:", "sampling:", "spectrum:", "adapter:", "training:"):
        assert heading in lines
    assert any(line.split()[:3] == ["--adapter.r,", "--r", "INT"] for line in lines)
    assert any(line.split()[:2] == ["--quantize", "none|8bit|4bit"] for line in lines)


def test_a_config_file_may_hold_options_that_a_command_does_not_use(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("training: {learning_rate: 1e-3}\nmodel: m\n")
    found = parse(["sample", "--config", str(tmp_path / "c.yaml")])
    assert found is not None and found[1].training.learning_rate == 1e-3
