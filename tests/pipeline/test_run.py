"""A whole run on a tiny model: order on disk, skipping, going on after SIGKILL, and refusals."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.closeness import assert_near
from support.temporary_files import temporary
from transformers import AutoModelForCausalLM

from benchmarks.forks import Fork
from benchmarks.tiny import make_gpt2, make_llama, make_tokenizer, tiny_config
from folora.calibration.engine import HuggingFaceEngine
from folora.cli.main import main
from folora.config import FoLoraConfig
from folora.errors import ArtifactError, ConfigError, DataError, MismatchError
from folora.metrics.meter import Meter
from folora.pipeline.run import Run
from folora.runtime.artifacts import read_artifact, write_artifact
from folora.runtime.storage import LOCK
from folora.spectral.moments import Moments


def run_config(model: Path, rows: Path, output: Path, **changes: Any) -> FoLoraConfig:
    return tiny_config(model=str(model), dataset=str(rows), output=str(output), **changes)


@pytest.fixture(scope="module")
def finished(
    model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> FoLoraConfig:
    """An uninterrupted run, with the paper's start, to compare with and to copy from."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    config = run_config(
        model_folder, rows_file, output, method={"name": "folora", "init": "null_space"}
    )
    Run(config).run()
    return config


def copy_of(config: FoLoraConfig, target: Path) -> FoLoraConfig:
    shutil.copytree(str(config.output), target)
    return config.replace(output=str(target))


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "5-adapter" / "adapter_model.safetensors").read_bytes()


def stamps(folder: Path) -> dict[str, int]:
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns
        for p in folder.rglob("*.safetensors")
        if "5-adapter" not in str(p)
    }


def test_the_folder_explains_itself(finished: FoLoraConfig) -> None:
    folder = Path(str(finished.output))
    assert sorted(p.name for p in folder.iterdir() if p.name != LOCK) == [
        "1-samples", "2-statistics", "3-spectrum", "4-training", "5-adapter",
        "config.yaml", "folora.json", "report.json",
    ]  # fmt: skip
    report = json.loads((folder / "report.json").read_text())
    assert report["adapted"]["kl"] > 0
    assert report["base"]["kl"] == 0
    assert report["steps"] == 6
    assert len(report["norms"]) == 14
    assert FoLoraConfig.from_yaml(folder / "config.yaml") == finished
    manifest = json.loads((folder / "2-statistics" / "pre" / "manifest.json").read_text())
    assert {"model", "tokenizer", "samples", "tokens", "sha256", "versions"} <= set(manifest)
    assert not temporary(folder)


