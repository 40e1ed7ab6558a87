"""Decoding, one token of every row at a time, from a cache that is written in place.

On a GPU it is the host that a step waits for, whatever the number of rows. There a step is one CUDA graph,
the same work on the same memory for every token: the host asks for all of its kernels once, and for one
replay a token from then on. Keys and values lie in transformers' static cache, which counts its tokens on
the device. On the CPU a step attends to what has been written, and not to the room for the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticCache
from transformers.cache_utils import StaticLayer

from folora.runtime.contexts import is_sharded

logger = logging.getLogger(__name__)

COUNT = "cumulative_length"  # of tokens, in a layer of Transformers 5's static cache
EAGER_STEPS = 2  # before a graph is taken: libraries set themselves up in the first
LOOK_EVERY = 16  # tokens, for whether all rows have ended
MASKED = ("sdpa", "eager")  # attention that is told which keys of the cache are written yet


class CudaGraphError(Exception):
    """A model's step asks the host for something, so that no graph can be taken of it."""


def is_steppable(model: Any) -> bool:
    """Whether `Forward` may run a model: alone, with a static cache, the same kernels for every token."""
    return not is_sharded(model) and _reads_static_cache(model)


def _reads_static_cache(model: Any) -> bool:
    """By what transformers says of it; caches of sliding windows count on the host."""
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


class _WrittenPart(StaticLayer):
    """A layer of the cache that hands out what is written. The host counts it, so no graph may hold it."""

    is_compileable = False  # no mask is made then

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
    return Cache(layers=[_WrittenPart(length) for _ in cache.layers])


def generate_cache_options(model: Any, length: int) -> dict[str, Any]:
    """What makes ``generate`` use the cache that `Forward` would, on the CPU to the bit.

    On an accelerator nothing: there it would compile the model for a static cache.
    """
    if model.device.type != "cpu":
        return {}
    if _reads_static_cache(model):
        return {"past_key_values": _cache(model, length)}
    return {"cache_implementation": "static"}


class Forward:
    """The forward pass for one more token of every row; on a GPU a graph, after `EAGER_STEPS`.

    Args:
        model: In eval mode; see `is_steppable`.
        length: Tokens of a row at most.
    """

    def __init__(self, model: Any, length: int) -> None:
        self.model = model
        self.cache = _cache(model, length)
        self.steps = 0
        self.graph: Any = None
        self.tokens = self.logits = torch.empty(0)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits of the next token, (rows, vocabulary), given the last one of each row, (rows, 1).

        Raises:
            CudaGraphError: In the step in which the graph is taken.
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
        """Record a step, which runs nothing."""
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
    eos_ids: Sequence[int],
    most: int,
) -> Tensor:
    """Tokens one after the other, until every row has ended.

    Args:
        forward: See `Forward`.
        start: The first token of every row, (rows, 1) int64.
        choose: Given what is there, (rows, tokens) int64, and the scores of the next token, (rows,
            vocabulary), which it must not change, that token, (rows,) int64.
        eos_ids: What ends a row; what stands in it afterwards means nothing.
        most: Tokens a row.

    Returns:
        (rows, tokens) int64, without `start`.
    """
    ends = torch.tensor(eos_ids, dtype=start.dtype, device=start.device)
    ended = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    written = start.repeat(1, 1 + most)
    for n in range(1, 1 + most):
        written[:, n] = choose(written[:, :n], forward(written[:, n - 1 : n]))
        ended |= torch.isin(written[:, n], ends)
        if eos_ids and n % LOOK_EVERY == 0 and bool(ended.all()):
            return written[:, 1 : n + 1]
    return written[:, 1:]
