"""Changes of a model folder: files, weights, tokenizers, and other tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.modeling_outputs import CausalLMOutput

from benchmarks.tiny import make_tokenizer
from folora.runtime.storage import read_sealed, write_sealed

Edit = Callable[[Path], None]


def json_file(name: str, **changes: Any) -> Edit:
    """Set values in a JSON file; None removes them."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | changes
        kept = {k: v for k, v in values.items() if v is not None}
        (folder / name).write_text(json.dumps(kept))

    return edit


def resealed(name: str, **changes: Any) -> Edit:
    """Set values in a sealed JSON file and update its checksum."""

    def edit(folder: Path) -> None:
        write_sealed(folder / name, read_sealed(folder / name) | changes)

    return edit


def content(name: str, text: str | bytes) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return edit


def removed(*patterns: str) -> Edit:
    def edit(folder: Path) -> None:
        for pattern in patterns:
            for path in sorted(folder.glob(pattern)):
                path.unlink()

    return edit


def cut(name: str, size: int) -> Edit:
    """Truncate a file to a size; a negative size removes bytes from the end."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def tokenizer(
    change: Callable[[PreTrainedTokenizerFast], Any] = lambda _: None,
    bos: bool = True,
    template: str | None = None,
) -> Edit:
    def edit(folder: Path) -> None:
        made = make_tokenizer(bos=bos)
        if template is not None:
            made.chat_template = template
        change(made)
        made.save_pretrained(folder)

    return edit


def without_bos(**changes: Any) -> Edit:
    """Neither tokenizer nor model has a BOS; the config class's default id is an ordinary token."""

    def edit(folder: Path) -> None:
        tokenizer(bos=False, **changes)(folder)
        json_file("config.json", bos_token_id=5)(folder)
        json_file("generation_config.json", bos_token_id=None)(folder)

    return edit


def another(make: Callable[[], PreTrainedModel], **config: Any) -> Edit:
    """Another model with the same tokenizer."""

    def edit(folder: Path) -> None:
        torch.manual_seed(0)
        make().save_pretrained(folder)
        json_file("config.json", **config)(folder)

    return edit


def t5() -> PreTrainedModel:
    shape = T5Config(vocab_size=51, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)
    return T5ForConditionalGeneration(shape)


def bert() -> BertConfig:
    return BertConfig(
        vocab_size=51, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, initializer_range=0.5,
    )  # fmt: skip


def vit() -> PreTrainedModel:
    return ViTModel(
        ViTConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            image_size=16, patch_size=8,
        )
    )  # fmt: skip


class FlatConfig(PretrainedConfig):
    model_type = "flat"


class Flat(PreTrainedModel):
    """A causal LM that is only an embedding."""

    config_class = FlatConfig

    def __init__(self, config: FlatConfig) -> None:
        super().__init__(config)
        self.embedding = torch.nn.Embedding(51, 32)
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.embedding(input_ids) @ self.embedding.weight.T)  # type: ignore[arg-type]


AutoConfig.register("flat", FlatConfig)
AutoModelForCausalLM.register(FlatConfig, Flat)

UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
NORM = "model.layers.1.input_layernorm.weight"
