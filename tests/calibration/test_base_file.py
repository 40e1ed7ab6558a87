"""The base file: lossless, verified on load, and a run from it matches a full run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from benchmarks.tiny import make_llama, make_tokenizer
from folora.calibration.base_file import (
    HEADER,
    BaseFile,
    packed,
    read_base_file,
    read_base_manifest,
    tensors_sha256,
    unpacked,
)
from folora.cli.main import main
from folora.config import FoLoraConfig
from folora.errors import ArtifactError, ConfigError, MismatchError
from folora.pipeline.context import Context
from folora.pipeline.run import Run
from folora.runtime.storage import sealed
from folora.spectral.moments import Moments


@given(st.integers(1, 20), st.integers(0, 99))
def test_the_stored_triangle_restores_the_matrix(d: int, seed: int) -> None:
    x = torch.randn(d, d, generator=torch.Generator().manual_seed(seed))
    matrix = x + x.T
    triangle = packed(matrix)
    assert triangle.shape == (d * (d + 1) // 2,)
    assert torch.equal(unpacked(triangle, d), matrix)


@pytest.fixture(scope="module")
def base(finished: FoLoraConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its base file, made by the command line without a data set."""
    place = tmp_path_factory.mktemp("shared")
    file, config = place / "llama.safetensors", place / "base.yaml"
    shutil.copytree(str(finished.output), place / "run")
    config.write_text(finished.replace(dataset=None, output=str(place / "run")).to_yaml())
    assert main(["base", "--config", str(config), "--to", str(file)]) == 0
    return file


