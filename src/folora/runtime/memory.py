"""Free memory, and estimates of what needs memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import torch

from folora.errors import ArtifactError
from folora.runtime.storage import reading


def free_bytes(device: torch.device) -> int:
    """Free bytes of a GPU's memory, or of the host's for any other device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def check_fits_memory(path: Path) -> None:
    """Refuse a file that is larger than the host's free memory. Raises ArtifactError."""
    with reading(path):
        size, free = os.path.getsize(path), free_bytes(torch.device("cpu"))
    if size > free:
        raise ArtifactError(f"{path} has {size / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free")


def sharded_weight_bytes(weights: float, blocks: int, processes: int) -> float:
    """Bytes of weights in each process under FSDP2: its shard, and two unsharded blocks.

    Of the transformer `blocks` one is in use while the next is prefetched. Embedding and head, which
    transformers' plan leaves unsharded after the first forward pass, are not counted.
    """
    return weights if processes == 1 else weights / processes + 2 * weights / blocks


def cache_bytes(model_config: Any, itemsize: int) -> int:
    """Bytes of the KV cache per token, from a transformers config; 0 for a model without attention."""
    text = model_config.get_text_config()
    if not getattr(text, "num_attention_heads", None):
        return 0
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * head * itemsize)
