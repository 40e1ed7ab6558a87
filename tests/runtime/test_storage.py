"""Writes are atomic; damaged, full, read-only and locked folders are named."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.temporary_files import temporary

import folora.runtime.storage
from folora.errors import ArtifactError
from folora.runtime.artifacts import read_artifact, read_manifest, read_tensors, write_artifact
from folora.runtime.storage import (
    FORMAT_VERSION,
    exclusive,
    read_json,
    read_sealed,
    sealed,
    unsealed,
    write_atomically,
    write_sealed,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside),
    max_leaves=12,
)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk on which no file can grow beyond `size` bytes; the error differs from ENOSPC in name."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@given(
    st.dictionaries(
        st.text().filter(lambda n: n not in ("checksum", "format_version")), json_values
    )
)
def test_sealed_values_round_trip(values: dict[str, Any]) -> None:
    found = json.loads(json.dumps(sealed(values)))
    assert unsealed(found, Path("x.json")) == values


OWN = {"kind", "sha256", "versions", "checksum", "format_version"}
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip
any_text = st.text(st.characters())  # includes lone surrogates, which JSON can hold


@settings(max_examples=60)
@given(
    st.dictionaries(any_text.filter(lambda name: name not in OWN), json_values, max_size=5),
    st.dictionaries(
        st.text().filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.integers(0)),
        max_size=4,
    ),
)
def test_any_metadata_and_tensors_round_trip(
    facts: dict[str, Any], wanted: dict[str, tuple[torch.dtype, list[int], int]]
) -> None:
    """Bitwise, including NaN and -0 and non-contiguous tensors."""
    tensors = {}
    for name, (dtype, shape, seed) in wanted.items():
        generator = torch.Generator().manual_seed(seed % 2**63)
        size = [*shape, torch.empty(0, dtype=dtype).element_size()]
        bits = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        bits = bits % 2 if dtype is torch.bool else bits
        tensor = bits.view(dtype)[..., 0]
        tensors[name] = tensor.mT if tensor.ndim > 1 else tensor
    with tempfile.TemporaryDirectory() as folder:
        write_artifact(Path(folder) / "a", "any", tensors, facts)
        found = read_artifact(Path(folder) / "a", "any", facts)
    assert {name: found.manifest[name] for name in facts} == facts
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        back = found.tensors[name]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert bits_of(back) == bits_of(tensor)


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_missing_manifest_entries_are_named(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", "samples", {"x": torch.ones(3)}, {"made": 1})
    manifest = read_manifest(tmp_path / "a", "samples")
    assert (manifest["made"], manifest.get("held_out")) == (1, None)
    with pytest.raises(ArtifactError, match=r"a/manifest.json has no entry 'held_out'"):
        manifest["held_out"]


@pytest.mark.parametrize("text", ["[" * 70 + "]" * 70, '{"a":' * 500 + "1" + "}" * 500])
def test_deeply_nested_json_is_refused_before_it_is_traversed(tmp_path: Path, text: str) -> None:
    """Python parses deeper nesting than it can compare, write or copy."""
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"x.json cannot be read: .*nested more than"):
        read_json(tmp_path / "x.json")


def test_tensors_of_unknown_dtypes_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    with pytest.raises(ArtifactError, match=r"x.safetensors cannot be read"):
        read_tensors(file)


@given(st.data())
def test_every_flipped_bit_of_a_sealed_file_is_detected(data: st.DataObject) -> None:
    values = {"kind": "samples", "held_out": 16, "rejected": {"short": 3}, "scaling": 1.25}
    content = bytearray(json.dumps(sealed(values), indent=1).encode())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    try:
        found = unsealed(json.loads(content.decode()), Path("x.json"))
    except (ArtifactError, ValueError):
        return
    assert found == values  # only whitespace changed


@pytest.mark.parametrize("version", [None, 1, FORMAT_VERSION + 1, "2"])
def test_other_format_versions_are_refused_by_name(tmp_path: Path, version: Any) -> None:
    file = tmp_path / "request.json"
    values = sealed({"a": 1}) | {"format_version": version}
    file.write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=rf"request.json has format version .*{FORMAT_VERSION}"):
        read_sealed(file)


def test_a_manifest_with_a_changed_number_is_damaged(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", "training", {"x": torch.ones(3)}, {"scaling": {"q": 1.0}})
    file = tmp_path / "a" / "manifest.json"
    file.write_text(file.read_text().replace('"q": 1.0', '"q": 9.0'))
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged.*Delete .*/a and rerun"):
        read_manifest(tmp_path / "a", "training")


@pytest.mark.parametrize("size", [0, 10, 200])
def test_a_full_disk_leaves_existing_files_unchanged(tmp_path: Path, size: int) -> None:
    """The tensors take less than 100 bytes, the manifest more than 200."""
    write_artifact(tmp_path / "a", "samples", {"x": torch.zeros(2)}, {"made": "before"})
    write_sealed(tmp_path / "b.json", {"made": "before", "text": "x" * 200})
    with files_of_at_most(size):
        with pytest.raises(ArtifactError, match=f"cannot write {tmp_path / 'a'}.*too large"):
            write_artifact(tmp_path / "a", "samples", {"x": torch.ones(2)}, {"made": "after"})
        with pytest.raises(ArtifactError, match=r"cannot write .*b\.json.*too large"):
            write_sealed(tmp_path / "b.json", {"made": "after", "text": "x" * 200})
    assert not temporary(tmp_path)
    assert read_artifact(tmp_path / "a", "samples").manifest["made"] == "before"
    assert read_sealed(tmp_path / "b.json")["made"] == "before"


def test_a_read_only_folder_is_named() -> None:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:  # root can write everywhere
            os.seteuid(65534)
        with pytest.raises(ArtifactError, match=f"cannot write {folder / 'b.json'}"):
            write_sealed(folder / "b.json", {})
        with (
            pytest.raises(ArtifactError, match=f"cannot write {folder}"),
            exclusive(folder),
        ):
            pass
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_folder_deleted_during_a_write_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def write(target: Path) -> None:
        target.write_text("x")
        shutil.rmtree(folder)

    with pytest.raises(ArtifactError, match=r"cannot write .*run/a.txt"):
        write_atomically(folder / "a.txt", write)


def test_files_are_synced_before_they_are_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By inode: every file and folder of the artifact is synced, then renamed, then the parent is synced."""
    done: list[Any] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        done.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def noted_replace(source: Any, target: Any) -> None:
        done.append("renamed")
        replace(source, target)

    monkeypatch.setattr(folora.runtime.storage.os, "fsync", noted_fsync)
    monkeypatch.setattr(folora.runtime.storage.os, "replace", noted_replace)
    write_artifact(tmp_path / "a", "samples", {"x": torch.ones(3)}, {})
    inside = {p.stat().st_ino for p in [tmp_path / "a", *(tmp_path / "a").iterdir()]}
    cut = done.index("renamed")
    assert set(done[:cut]) == inside
    assert done[cut + 1 :] == [tmp_path.stat().st_ino]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_file_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    """Also for safetensors files, which are created readable by the owner only."""
    former = os.umask(umask)
    try:
        write_artifact(tmp_path / "folder", "samples", {"x": torch.zeros(2)}, {})
        write_atomically(tmp_path / "file", lambda path: save_file({"x": torch.zeros(2)}, path))
    finally:
        os.umask(former)
    found = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_file()}
    assert found == dict.fromkeys(("file", "manifest.json", "tensors.safetensors"), mode)


