"""Tiny models and a character tokenizer; shapes annotated in the source are checked while tests run."""

from __future__ import annotations

import os
import string
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from jaxtyping import install_import_hook

with install_import_hook(
    [
        "folora.spectrum",
        "folora.solving",
        "folora.initialization",
        "folora.adapter",
        "folora.meter",
    ],
    "beartype.beartype",
):
    import folora
    import folora.adapter
    import folora.meter

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from folora.disk import LOCK

CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'][0] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>a:' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_tokenizer(bos: bool = True, chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a character."""
    alphabet = string.ascii_lowercase + string.digits + " .,:?+-=#\n"
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", *alphabet])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    if not bos:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<s>"]})
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def make_llama(seed: int = 0, vocab: int = 51, **changes: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    config = LlamaConfig(
        vocab_size=vocab, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=True, initializer_range=0.3, **{**shape, **changes},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_gpt2(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=51, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


MAKERS = {"llama": make_llama, "gpt2": make_gpt2}


@pytest.fixture(params=sorted(MAKERS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MAKERS[request.param]()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with its tokenizer, on disk."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows of a made-up task."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("\n".join(json_rows()) + "\n")
    return file


def rows() -> list[dict[str, str]]:
    return [{"prompt": f"{a}+{b}=", "completion": f"{a + b}."} for a in range(8) for b in range(5)]


def json_rows() -> list[str]:
    import json

    return [json.dumps(row) for row in rows()]


def temporary(folder: Path) -> list[Path]:
    """What a writer that was killed left in a folder; its lock is there for good."""
    return [p for p in folder.rglob(".*") if p.name != LOCK]


TINY_PLAN_BASE = {
    "dtype": "float32",
    "device": "cpu",
    "sampling.num_sequences": 36,
    "sampling.min_new_tokens": 32,
    "sampling.max_new_tokens": 32,
    "statistics.task_examples": 8,
    "training.max_steps": 4,
    "training.batch_size": 2,
    "adapter.r": 2,
}
"""The base of a plan whose every arm takes a second on a tiny model."""


def tiny_config(**changes: object) -> folora.FoLoraConfig:
    """A config whose every stage takes a second on the tiny model."""
    values: dict[str, object] = {
        "dtype": "float32",
        "device": "cpu",
        "sampling": {
            "num_sequences": 40,
            "min_new_tokens": 32,
            "max_new_tokens": 40,
            "batch_size": 16,
        },
        "data": {"max_length": 64},
        "statistics": {"task_examples": 16},
        "adapter": {"r": 4},
        "training": {"learning_rate": 1e-2, "max_steps": 6, "save_steps": 2, "logging_steps": 2},
    }
    for name, value in changes.items():
        if isinstance(value, dict):
            values[name] = {**values.get(name, {}), **value}  # type: ignore[dict-item]
        else:
            values[name] = value
    return folora.FoLoraConfig.from_dict(values)
