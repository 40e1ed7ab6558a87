"""A result is read only if what it was made from is what the folder has now."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tiny import tiny_config, write_rows
from folora.calibration.calibration_set import CalibrationSet
from folora.cli.main import main
from folora.config import FoLoraConfig
from folora.errors import ConfigError, MismatchError
from folora.pipeline.checks import STAGES
from folora.pipeline.run import Run
from folora.pipeline.stages import KeepMoments, Samples, Solved, TaskMoments
from folora.pipeline.store import Folder, Stage
from folora.pipeline.training import Training
from folora.runtime.artifacts import read_artifact, write_artifact

WRITTEN = ("kind", "sha256", "versions", "format_version", "checksum")
COMMANDS = ("measure", "solve", "train", "export")
REFUSED = {
    (Samples, "solve"): (KeepMoments, Samples),
    (Samples, "train"): (KeepMoments, Samples),
    (Samples, "export"): (KeepMoments, Samples),
    (KeepMoments, "train"): (Solved, KeepMoments),
    (KeepMoments, "export"): (Solved, KeepMoments),
    (TaskMoments, "train"): (Solved, TaskMoments),
    (TaskMoments, "export"): (Solved, TaskMoments),
    (Solved, "export"): (Training, Solved),
}
"""By the result that was made again and the command: the outdated result, and the input that has changed.

