"""Shapes of real models with random weights: as many blocks as fit; figures per block scale up.

Time and memory of a step do not depend on the values of the weights. The vocabulary is reduced to
`VOCABULARY` tokens: its cost does not depend on the adapter, and would bring every ratio to LoRA closer to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from folora.calibration.inputs import find_groups, target_layers
from folora.spectral.groups import InputGroup
from folora.spectral.layers import GroupBasis

VOCABULARY = 512


@dataclass(frozen=True)
class Shape:
    """Widths of a model of LLaMA's build.

    Attributes:
        hidden: Width of the residual stream.
        inner: Width of the MLP's hidden layer.
        heads: Heads of attention.
        kv_heads: Heads of keys and values.
        head: Width of a head.
        blocks: Of the whole model.
        parameters: Of the whole model, with its vocabulary.
        r: Rank to adapt it with.
    """

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    blocks: int
    parameters: float
    r: int

    def basis_bytes(self, size: int, columns: int | None = None) -> int:
        """Bytes of all bases of the model; per block three inputs of the residual stream and attention, one of `inner`."""
        stream, attention = self.hidden, self.heads * self.head
        per_block = sum(d * (columns or d) for d in (stream, attention, stream, self.inner))
        return size * self.blocks * per_block


SHAPES = {
    "smollm2-135m": Shape(576, 1536, 9, 3, 64, 30, 135e6, 16),
    "qwen3-1.7b": Shape(2048, 6144, 16, 8, 128, 28, 1.7e9, 128),
    "llama2-7b": Shape(4096, 11008, 32, 32, 128, 32, 6.7e9, 128),
}


def random_model(
    shape: Shape,
    blocks: int,
    dtype: torch.dtype,
    device: torch.device,
    vocabulary: int = VOCABULARY,
) -> PreTrainedModel:
    """A model of `blocks` blocks of a shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(dtype)  # type: ignore[arg-type]


def random_groups(model: PreTrainedModel) -> list[InputGroup]:
    """The shared inputs of a random model."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return find_groups(model, target_layers(model, "all-linear"), batch)


def random_bases(
    groups: Sequence[InputGroup], r: int, columns: int | None, device: torch.device
) -> list[GroupBasis]:
    """Random bases of the size of solved ones: all columns of T, or the first."""
    generator = torch.Generator(device).manual_seed(0)
    bases = []
    for group in groups:
        d = group.d_in
        k = d if columns is None else min(columns, d)
        t = torch.randn(d, k, generator=generator, device=device) / d**0.5
        null = torch.linalg.qr(torch.randn(d, r, generator=generator, device=device)).Q
        gamma = torch.linspace(2, 0, k, device=device)
        bases.append(GroupBasis(group, t, gamma, 1.0, null))
    return bases
