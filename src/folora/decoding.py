"""Decoding by one CUDA graph: a step is the same work on the same memory for every token, so the host
asks for all of its kernels once, and for one replay a token from then on.

On a GPU it is the host that a step of decoding waits for, whatever the number of rows. Keys and values
lie in transformers' static cache, which counts its tokens on the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from folora.modes import is_shared_out

logger = logging.getLogger(__name__)

EAGER_STEPS = 2  # before a graph is taken: libraries set themselves up in the first
LOOK_EVERY = 16  # tokens, for whether all rows have ended
MASKED = ("sdpa", "eager")  # attention that is told which keys of the cache are written yet


class CannotReplay(Exception):
    """A model's step asks the host for something, so that no graph can be taken of it."""


def is_replayable(model: Any) -> bool:
    """Whether a model's step for one token may be taken as a graph: the same kernels for every token.

    By what transformers says of it; caches of sliding windows count on the host.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    return (
        model.device.type == "cuda"
        and not is_shared_out(model)
        and bool(getattr(model, "_can_compile_fullgraph", False))
        and getattr(model.config, "_attn_implementation", None) in MASKED
        and (quantizer is None or quantizer.is_compileable)
        and len({p.device for p in model.parameters()}) == 1
        and all(type(layer) is StaticLayer for layer in _cache(model, 1).layers)
    )


def _cache(model: Any, length: int) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=length)


class Forward:
    """The forward pass for one more token of every row; on a GPU a graph, after `EAGER_STEPS`.

    Args:
        model: In eval mode; see `is_replayable`.
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
            CannotReplay: In the step in which the graph is taken.
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
            raise CannotReplay(str(error)) from error

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