All other pairs are read: the command makes what is outdated again, or does not depend on the change."""


def make_again(folder: Path, stage: type[Stage]) -> None:
    """Replace a result by one with other values, made from the same inputs."""
    path, kind = folder / stage.path, stage.result.kind
    artifact = read_artifact(path, kind)
    facts = {name: v for name, v in artifact.manifest.items() if name not in WRITTEN}
    if stage is Samples:
        samples = CalibrationSet.load(path)
        rows = [[*row[:-1], 3 + (row[-1] + 1) % 40] for row in samples.calibration]
        replace(samples, calibration=rows).save(path, facts)
    else:
        tensors = {name: 1.01 * t for name, t in artifact.tensors.items()}
        write_artifact(path, kind, tensors, facts)


@pytest.fixture
def copied(finished: FoLoraConfig, tmp_path: Path) -> FoLoraConfig:
    """A complete run in a folder of its own."""
    shutil.copytree(str(finished.output), tmp_path / "run")
    config = finished.replace(output=str(tmp_path / "run"))
    Run(config).write_config()
    return config


def do(config: FoLoraConfig, command: str) -> None:
    """A command of folora."""
    getattr(Run(config), command)()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_reads_only_what_the_present_inputs_made(
    copied: FoLoraConfig, stage: type[Stage], command: str
) -> None:
    folder = Path(str(copied.output))
    make_again(folder, stage)
    refused = REFUSED.get((stage, command))
    if refused is None:
        do(copied, command)
        return
    outdated, changed = refused
    said = (
        f"{re.escape(str(folder / outdated.path))} was made from another {changed.path} than this folder has "
        f"now; run folora {outdated.command} and the commands after it"
    )
    with pytest.raises(MismatchError, match=said):
        do(copied, command)
    if command != "export":  # before the model is loaded
        with pytest.raises(MismatchError, match=said):
            Run(copied).check_command(command)
    for remedy in COMMANDS[COMMANDS.index(outdated.command) :]:
        do(copied, remedy)


@pytest.mark.parametrize(
    ("source", "made"),
    [
        (Samples, KeepMoments),
        (KeepMoments, Solved),
        (TaskMoments, Solved),
        (Solved, Training),
        (Samples, Training),
    ],
)
def test_an_input_that_was_moved_away_outdates_and_a_deleted_one_does_not(
    copied: FoLoraConfig, source: type[Stage], made: type[Stage]
) -> None:
    """As after an interruption before its replacement was finished; or to save disk space."""
    folder = Path(str(copied.output))
    store = Folder(folder)
    if (source, made) == (Samples, Training):
        shutil.rmtree(folder / Solved.path)
    store.check_inputs(made)
    store._set_aside(folder / source.path)
    with pytest.raises(MismatchError, match=f"{made.path} was made from another {source.path}"):
        store.check_inputs(made)
    (folder / "old" / "manifest.json").write_text("a user's")
    shutil.rmtree(next((folder / "old").glob("*/")))
    store.check_inputs(made)


def test_measuring_again_outdates_the_spectrum(
    copied: FoLoraConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way on the command line: other rows, measured, not solved."""
    other = write_rows(tmp_path / "other.jsonl")
    other.write_text('{"prompt": "say", "completion": "hello"}\n' * 20)
    words = ["--output", str(copied.output), "--dataset", str(other)]
    assert main(["measure", *words]) == 0
    assert main(["train", "--output", str(copied.output)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "3-spectrum was made from another 2-statistics/task" in said
    assert "run folora solve and the commands after it" in said
    assert main(["solve", "--output", str(copied.output)]) == 0
    assert main(["train", "--output", str(copied.output)]) == 0


def test_samples_that_were_stopped_by_other_rows_are_outdated(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    early = {"num_sequences": 200, "tolerance": 1e6}
    config = tiny_config(
        model=str(model_folder),
        dataset=str(rows_file),
        output=str(tmp_path / "run"),
        sampling=early,
    )
    do(config, "sample")
    do(config, "measure")
    changed = config.changed({"data.eval_rows": 0})
    with pytest.raises(
        MismatchError, match="1-samples/set was made from another 2-statistics/task"
    ):
        do(changed, "measure")
    for command in ("sample", "measure", "solve"):
        do(changed, command)


def test_a_base_file_that_was_made_again_outdates_what_was_read_from_it(
    copied: FoLoraConfig, tmp_path: Path
) -> None:
    file = tmp_path / "base.safetensors"
    Run(copied).base(file)
    config = copied.replace(base=str(file), output=str(tmp_path / "other"))
    for command in ("sample", *COMMANDS):
        do(config, command)
    other = copied.replace(seed=1, output=str(tmp_path / "third"))
    Run(other).base(file)
    with pytest.raises(
        MismatchError, match=r"1-samples/set is not the text of .*run folora sample"
    ):
        do(config, "measure")
    for command in ("solve", "train"):
        with pytest.raises(MismatchError, match="2-statistics/pre was not made from the present"):
            Run(config).check_command(command)
    with pytest.raises(MismatchError, match="2-statistics/pre was not made without a base file"):
        Run(config.replace(base=None)).check_command("solve")


def test_a_command_that_was_interrupted_left_its_options_alone(copied: FoLoraConfig) -> None:
    """`config.yaml` has the options of the interrupted command, the folder the results of the former one."""
    more = copied.changed({"sampling.num_sequences": 64})
    Run(more).write_config()
    with pytest.raises(
        MismatchError, match="1-samples/set was made with other options of sampling"
    ):
        Run(more).check_command("measure")
    ridge = copied.changed({"spectrum.tau": 0.5})
    Run(ridge).write_config()
    with pytest.raises(ConfigError, match=r"spectrum\.tau is 0\.5, but folora train reads results"):
        Run(ridge).check_command("train")


def test_a_new_training_moves_the_former_exports_away(
    copied: FoLoraConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(str(copied.output))
    Run(copied).export(kind="merged")
    (folder / "5-adapter" / "README.md").write_text("mine")
    former = (folder / "5-adapter" / "adapter_model.safetensors").read_bytes()
    assert main(["train", "--output", str(folder)]) == 0  # done already
    assert (folder / "5-adapter").exists()
    assert main(["train", "--output", str(folder), "--training.learning_rate", "1e-3"]) == 0
    assert "adapter: folora export writes it" in capsys.readouterr().out
    assert not (folder / "5-adapter").exists()
    assert not (folder / "merged").exists()
    old = folder / "old"
    assert (old / "5-adapter-1" / "adapter_model.safetensors").read_bytes() == former
    assert (old / "5-adapter-1" / "README.md").read_text() == "mine"
    assert (old / "report.json-1").exists()
    assert main(["export", "--output", str(folder)]) == 0
    assert (folder / "5-adapter" / "adapter_model.safetensors").read_bytes() != former


def test_a_folder_of_the_users_is_no_export(copied: FoLoraConfig) -> None:
    notes = Path(str(copied.output)) / "merged" / "notes"
    notes.parent.mkdir()
    notes.write_text("mine")
    do(copied.changed({"training.learning_rate": 1e-3}), "train")
    assert notes.read_text() == "mine"
