"""Local copies of the Hub's datasets, a tokenizer for any text, and a folder with it."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType
from typing import Any

import datasets
import nltk
import pytest
from datasets import Dataset, DatasetDict
from support.paper_hub import HUB, NAMES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import folora.data.files
from benchmarks.paper.recipe import TASKS


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's datasets from memory; stubs for IFEval's packages where they are not installed.

    The checks of IFEVAL's document use neither language detection nor sentence splitting.
    """
    read_file = datasets.load_dataset

    def load(
        path: str, name: str | None = None, split: str | None = None, **options: Any
    ) -> Dataset | DatasetDict:
        if path == "json":
            return read_file(path, name=name, split=split, **options)
        if path not in HUB:
            raise FileNotFoundError(path)
        assert name == NAMES.get(path, name)
        found = {s: Dataset.from_list(rows) for s, rows in HUB[path].items()}
        return found[split] if split else DatasetDict(found)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(folora.data.files, "load_dataset", load)
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    for name in ("langdetect", "immutabledict"):
        if importlib.util.find_spec(name) is None:
            husk = ModuleType(name)
            husk.immutabledict = dict  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, husk)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Encodes any text in tokens of a few characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [path.read_text() for path in TASKS.glob("*.yaml")] + [json.dumps(HUB)]
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> str:
    """The replacement of a recipe's model; a trial uses only its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)
