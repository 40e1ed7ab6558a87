"""What SECURITY.md promises: no network, no code from files, nothing outside the output folder.

Every test attacks a file that folora reads, and looks for the mark that the attack would leave.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.tiny import tiny_config
from folora.calibration.base_file import HEADER, read_base_file, write_base_file
from folora.cli.main import main
from folora.config import FoLoraConfig
from folora.errors import ArtifactError
from folora.pipeline.checks import STAGES
from folora.pipeline.run import Run
from folora.pipeline.stages import KeepMoments, Solved, TaskMoments
from folora.pipeline.training import Training
from folora.runtime.artifacts import read_artifact, write_artifact
from folora.runtime.checkpoints import seal_checkpoint
from folora.runtime.storage import sealed
from folora.spectral.moments import Moments

ROOT = Path(__file__).parents[2]


def flags(config: FoLoraConfig, **changes: object) -> list[str]:
    """The config as flags, with `changes`."""
    values = config.differences() | changes
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def copied(config: FoLoraConfig, output: Path) -> FoLoraConfig:
    shutil.copytree(str(config.output), output)
    return config.changed({"output": str(output)})


# No network.

WATCHED = """
import json, socket, sys

ASKS = {"connect", "getaddrinfo", "gethostbyname", "gethostbyaddr", "sendto", "sendmsg"}
asked = []

def watch(event, arguments):
    kind, _, name = event.partition(".")
    local = name in ("connect", "sendto", "sendmsg") and arguments[0].family == socket.AF_UNIX
    if kind == "socket" and name in ASKS and not local:
        asked.append(event + repr(arguments[1:]))

sys.addaudithook(watch)
from folora.cli.main import main
codes = [main(words) for words in json.loads(sys.argv[1])]
folora_asked = list(asked)
socket.getaddrinfo("127.0.0.1", 9)  # opens no connection, and shows that the hook works
print(json.dumps({"codes": codes, "asked": folora_asked, "awake": asked != folora_asked}))
"""
"""Runs command lines and tells what Python asked of the network; libraries in other languages could
ask behind its back."""


def watched(commands: list[list[str]], **environment: str) -> tuple[dict[str, Any], str]:
    """The result of `WATCHED`, and the output."""
    hidden = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(commands)],
        env={**env, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), " ".join(done.stderr.split())


def test_a_run_on_local_folders_makes_no_network_request(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Not even to check for a newer model: HF_HUB_OFFLINE is not set here."""
    config = tiny_config(
        model=str(model_folder), dataset=str(rows_file), output=str(tmp_path / "r")
    )
    found, _ = watched([["run", *flags(config)]])
    assert found == {"codes": [0], "asked": [], "awake": True}
    assert (tmp_path / "r" / "5-adapter" / "adapter_model.safetensors").exists()