def test_a_run_keeps_and_trains_along_the_directions_it_is_told(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    config = run_config(model_folder, rows_file, tmp_path / "one")
    for directions, kept in ((8, {8}), ("all", {32, 48})):
        Run(config.changed({"spectrum.directions": directions})).run()
        result = read_artifact(tmp_path / "one" / "4-training" / "result", "training")
        assert result.manifest["adapted"]["task_loss"] < result.manifest["base"]["task_loss"]
        spectrum = read_artifact(tmp_path / "one" / "3-spectrum", "spectrum").tensors
        assert {t.shape[1] for name, t in spectrum.items() if name.endswith("/basis")} == kept


def test_layers_may_be_measured_a_part_at_a_time(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """A room for the matrices of two inputs: the texts are read several times, for the same numbers."""
    config = run_config(model_folder, rows_file, tmp_path / "one")
    run = Run(config)
    run.sample()
    run.measure()
    tight = config.changed(
        {"statistics.memory_gb": 2 * 4 * 32**2 / 1e9, "output": str(tmp_path / "parts")}
    )
    shutil.copytree(tmp_path / "one" / "1-samples", tmp_path / "parts" / "1-samples")
    counted: list[int] = []
    parts = Run(tight)
    _ = parts.context.groups  # found by forward passes as well
    parts.context.model.register_forward_hook(lambda *_: counted.append(1))
    parts.measure()
    for part in ("pre", "task"):
        one, other = (Moments.load(r.folder / "2-statistics" / part) for r in (run, parts))
        assert one.matrices.keys() == other.matrices.keys()
        assert all(torch.equal(m, other.matrices[n]) for n, m in one.matrices.items())
        assert one.tokens == other.tokens
    batches = sum(-(-n // 8) for n in (len(run.samples().calibration), 16))
    assert len(counted) == 6 * batches  # of two blocks of widths 32, 32 | 32 | 48


def test_the_adapter_reproduces_the_reading(finished: FoLoraConfig) -> None:
    folder = Path(str(finished.output))
    run = Run(finished)
    base = AutoModelForCausalLM.from_pretrained(str(finished.model))
    model = PeftModel.from_pretrained(base, str(folder / "5-adapter"))
    reading = Meter(run.samples().held_out, run.context.task.held_out).read(model)
    report = json.loads((folder / "report.json").read_text())
    assert reading.kl == pytest.approx(report["adapted"]["kl"], rel=1e-3)
    assert reading.task_loss == pytest.approx(report["adapted"]["task_loss"], rel=1e-4)


def test_a_second_call_does_nothing_again(finished: FoLoraConfig, tmp_path: Path) -> None:
    config = copy_of(finished, tmp_path / "run")
    before = stamps(tmp_path / "run")
    Run(config).run()
    assert stamps(tmp_path / "run") == before


@pytest.mark.parametrize("command", ["run", "sample"])
def test_a_command_test_decodes_once(
    finished: FoLoraConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    checks: list[HuggingFaceEngine] = []
    monkeypatch.setattr(HuggingFaceEngine, "check_decodes", lambda self: checks.append(self))
    config = finished.replace(output=str(tmp_path / "run"))
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert main([command, "--config", str(tmp_path / "c.yaml")]) == 0
    assert len(checks) == 1


def test_only_what_depends_on_a_change_is_done_again(
    finished: FoLoraConfig, tmp_path: Path
) -> None:
    config = copy_of(finished, tmp_path / "run")
    before = stamps(tmp_path / "run")
    config = config.replace(spectrum=config.spectrum.replace(tau=0.1))
    Run(config).run()
    after = stamps(tmp_path / "run")
    for part in ("1-samples", "2-statistics"):
        assert all(after[k] == v for k, v in before.items() if k.startswith(part))
    assert after["3-spectrum/tensors.safetensors"] != before["3-spectrum/tensors.safetensors"]
    assert (tmp_path / "run" / "old" / "3-spectrum-1" / "manifest.json").exists()
    assert (tmp_path / "run" / "old" / "4-training-1" / "result").exists()
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(Path(str(finished.output)))


def test_a_second_data_set_keeps_the_bases_statistics(
    finished: FoLoraConfig, tmp_path: Path
) -> None:
    config = copy_of(finished, tmp_path / "run")
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "say", "completion": "hello"}\n' * 20)
    before = stamps(tmp_path / "run")
    run = Run(config.replace(dataset=str(other)))
    run.sample()
    run.measure()
    after = stamps(tmp_path / "run")
    pre, task = (f"2-statistics/{part}/tensors.safetensors" for part in ("pre", "task"))
    assert after[pre] == before[pre]
    assert after[task] != before[task]


def kill_at(marker: Path, words: list[str], place: Path) -> None:
    """Start the command line and SIGKILL it as soon as the marker is there."""
    fork = Fork(words, place, prepare=gc.freeze)
    while not marker.exists() and fork.lives():
        time.sleep(0.002)
    fork.send(signal.SIGKILL)
    ended = fork.ended()
    assert ended.code in (-signal.SIGKILL, 0), ended.said
    assert marker.exists()


def test_sigkill_in_every_stage_loses_nothing(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = run_config(
        model_folder, rows_file, folder, method={"name": "folora", "init": "null_space"}
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    words = ["run", "--config", str(tmp_path / "config.yaml")]
    # In a fork as well, which has one thread: others add up in another order.
    whole = Fork(
        [*words, "--output", str(tmp_path / "whole")], tmp_path, "whole", gc.freeze
    ).ended()
    assert whole.code == 0, whole.said
    for marker in (
        "1-samples/shard-000000.json",
        "2-statistics/pre",
        "3-spectrum",
        "4-training/checkpoint-2/optimizer.pt",
    ):
        kill_at(folder / marker, words, tmp_path)
        assert not (folder / "report.json").exists()
    done = Fork(words, tmp_path, prepare=gc.freeze).ended()
    assert done.code == 0, done.said
    assert "After 6 steps" in (tmp_path / "folora.stdout").read_text()
    assert not temporary(folder)
    assert adapter_bytes(folder) == adapter_bytes(tmp_path / "whole")


def test_another_models_statistics_are_refused(finished: FoLoraConfig, tmp_path: Path) -> None:
    config = copy_of(finished, tmp_path / "run")
    make_llama(seed=1).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    run = Run(config.replace(model=str(tmp_path / "other")))
    for stage in (run.measure, run.solve, run.train):
        with pytest.raises(MismatchError, match="another model"):
            stage()


@pytest.mark.parametrize(
    "part", ["1-samples/set", "2-statistics/task", "3-spectrum", "4-training/result"]
)
@pytest.mark.parametrize("damage", ["cut", "flip", "manifest"])
def test_damaged_files_are_named(
    finished: FoLoraConfig, tmp_path: Path, part: str, damage: str
) -> None:
    config = copy_of(finished, tmp_path / "run")
    folder = tmp_path / "run" / part
    file = folder / ("manifest.json" if damage == "manifest" else "tensors.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-7] ^= 4
    file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    run = Run(config)
    stages = {"1": run.measure, "2": run.solve, "3": run.train, "4": run.export}
    with pytest.raises(ArtifactError) as error:
        stages[part[0]]()
    assert str(file) in str(error.value)


def test_missing_stages_name_the_command(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = Run(run_config(model_folder, rows_file, tmp_path / "run"))
    with pytest.raises(ArtifactError, match="folora sample"):
        run.measure()
    with pytest.raises(ArtifactError, match="folora measure"):
        run.solve()
    with pytest.raises(ArtifactError, match="folora solve"):
        run.train()
    with pytest.raises(ArtifactError, match="folora train"):
        run.export()


@pytest.mark.parametrize(
    ("command", "flag", "value", "said"),
    [
        (
            "measure",
            "seed",
            "1",
            "seed is 1, but folora measure reads results that were made with 0",
        ),
        ("solve", "sampling.start_token", "eos", "sampling.start_token is 'eos', but folora solve"),
        ("train", "spectrum.tau", "0.5", "spectrum.tau is 0.5, but folora train"),
        ("train", "spectrum.directions", "9", "spectrum.directions, or adapter.r is 9"),
        ("train", "adapter.r", "2", "method.init, or adapter.r is 2"),
        ("train", "seed", "1", "the seed of training alone is training.seed"),
        ("train", "data.eval_rows", "0", "the rows differ from those that C_task was measured on"),
        ("export", "sampling.held_out", "0.2", "sampling.held_out is 0.2, but folora export"),
    ],
)
def test_a_flag_that_a_later_stage_would_not_honour_is_refused_by_name(
    finished: FoLoraConfig, command: str, flag: str, value: str, said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = (Path(str(finished.output)) / "config.yaml").read_bytes()
    assert main([command, "--output", str(finished.output), f"--{flag}", value]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert (Path(str(finished.output)) / "config.yaml").read_bytes() == before


def test_a_flag_that_nothing_has_used_may_change(finished: FoLoraConfig, tmp_path: Path) -> None:
    config = copy_of(finished, tmp_path / "copy")
    words = ["train", "--output", str(config.output), "--spectrum.lam", "2", "--max-steps", "1"]
    assert main(words) == 0
    assert FoLoraConfig.from_yaml(tmp_path / "copy" / "config.yaml").spectrum.lam == 2.0


def test_merged_and_cut_back_exports(finished: FoLoraConfig, tmp_path: Path) -> None:
    run = Run(finished)
    run.export(tmp_path / "merged", kind="merged")
    report = run.export(tmp_path / "cut", rank=2)
    assert 0 < report.relative_error < 1
    ids = torch.randint(3, 50, (2, 9))
    base = AutoModelForCausalLM.from_pretrained(str(finished.model)).eval()
    exact = PeftModel.from_pretrained(base, str(Path(str(finished.output)) / "5-adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_near(merged(ids).logits, exact(ids).logits)


def test_a_gpt2_style_model_runs(rows_file: Path, tmp_path: Path) -> None:
    make_gpt2().save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    report = Run(run_config(tmp_path / "gpt2", rows_file, tmp_path / "run")).run()
    assert report["adapted"]["kl"] > 0


def test_a_larger_sampler_with_the_same_tokenizer(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    make_llama(seed=3, hidden_size=64).save_pretrained(tmp_path / "big")
    make_tokenizer().save_pretrained(tmp_path / "big")
    make_llama(seed=3).save_pretrained(tmp_path / "alien")
    alien = make_tokenizer()
    alien.add_tokens(["x9"])
    alien.save_pretrained(tmp_path / "alien")

    def sampled(name: str, sampler: str | None) -> Any:
        config = run_config(
            model_folder, rows_file, tmp_path / name, sampling={"sampler_model": sampler}
        )
        return Run(config).sample()

    assert sampled("a", None) != sampled("b", str(tmp_path / "big"))
    with pytest.raises(DataError, match="another tokenizer"):
        sampled("c", str(tmp_path / "alien"))


def test_a_full_or_forbidden_disk_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        write_artifact(blocked / "x", "samples", {"a": torch.ones(2)}, {})
    write_artifact(tmp_path / "good", "samples", {"a": torch.ones(2)}, {"model": "m"})
    with pytest.raises(ArtifactError, match="'samples'"):
        read_artifact(tmp_path / "good", "spectrum")
    with pytest.raises(MismatchError, match="another model"):
        read_artifact(tmp_path / "good", "samples", {"model": "n"})


def test_output_must_be_a_folder(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        Run(run_config(model_folder, rows_file, tmp_path / "file"))
