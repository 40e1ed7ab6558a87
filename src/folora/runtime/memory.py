"""How much memory is free, and what fits into it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import torch

from folora.errors import ArtifactError


def free_bytes(device: torch.device) -> int:
    """Memory that is free where a device computes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def check_fits_memory(path: Path) -> None:
    """Refuse, before it is read, a file that is larger than what is free. Raises ArtifactError."""
    size, free = os.path.getsize(path), free_bytes(torch.device("cpu"))
    if size > free:
        raise ArtifactError(f"{path} has {size / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free")


def sharded_weight_bytes(weights: float, blocks: int, processes: int) -> float:
    """Bytes of weights in each process that shares them out: a part, and two blocks whole.

    Embedding and head, which transformers' plan leaves whole after the first forward pass, are left out.

    Args:
        weights: Bytes of all.
        blocks: How many transformer blocks they are in; one is in use while another is on its way.
        processes: How many share them.
    """
    return weights if processes == 1 else weights / processes + 2 * weights / blocks


def cache_bytes(model_config: Any, itemsize: int) -> int:
    """Bytes that keys and values of one token take while decoding, by a transformers config.

    None where there is no attention: a state-space model keeps a state of fixed size.
    """
    text = model_config.get_text_config()
    if not getattr(text, "num_attention_heads", None):
        return 0
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * head * itemsize)
