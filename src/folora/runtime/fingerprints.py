"""SHA-256 fingerprints of what a result was made from: weights, model config, tokenizer and tokens.

Two models have the same fingerprints if and only if all their weights and configs are the same,
wherever they were loaded from. Values are hashed in memory, in as many threads as PyTorch uses. With SHA
instructions a core hashes 1.3 GB/s in bfloat16 and 0.8 GB/s in float32, faster than loading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folora.runtime import distributed
from folora.runtime.storage import json_fingerprint
from folora.runtime.tensors import full_tensor

VALUES_AT_ONCE = 2**22
NARROW = (torch.bfloat16, torch.float16)
WIDE = (torch.float16, torch.float32, torch.float64)
WITHOUT_EFFECT = frozenset(
    {"transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}
)
"""Entries of a model's config that do not change what it computes; the dtype is recorded separately."""


def model_facts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Dtype and fingerprints of a model and its tokenizer, for manifests; a collective if weights are sharded."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "model_config": config_fingerprint(model.config),
        "model": weights_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }


def config_fingerprint(config: Any) -> str:
    """SHA-256 of the non-default entries of a transformers config that have an effect."""
    return json_fingerprint(_effective(json.loads(config.to_json_string(use_diff=True))))


def _effective(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: _effective(v)
            for k, v in value.items()
            if k not in WITHOUT_EFFECT and not k.startswith("_")
        }
    return [_effective(v) for v in value] if isinstance(value, list) else value


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and all values of parameters and saved buffers.

    Each value is hashed in the narrowest dtype that holds it exactly, so that a bfloat16 checkpoint and
    its conversion to float32 have the same fingerprint, but a rounded one does not. If weights are
    sharded, each process hashes some of them, and all must call this function.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):  # after a forward pass tied weights may appear twice
            module.reshard()
    state = {n: t for n, t in sorted(model.state_dict().items()) if isinstance(t, Tensor)}
    sharded = {n: t for n, t in state.items() if isinstance(t, DTensor)}
    digests: dict[str, str] = {}
    for index, (name, tensor) in enumerate(sharded.items()):
        gathered = full_tensor(tensor)  # a collective
        if index % distributed.world_size() == distributed.rank():
            digests[name] = _digest(gathered)
    if sharded:
        digests = {n: d for part in distributed.all_gather(digests) for n, d in part.items()}
    own = [name for name in state if name not in sharded]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests |= zip(own, pool.map(lambda name: _digest(state[name]), own), strict=True)
    return json_fingerprint([[name, list(t.shape), digests[name]] for name, t in state.items()])


def _digest(tensor: Tensor) -> str:
    result = hashlib.sha256()
    if tensor.is_meta or not tensor.numel():
        return result.hexdigest()
    for part in tensor.detach().reshape(-1).split(VALUES_AT_ONCE):
        # A copy: numpy would pin the size of the storage, which FSDP resizes.
        narrow = _narrowest(part).cpu().clone()
        result.update(f"{narrow.dtype}".encode())
        result.update(narrow.view(torch.uint8).numpy().data)
    return result.hexdigest()


def _narrowest(values: Tensor) -> Tensor:
    """The same values in 16 bits if that is lossless."""
    if values.dtype in WIDE:
        for dtype in NARROW:
            narrow = values.to(dtype)
            if torch.equal(narrow.to(values.dtype), values):
                return narrow
    return values


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary: equal for tokenizers that give every token the same id.

    Templates and special tokens are covered by the fingerprint of the tokenized rows.
    """
    return json_fingerprint(sorted(tokenizer.get_vocab().items()))


def tokens_fingerprint(rows: Iterable[Iterable[int]]) -> str:
    """SHA-256 of token rows."""
    result = hashlib.sha256()
    for row in rows:
        result.update((",".join(map(str, row)) + "\n").encode())
    return result.hexdigest()