def test_a_run_from_a_base_file_matches_a_full_run(
    finished: FoLoraConfig, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("sampled again")

    reads: list[Path] = []

    def counted(path: Path, expected: Any) -> BaseFile:
        reads.append(path)
        return read_base_file(path, expected)

    monkeypatch.setattr(Context, "engine", never)
    monkeypatch.setattr("folora.pipeline.stages.read_base_file", counted)
    config = finished.replace(base=str(base), output=str(tmp_path / "second"))
    report = Run(config).run()
    assert reads == [base]  # once for samples and C_pre
    first, second = Path(str(finished.output)), tmp_path / "second"
    for part in ("2-statistics/pre", "2-statistics/task", "3-spectrum", "4-training/result"):
        a, b = (f / part / "tensors.safetensors" for f in (first, second))
        assert a.read_bytes() == b.read_bytes()
    assert (
        report["rejected_samples"]
        == json.loads((first / "report.json").read_text())["rejected_samples"]
    )
    before = (second / "1-samples" / "set" / "manifest.json").stat().st_mtime_ns
    Run(config).run()
    assert (second / "1-samples" / "set" / "manifest.json").stat().st_mtime_ns == before
    assert reads == [base]


def test_a_subset_of_layers_is_accepted_and_others_refused(
    finished: FoLoraConfig, base: Path, tmp_path: Path
) -> None:
    config = finished.replace(base=str(base), output=str(tmp_path / "few"))
    few = config.changed({"adapter.target_modules": ["v_proj", "down_proj"]})
    Run(few).run()
    found, every = (
        Moments.load(folder / "2-statistics" / "pre").matrices
        for folder in (tmp_path / "few", Path(str(finished.output)))
    )
    assert len(found) == 4
    assert torch.equal(
        found["model.layers.0.self_attn.v_proj"], every["model.layers.0.self_attn.q_proj"]
    )
    small = tmp_path / "small.safetensors"
    Run(few).base(small)
    more = config.changed({"base": str(small), "output": str(tmp_path / "more")})
    with pytest.raises(
        ConfigError, match=r"small.safetensors has no C_pre of the input of .*q_proj;"
    ):
        Run(more).run()


def test_moments_take_half_the_bytes(finished: FoLoraConfig, base: Path) -> None:
    pre = Path(str(finished.output)) / "2-statistics" / "pre" / "tensors.safetensors"
    tokens = read_base_manifest(base)["tokens"]
    assert base.stat().st_size < 0.55 * pre.stat().st_size + 16 * tokens + 16384


def test_another_model_and_damage_are_refused_before_the_run_starts(
    finished: FoLoraConfig, base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    make_llama(seed=1).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    config = finished.replace(base=str(base), output=str(tmp_path / "run"))
    with pytest.raises(MismatchError, match="belongs to another model"):
        Run(config.replace(model=str(other))).run()

    tensors = load_file(base)
    name = next(n for n in tensors if n.endswith("c_pre"))
    bits = bytearray(base.read_bytes())
    bits[-5] ^= 1
    flipped = tmp_path / "flipped.safetensors"
    flipped.write_bytes(bits)
    with pytest.raises(ArtifactError, match=r"flipped.safetensors is damaged"):
        read_base_file(flipped)
    (tmp_path / "cut.safetensors").write_bytes(base.read_bytes()[:-100])
    save_file({name: tensors[name]}, tmp_path / "plain.safetensors")
    (tmp_path / "text.safetensors").write_text("{}")
    for file, message in {
        "cut": "is not a base file", "plain": "is not a base file", "text": "is not a base file",
        "absent": "is missing; create it",
    }.items():  # fmt: skip
        path = tmp_path / f"{file}.safetensors"
        with pytest.raises(ArtifactError, match=message):
            Run(config.replace(base=str(path))).run()
    assert not (tmp_path / "run").exists()


def resealed(base: Path, file: Path, tensors: dict[str, Any], **facts: Any) -> None:
    """A copy with changed tensors and metadata and valid checksums."""
    found = {name: t for name, t in {**load_file(base), **tensors}.items() if t is not None}
    own = {**read_base_manifest(base), "sha256": tensors_sha256(found), **facts}
    manifest = {name: value for name, value in own.items() if value != "gone"}
    save_file(found, file, metadata={HEADER: json.dumps(sealed(manifest))})


GROUP = {"layers": ["x"], "d_in": 3}


@pytest.mark.parametrize(
    ("tensors", "facts", "message"),
    [
        ({"tokens": torch.tensor(1)}, {}, "has unexpected contents"),
        ({"lengths": None}, {}, "has unexpected contents"),
        ({}, {"sha256": "gone"}, "has no entry 'sha256'"),
        ({}, {"groups": "gone"}, "has no entry 'groups'"),
        ({}, {"held_out": "gone"}, "has no entry 'held_out'"),
        ({}, {"groups": [{"layers": [], "d_in": 3}]}, "is not a group of layers"),
        ({}, {"groups": [{**GROUP, "d_in": 10**30}]}, "KeyError"),
        ({"x/c_pre": torch.ones(5)}, {"groups": [GROUP]}, r"\(5,\) values of torch.float32"),
        ({"x/c_pre": torch.ones(6, 1)}, {"groups": [GROUP]}, r"\(6, 1\) values"),
        ({"x/c_pre": torch.ones(6).half()}, {"groups": [GROUP]}, r"values of torch.float16"),
        ({"x/c_pre": torch.tensor(1.0)}, {"groups": [GROUP]}, r"\(\) values"),
    ],
)
def test_wrong_contents_with_valid_checksums_are_refused(
    base: Path, tmp_path: Path, tensors: dict[str, Any], facts: dict[str, Any], message: str
) -> None:
    file = tmp_path / "other.safetensors"
    resealed(base, file, {})
    assert read_base_file(file).samples == read_base_file(base).samples
    resealed(base, file, tensors, **facts)
    with pytest.raises(ArtifactError, match=rf"other\.safetensors .*{message}"):
        read_base_file(file)


def test_a_file_of_another_dtype_is_refused_or_reported(
    finished: FoLoraConfig, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights that bfloat16 rounds differ from the file's; weights that it represents exactly do not."""
    given = {"base": str(base), "output": str(tmp_path / "run"), "dtype": "bfloat16"}
    with pytest.raises(MismatchError, match=r"another dtype: it was made for float32, .*bfloat16"):
        Run(finished.changed(given)).check_command("run")

    make_llama().bfloat16().save_pretrained(tmp_path / "exact")
    make_tokenizer().save_pretrained(tmp_path / "exact")
    exact = {"model": str(tmp_path / "exact"), "output": str(tmp_path / "first")}
    file = Run(finished.changed({**exact, "dtype": "bfloat16"})).base()
    Run(finished.changed({**exact, "base": str(file)})).check_command("run")
    assert "was made in bfloat16, but the model is loaded in float32" in caplog.text