def test_oversized_json_files_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    with open(file, "wb") as opened:
        opened.truncate(2**40)  # sparse
    began = time.monotonic()
    with pytest.raises(ArtifactError, match=r"request.json has 1099511627776 bytes"):
        read_json(file)
    write_artifact(tmp_path / "a", "samples", {"x": torch.ones(3)}, {})
    with open(tmp_path / "a" / "tensors.safetensors", "r+b") as opened:
        opened.truncate(2**40)
    with pytest.raises(ArtifactError, match=r"tensors.safetensors has 1099\.5 GB, but .* are free"):
        read_artifact(tmp_path / "a", "samples")
    assert time.monotonic() - began < 5


def hold(folder: Path, held: Any, enough: Any) -> None:
    with exclusive(folder):
        held.set()
        enough.wait(60)


@pytest.mark.parametrize("end", ["leaves", "is killed"])
def test_the_lock_admits_one_process_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(folora.runtime.storage, "LOCK_SECONDS", 0.05)
    fork = multiprocessing.get_context("fork")
    held, enough = fork.Event(), fork.Event()
    other = fork.Process(target=hold, args=(tmp_path, held, enough))
    other.start()
    assert held.wait(60)
    taken = pytest.raises(ArtifactError, match=f"another process of folora is using {tmp_path}")
    with taken, exclusive(tmp_path):
        pass
    if end == "leaves":
        enough.set()
    else:
        other.kill()
    other.join()
    with exclusive(tmp_path), exclusive(tmp_path):  # reentrant
        pass
