"""A tiny model, a tokenizer of single characters, rows of a made-up task, and a config that fits them.

Shared by the benchmarks that need no real model (reliability, several processes, versions) and by the
tests; benchmarks import nothing from `tests`.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from folora.config import FoLoraConfig

ALPHABET = string.ascii_lowercase + string.digits + " .,:?+-=#\n"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'][0] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>a:' }}{% endif %}"
)


def make_tokenizer(bos: bool = True, chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", *ALPHABET])}
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


def make_llama(seed: int = 0, vocab: int = 51, **changes: Any) -> PreTrainedModel:
    """Two blocks of width 32 with random weights, tied embeddings."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    config = LlamaConfig(
        vocab_size=vocab, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.3, **{**shape, **changes},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_gpt2(seed: int = 0) -> PreTrainedModel:
    """The same with Conv1D layers and biases."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=51, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def make_mistral() -> PreTrainedModel:
    """Its cache holds fewer tokens than a sequence has, and counts on the host."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=51, hidden_size=32, intermediate_size=48, num_hidden_layers=2, sliding_window=8,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def write_qwen3(folder: Path) -> Path:
    """A very small Qwen3 with special tokens as Qwen's: a chat's EOS, and no BOS in the tokenizer.

    Texts end as soon as they may, so that many are written in a minute.
    """
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token="#"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    end, turn = (tokenizer.get_vocab()[t] for t in ("<|endoftext|>", "<|im_end|>"))
    config = Qwen3Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=False, initializer_range=0.3, bos_token_id=end, eos_token_id=turn,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.lm_head.weight.data[turn] *= 20  # at every other place nearly certain
    model.generation_config.eos_token_id = [turn, end]
    model.save_pretrained(folder)
    return folder


MAKERS = {"llama": make_llama, "gpt2": make_gpt2}


def rows() -> list[dict[str, str]]:
    """Forty sums."""
    return [{"prompt": f"{a}+{b}=", "completion": f"{a + b}."} for a in range(8) for b in range(5)]


def write_model(folder: Path) -> Path:
    """A tiny LLaMA with its tokenizer, on disk."""
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_rows(file: Path) -> Path:
    """`rows` as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return file


def tiny_config(**changes: object) -> FoLoraConfig:
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
    return FoLoraConfig.from_dict(values)


def tiny_task(place: Path) -> FoLoraConfig:
    """A tiny model and rows in a folder, and the config of a run of them into ``run`` beside."""
    model, data = write_model(place / "model"), write_rows(place / "rows.jsonl")
    return tiny_config(model=str(model), dataset=str(data), output=str(place / "run"))
