"""Unusual environments end in one sentence and an exit code, never in a traceback."""

from __future__ import annotations

import gc
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import folora
from benchmarks.forks import Fork
from benchmarks.tiny import make_llama, make_tokenizer, rows, tiny_config
from folora.cli.main import main, parse
from folora.config import FoLoraConfig
from folora.errors import ConfigError, MismatchError
from folora.pipeline.run import Run

KEPT: list[Any] = []


def full_stdout() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def pipe_without_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    KEPT.append(sys.stdout)  # garbage collection would close it
    sys.stdout = os.fdopen(1, "w", closefd=False)


def closed_stdout() -> None:
    os.close(1)


def ascii_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="ascii", errors="strict")  # type: ignore[union-attr]


def deleted_directory() -> None:
    os.makedirs("gone")
    os.chdir("gone")
    os.rmdir("../gone")


@dataclass(frozen=True)
class Case:
    """An environment: how it changes the process, and how ``folora plan`` ends in it."""

    prepare: Callable[[], Any] = lambda: None
    variables: Mapping[str, str] = field(default_factory=dict)
    code: int = 2
    said: str = ""


STALE = "Start several processes with torchrun"
CASES = {
    "nothing strange": Case(code=0),
    "a full disk behind stdout": Case(full_stdout, said="No space left on device"),
    "a reader that has gone": Case(pipe_without_reader, code=1),
    "a closed stdout": Case(closed_stdout, code=0),
    "streams of ASCII": Case(ascii_streams, code=0),
    "a deleted working directory": Case(deleted_directory, said="working directory does not exist"),
    "a stale WORLD_SIZE": Case(variables={"WORLD_SIZE": "2"}, said=f"WORLD_SIZE=2, but not RANK.*{STALE}"),
    "a WORLD_SIZE in words": Case(variables={"WORLD_SIZE": "abc"}, said="WORLD_SIZE is 'abc', but must be a number"),
    "a stale LOCAL_RANK": Case(variables={"LOCAL_RANK": "1"}, said=f"LOCAL_RANK=1, but not WORLD_SIZE.*{STALE}"),
    "a RANK beyond": Case(variables={"WORLD_SIZE": "1", "RANK": "3"}, said="RANK is 3, but WORLD_SIZE is 1"),
    "no folder for temporary files": Case(variables={"TMPDIR": "/nonexistent"}, code=0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_plan_in_unusual_environments(name: str, model_folder: Path, tmp_path: Path) -> None:
    case = CASES[name]

    def prepare() -> None:
        gc.freeze()
        os.chdir(tmp_path)
        os.environ.pop("HOME", None)
        os.environ.update(case.variables)
        case.prepare()

    words = ["plan", "--model", str(model_folder), "--device", "cpu", "--adapter.r", "4"]
    ended = Fork(words, tmp_path, prepare=prepare).ended()
    said = " ".join(ended.said.split())
    assert ended.code == case.code, said
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert re.search(case.said, said), said


def test_characters_the_terminal_cannot_encode_are_replaced(tmp_path: Path) -> None:
    """The message names a file with letters outside ASCII."""

    def prepare() -> None:
        gc.freeze()
        ascii_streams()

    ended = Fork(["run", "--config", "Lösung–±.yaml"], tmp_path, prepare=prepare).ended()
    assert ended.code == 2
    assert "config file L?sung" in ended.said


def test_an_unexpected_error_shows_its_traceback_and_is_called_a_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("folora.cli.commands.execute", broken)
    assert main(["plan", "--model", "m"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "unexpected KeyError. This is a bug in folora" in " ".join(said.split())


def test_an_export_to_the_working_directory(
    finished: FoLoraConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(finished.to_yaml())
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert main(["export", "--config", str(config), "--to", "."]) == 0
    assert (empty / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("model", "m #1", "m #1"),
        ("output", "2024", "2024"),
        ("output", "[a]", "[a]"),
        ("model", "yes", "yes"),
        ("dataset", "a: b", "a: b"),
        ("base", "null", None),
        ("revision", "1e5", "1e5"),
        ("revision", "0123", "0123"),
        ("adapter.target_modules", ".*q_proj # x", ".*q_proj # x"),
        ("adapter.target_modules", "[q_proj, v_proj]", ("q_proj", "v_proj")),
        ("sampling.tolerance", "null", None),
        ("spectrum.directions", "all", "all"),
        ("spectrum.tau", "1e-3", 1e-3),
    ],
)
def test_text_options_are_used_verbatim(option: str, text: str, value: object) -> None:
    _, config = parse(["run", f"--{option}", text])
    for name in option.split("."):
        config = getattr(config, name)
    assert config == value


# `prepare` in memory accepts the same options as the command line.


def prepare(model: Any, **changes: Any) -> folora.Prepared:
    return folora.prepare(model, make_tokenizer(), rows(), tiny_config().changed(changes))


def test_prepare_uses_samples_and_moments_of_a_base_file(
    finished: FoLoraConfig, tmp_path: Path
) -> None:
    folder = shutil.copytree(str(finished.output), tmp_path / "run")
    file = Run(finished.changed({"output": str(folder)})).base(tmp_path / "base.safetensors")
    found = prepare(make_llama(), base=str(file))
    run = Run(finished)
    assert found.samples.fingerprint == run.samples().fingerprint
    with pytest.raises(MismatchError, match="another model"):
        prepare(make_llama(seed=1), base=str(file))


def test_a_model_that_cannot_generate_needs_a_base_file(
    finished: FoLoraConfig, tmp_path: Path
) -> None:
    """The remedy of the error message works."""

    def no_cache(_: Any, args: Any, given: Mapping[str, Any]) -> None:
        if given.get("past_key_values") is not None:
            raise RuntimeError("no cache")

    mute = make_llama()
    mute.register_forward_pre_hook(no_cache, with_kwargs=True)
    folder = shutil.copytree(str(finished.output), tmp_path / "run")
    run = Run(finished.changed({"output": str(folder)}))
    file = run.base(tmp_path / "base.safetensors")
    with pytest.raises(ConfigError, match="cannot generate text here"):
        prepare(mute)
    assert prepare(mute, base=str(file)).samples.fingerprint == run.samples().fingerprint


def test_prepare_samples_from_another_model(tmp_path: Path) -> None:
    make_llama(seed=3, hidden_size=64).save_pretrained(tmp_path / "big")
    make_tokenizer().save_pretrained(tmp_path / "big")
    own = prepare(make_llama()).samples
    other = prepare(make_llama(), **{"sampling.sampler_model": str(tmp_path / "big")}).samples
    assert own.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "meta"}, "device is 'meta'"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16', but the model in memory has 'float32'"),
        ({"quantize": "4bit"}, "quantize is '4bit', but the model in memory has 'none'"),
    ],
)
def test_prepare_refuses_options_that_contradict_a_model_in_memory(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(make_llama(), **changes)


def test_prepare_reports_unused_options(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config().changed({"output": "x", "revision": "main", "adapter.r": 99})
    with pytest.raises(ConfigError, match="r is 99"):
        folora.prepare(make_llama(), make_tokenizer(), rows(), config)
    assert "does not use output, revision" in caplog.text
