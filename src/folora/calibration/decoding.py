"""Batched decoding with a static KV cache; on a GPU each step replays a CUDA graph.

Without a graph, decoding on a GPU is bound by kernel launches from the host at any batch size. The graph
needs fixed memory, so keys and values are in transformers' static cache, which counts its tokens on the
device. On the CPU a step attends only to the written part of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticCache
from transformers.cache_utils import StaticLayer

from folora.runtime.contexts import is_sharded

COUNT = "cumulative_length"  # the device's token count in Transformers 5's static cache
EAGER_STEPS = 2  # before the graph is captured: libraries initialize in the first
CHECK_EVERY = 16  # tokens between tests whether all rows have ended
MASKED = ("sdpa", "eager")  # attention implementations with a mask for unwritten cache entries


class CudaGraphError(Exception):
    """A model's forward pass cannot be captured in a CUDA graph."""


def is_steppable(model: Any) -> bool:
    """Whether `Forward` supports a model: not sharded, and with a static cache."""
    return not is_sharded(model) and _reads_static_cache(model)


def _reads_static_cache(model: Any) -> bool:
    """Whether transformers supports a static cache for it; sliding-window caches count on the host."""
    quantizer = getattr(model, "hf_quantizer", None)
    return (
        model.device.type in ("cuda", "cpu")
        and bool(getattr(model, "_can_compile_fullgraph", False))
        and getattr(model.config, "_attn_implementation", None) in MASKED
        and (quantizer is None or quantizer.is_compileable)
        and len({p.device for p in model.parameters()}) == 1
        and all(
            type(x) is StaticLayer and hasattr(x, COUNT)
            for x in StaticCache(model.config, 1).layers
        )
    )


class _TrimmedLayer(StaticLayer):
    """A cache layer that returns only its written part. Its length is on the host: not for CUDA graphs."""

    is_compileable = False  # so that no mask is created

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        written = int(self.cumulative_length)
        return keys[:, :, :written], values[:, :, :written]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self.cumulative_length) + query_length, 0


def _cache(model: Any, length: int) -> Cache:
    cache = StaticCache(config=model.config, max_cache_len=length)
    if model.device.type == "cuda":
        return cache
    return Cache(layers=[_TrimmedLayer(length) for _ in cache.layers])


def generate_cache_options(model: Any, length: int) -> dict[str, Any]:
    """Options with which ``generate`` uses the cache of `Forward`; none on an accelerator, where it would compile."""
    if model.device.type != "cpu":
        return {}
    if _reads_static_cache(model):
        return {"past_key_values": _cache(model, length)}
    return {"cache_implementation": "static"}


class Forward:
    """One decoding step for every row; on a GPU a CUDA graph after `EAGER_STEPS` steps.

    The model is in evaluation mode and `is_steppable`; a row has at most `length` tokens.
    """

    def __init__(self, model: Any, length: int) -> None:
        self.model = model
        self.cache = _cache(model, length)
        self.steps = 0
        self.graph: Any = None
        self.tokens = self.logits = torch.empty(0)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits of the next token, (rows, vocabulary), given the last token of each row, (rows, 1) int64.

        Raises:
            CudaGraphError: The graph cannot be captured.
        """
        self.steps += 1
        if tokens.device.type != "cuda" or self.steps <= EAGER_STEPS:
            return self._run(tokens)
        if self.graph is None:
            self._capture(tokens)
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits

    def _capture(self, tokens: Tensor) -> None:
        """Capture one step without running it."""
        self.tokens, self.graph = tokens.clone(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self.logits = self._run(self.tokens)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CudaGraphError(str(error)) from error

    def _run(self, tokens: Tensor) -> Tensor:
        found = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True)
        logits: Tensor = found.logits[:, -1]
        return logits


def decode(
    forward: Callable[[Tensor], Tensor],
    start: Tensor,
    choose: Callable[[Tensor, Tensor], Tensor],
    have_ended: Callable[[], bool],
    max_new_tokens: int,
) -> Tensor:
    """Decode until every row has ended; tokens of a row after its end are undefined.

    Args:
        forward: See `Forward`.
        start: The first token of every row, (rows, 1) int64.
        choose: Returns the next tokens, (rows,) int64, given the tokens so far, (rows, tokens) int64,
            and the logits, (rows, vocabulary), which it must not modify.
        have_ended: Returns whether all rows have ended; asked every `CHECK_EVERY` tokens.
        max_new_tokens: Maximum number of tokens of a row.

    Returns:
        (rows, tokens) int64, without `start`.
    """
    written = start.repeat(1, 1 + max_new_tokens)
    for n in range(1, 1 + max_new_tokens):
        written[:, n] = choose(written[:, :n], forward(written[:, n - 1 : n]))
        if n % CHECK_EVERY == 0 and have_ended():
            return written[:, 1 : n + 1]
    return written[:, 1:]