def test_hf_hub_offline_is_respected(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """A Hub name with HF_HUB_OFFLINE=1: no network request, and a message that names the variable."""
    config = tiny_config(
        model=str(model_folder), dataset=str(rows_file), output=str(tmp_path / "r")
    )
    names = {"model": "nobody/a", "dataset": "nobody/b", "sampling.sampler_model": "nobody/c"}
    commands = [["run", *flags(config, **{option: name})] for option, name in names.items()]
    found, said = watched(commands, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    assert found == {"codes": [2, 2, 2], "asked": [], "awake": True}
    assert said.count("folora:") == 3
    assert all(f"'{name}'" in said for name in names.values())
    assert "HF_HUB_OFFLINE is set" in said


# No code from a model folder, unless trusted.

OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = {model_type!r}

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_own_code(model: Path, model_type: str, marker: Path) -> None:
    """Add Python code to a model folder, which leaves a mark when it is executed."""
    code = OWN_CODE.format(marker=str(marker), model_type=model_type)
    (model / "own.py").write_text(code)
    maps: dict[str, dict[str, Any]] = {
        "config.json": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        "tokenizer_config.json": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
    }
    for name, auto_map in maps.items():
        values = json.loads((model / name).read_text()) | {"auto_map": auto_map}
        if name == "config.json":
            values["model_type"] = model_type
        (model / name).write_text(json.dumps(values))


@pytest.mark.parametrize("allowed", [False, True], ids=["unasked", "asked"])
@pytest.mark.parametrize("model_type", ["llama", "a-type-of-its-own"])
def test_remote_code_runs_only_if_trusted(
    model_type: str,
    allowed: bool,
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Otherwise transformers' class is used if the model type is known, and no class if it is not."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path / "c")])
    marker = tmp_path / "marker"
    shutil.copytree(model_folder, tmp_path / "model")
    with_own_code(tmp_path / "model", model_type, marker)
    config = tiny_config(
        model=str(tmp_path / "model"), dataset=str(rows_file), output=str(tmp_path / "run"),
        trust_remote_code=allowed,
    )  # fmt: skip
    (tmp_path / "options.yaml").write_text(config.to_yaml())
    code = main(["sample", "--config", str(tmp_path / "options.yaml")])
    assert marker.exists() == allowed
    assert code == (0 if allowed or model_type == "llama" else 2)
    if code:
        assert "custom code" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


# No code from a checkpoint.


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.marker,)


def test_the_malicious_pickle_executes_when_loaded(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def interrupted(finished: FoLoraConfig, output: Path) -> tuple[FoLoraConfig, Path]:
    """A run killed in training, and the checkpoint from which it resumes."""
    config = copied(finished, output)
    training = output / "4-training"
    for path in (training / "result", training / "checkpoint-6", output / "5-adapter"):
        shutil.rmtree(path)
    (output / "report.json").unlink()
    return config, training / "checkpoint-4"


def seal_again(checkpoint: Path) -> None:
    """Update the seal, as an attacker who knows its format would."""
    (checkpoint / "folora.json").unlink()
    seal_checkpoint(checkpoint)


PICKLES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]
PICKLES += ["adapter_model.bin", "pytorch_model.bin"]
"""What the Trainer or PEFT could unpickle; the last two if there is no adapter in safetensors."""


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # of the attacker's file
@pytest.mark.parametrize(
    ("name", "form"), [*((n, "torch") for n in PICKLES), (PICKLES[0], "pickle")]
)
def test_a_pickle_in_a_checkpoint_is_not_executed(
    name: str, form: str, finished: FoLoraConfig, tmp_path: Path
) -> None:
    """It is refused; with an updated seal it is read, but not executed."""
    config, checkpoint = interrupted(finished, tmp_path / "run")
    marker = tmp_path / "marker"
    if name.endswith("_model.bin"):
        (checkpoint / "adapter_model.safetensors").unlink()
    with open(checkpoint / name, "wb") as file:
        (pickle.dump if form == "pickle" else torch.save)(Evil(marker), file)
    assert main(["run", *flags(config)]) == 2
    seal_again(checkpoint)
    assert main(["run", *flags(config)]) == (0 if name == "training_args.bin" else 2)
    assert not marker.exists()


def test_the_same_checkpoint_is_read_when_intact(finished: FoLoraConfig, tmp_path: Path) -> None:
    """Otherwise the test above could pass because the file is not read."""
    config, checkpoint = interrupted(finished, tmp_path / "run")
    seal_again(checkpoint)
    assert main(["run", *flags(config)]) == 0
    state = json.loads((tmp_path / "run/4-training/checkpoint-6/trainer_state.json").read_text())
    assert state["global_step"] == 6
    file = Path("5-adapter/adapter_model.safetensors")
    assert (tmp_path / "run" / file).read_bytes() == (
        Path(str(finished.output)) / file
    ).read_bytes()


def test_a_pickle_in_a_model_folder_is_not_executed(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """pytorch_model.bin is read with ``weights_only``."""
    shutil.copytree(model_folder, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({**weights, "x": Evil(tmp_path / "marker")}, tmp_path / "model/pytorch_model.bin")
    config = tiny_config(
        model=str(tmp_path / "model"), dataset=str(rows_file), output=str(tmp_path / "run")
    )
    assert main(["run", *flags(config)]) == 2
    assert not (tmp_path / "marker").exists()


# No file outside the output folder.


def outside(folder: Path, output: Path) -> set[str]:
    return {str(p) for p in folder.rglob("*") if output not in (p, *p.parents)}


def renamed(value: Any, prefix: str) -> Any:
    """Replace ``model.layers`` in names of layers by `prefix`."""
    if isinstance(value, dict):
        return {renamed(k, prefix): renamed(v, prefix) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [renamed(v, prefix) for v in value]
    return value.replace("model.layers.", prefix) if isinstance(value, str) else value


@pytest.mark.parametrize("prefix", ["../../x", "HERE/x"], ids=["relative", "absolute"])
@pytest.mark.parametrize("part", [KeepMoments.path, TaskMoments.path, Solved.path, Training.path])
def test_names_in_a_run_folder_cannot_escape_it(
    part: str, prefix: str, finished: FoLoraConfig, tmp_path: Path, monkeypatch: Any
) -> None:
    """A part of the folder is rewritten and sealed with paths as names of layers."""
    output = tmp_path / "here" / "run"
    config = copied(finished, output)
    monkeypatch.chdir(tmp_path / "here")
    kind = next(stage.result.kind for stage in STAGES if stage.path == part)
    found = read_artifact(output / part, kind)
    own = ("kind", "sha256", "versions")
    facts = {k: v for k, v in found.manifest.items() if k not in own}
    prefix = prefix.replace("HERE", str(tmp_path))
    write_artifact(output / part, kind, renamed(found.tensors, prefix), renamed(facts, prefix))
    if part != Training.path:  # otherwise its outputs would be refused first
        shutil.rmtree(output / Training.path)
    if part in (KeepMoments.path, TaskMoments.path):
        shutil.rmtree(output / Solved.path)
    before = outside(tmp_path, output)
    assert main(["run", *flags(config)]) == (0 if part == Training.path else 2)
    assert outside(tmp_path, output) == before


@pytest.mark.parametrize("prefix", ["../../x", "HERE/x"], ids=["relative", "absolute"])
def test_names_in_a_base_file_cannot_escape_the_folder(
    prefix: str, finished: FoLoraConfig, tmp_path: Path, monkeypatch: Any
) -> None:
    """A base file may come from others; names that are paths match no layer of this model."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    base, output = tmp_path / "base.safetensors", tmp_path / "here" / "run"
    Run(copied(finished, tmp_path / "maker")).base(base)
    found = read_base_file(base)
    prefix = prefix.replace("HERE", str(tmp_path))
    groups = tuple(type(g)(**renamed(asdict(g), prefix)) for g in found.groups)
    facts = {name: found.manifest[name] for name in ("model", "tokenizer")}
    moments = Moments({g.name: torch.eye(g.d_in) for g in groups}, 1, groups)
    write_base_file(base, found.samples, moments, facts)
    before = outside(tmp_path, output)
    config = finished.changed({"output": str(output), "base": str(base)})
    assert main(["run", *flags(config)]) == 2
    assert outside(tmp_path, output) == before


@pytest.mark.parametrize("header", ["[]", '{"kind": "base"}', "\0", "[" * 9999], ids=len)
def test_a_base_file_with_a_wrong_header_is_refused(
    header: str, finished: FoLoraConfig, tmp_path: Path
) -> None:
    base = tmp_path / "base.safetensors"
    save_file({"x": torch.ones(1)}, base, metadata={HEADER: header})
    config = finished.changed({"output": str(tmp_path / "run"), "base": str(base)})
    assert main(["run", *flags(config)]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["base.safetensors"]


@pytest.mark.parametrize("tokens", [{}, "7", None, 1.5])
def test_a_base_file_with_a_wrong_number_of_tokens_is_refused(
    tokens: Any, finished: FoLoraConfig, tmp_path: Path
) -> None:
    base = tmp_path / "base.safetensors"
    Run(copied(finished, tmp_path / "maker")).base(base)
    with safe_open(base, "pt") as file:
        manifest = json.loads(file.metadata()[HEADER])
    tensors = load_file(base)
    del manifest["checksum"]
    header = json.dumps(sealed({**manifest, "tokens": tokens}))
    save_file(tensors, base, metadata={HEADER: header})
    with pytest.raises(ArtifactError, match="number of tokens"):
        read_base_file(base)


# Dependencies.

PIN = re.compile(r"^([\w.-]+)==([\w.!+-]+)", re.M)


def pins(name: str) -> dict[str, str]:
    """Versions by normalized name."""
    return dict(PIN.findall((ROOT / name).read_text()))


@pytest.mark.parametrize("name", ["requirements-dev.txt", "requirements-tools.txt"])
def test_every_pin_has_hashes(name: str) -> None:
    blocks = re.split(r"\n(?=\S)", (ROOT / name).read_text().strip())
    pinned = [block for block in blocks if not block.startswith("#")]
    assert len(pinned) == len(pins(name)) > 10
    assert [b.split()[0] for b in pinned if not re.search(r"--hash=sha256:[0-9a-f]{64}", b)] == []


def test_both_torch_builds_are_one_version() -> None:
    assert pins("requirements-cpu.txt")["torch"] == pins("requirements-dev.txt")["torch"] + "+cpu"


@pytest.mark.skipif("CI" not in os.environ, reason="a developer may have installed other things")
def test_every_installed_package_is_locked() -> None:
    """The CPU build of torch counts as its version."""
    locked = pins("requirements-dev.txt")
    found = {
        re.sub(r"[-_.]+", "-", d.name).lower(): d.version.removesuffix("+cpu")
        for d in importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
    }
    for name in ("folora", "pip"):  # the project itself and Python's own package
        found.pop(name, None)
    assert len(found) > 100
    assert {n: v for n, v in found.items() if locked.get(n) != v} == {}
