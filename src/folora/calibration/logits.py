"""Logits processing: decoding settings and a random stream for each sequence.

Both are functions of the sequence's number and the seed only, so that a sequence depends neither on its
batch nor on where an interrupted run resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from folora.calibration.sources import Mixture
from folora.calibration.turns import Turns
from folora.config import SamplingConfig
from folora.errors import NumericsError
from folora.runtime.contexts import is_sharded
from folora.runtime.finiteness import first_non_finite_module

BLOCK = 256  # tokens per block of the two-level cumulative sum
CANDIDATES = 1024  # top-p rarely needs a sort of the whole vocabulary
NON_FINITE_LOGITS = (
    "the model's logits are not finite while sampling{}. The weights hold NaN, or values overflow in this "
    "dtype. Check the weights, or load the model in bf16 or fp32 (--dtype)."
)


@dataclass(frozen=True)
class Decoding:
    """A decoding setting, and for how many of ten sequences it is used."""

    tenths: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether it leaves the model's distribution unchanged."""
        return (self.temperature, self.top_p, self.top_k) == (1.0, 1.0, 0)


MIXTURE = (
    Decoding(7),
    Decoding(2, top_p=0.95),
    Decoding(1, temperature=1.2, top_p=0.98, top_k=50),
)


def decoding_of(number: int) -> Decoding:
    """Setting of a sequence: 7, 2 and 1 of every ten, interleaved."""
    schedule = [setting for setting in MIXTURE for _ in range(setting.tenths)]
    return schedule[number * 3 % 10]


def stream_seed(seed: int, number: int) -> int:
    """The seed of a sequence's random stream, in [0, 2^63)."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 1) % 2**63


class PerSequenceSampler(LogitsProcessor):
    """Sample each row's next token by inverse CDF at a uniform number of the row's random stream.

    As a LogitsProcessor it returns scores whose argmax is the sampled token, for greedy search.
    """

    def __init__(
        self,
        model: Any,
        mixture: Mixture,
        numbers: Sequence[int],
        eos_ids: Sequence[int],
        config: SamplingConfig,
        seed: int = 0,
        on_token: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.on_token = on_token
        self.is_sharded = is_sharded(model)
        self.non_finite = False
        rows: dict[Decoding, list[int]] = {}
        for row, number in enumerate(numbers):
            _, index = mixture.place(number) or (None, number)
            rows.setdefault(decoding_of(index), []).append(row)
        self.rows = {
            setting: torch.tensor(found, device=model.device)
            for setting, found in rows.items()
            if not setting.is_plain
        }
        seeds = [stream_seed(seed, number) for number in numbers]
        streams = [torch.Generator().manual_seed(found) for found in seeds]
        scripts = [mixture.script(number) for number in numbers]
        self.turns = Turns(scripts, eos_ids, config, model.device)
        count = config.max_new_tokens + max(script.given for script in scripts)
        uniforms = [torch.rand(count, generator=g, dtype=torch.float64) for g in streams]
        self.uniforms = torch.stack(uniforms).to(model.device)  # (rows, tokens), in [0, 1)
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores whose argmax is each row's sampled token."""
        choice = self.choose(input_ids, scores)
        return torch.full_like(scores, -1.0).scatter_(1, choice[:, None], 1.0)

    def choose(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The next token of each row, (rows,) int64, given its tokens so far and its logits."""
        scores = scores.to(torch.float32, copy=True)
        # aminmax propagates NaN and is ten times as fast as isfinite of all.
        if not torch.isfinite(torch.stack(scores.aminmax())).all():
            if not self.is_sharded:
                inputs = {"input_ids": input_ids, "use_cache": False}
                where = first_non_finite_module(self.model, inputs)
                raise NumericsError(NON_FINITE_LOGITS.format(f": {where}"))
            self.non_finite = True  # raised later: the others need this process in the forward pass
            scores = torch.zeros_like(scores)
        self.turns.forbid_ends(self.step, scores)
        for setting, rows in self.rows.items():
            scores[rows] = warp_logits(scores[rows], setting)
        sampled = inverse_cdf(scores, self.uniforms[:, self.step])
        choice = self.turns.follow(self.step, sampled)
        self.step += 1
        self.on_token()
        return choice

    def ended(self, *_: Any, **__: Any) -> Tensor:
        """Whether each row is complete, (rows,) bool; a stopping criterion of ``generate``."""
        return self.turns.ended


def inverse_cdf(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Sample from each row's distribution by inverting its CDF at a uniform number.

    The cumulative sum has two levels: over blocks of tokens, then within the selected block. It is float64
    but for the sums of blocks, which are float32.

    Args:
        scores: Unnormalized log-probabilities, (rows, vocabulary) float32, -inf where forbidden.
        uniforms: In [0, 1), (rows,) float64.

    Returns:
        Token ids, (rows,) int64.
    """
    weights = (scores - scores.amax(-1, keepdim=True)).exp_()
    if rest := -scores.shape[1] % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, rest))
    blocks = weights.unflatten(1, (-1, BLOCK))
    shares = blocks.sum(-1)
    upto = shares.cumsum(-1, dtype=torch.float64)
    target = uniforms[:, None] * upto[:, -1:]
    hit = torch.searchsorted(upto, target, right=True).clamp_(max=upto.shape[1] - 1)
    block = blocks.gather(1, hit[..., None].expand(-1, 1, BLOCK))[:, 0].double()
    inside = block.cumsum(-1) + (upto - shares).gather(1, hit)
    # If rounding puts the target beyond the total, take the last allowed token.
    places = torch.arange(BLOCK, device=scores.device)
    last = torch.where(block > 0, places, 0).amax(-1, keepdim=True)
    within = torch.searchsorted(inside, target, right=True).minimum(last)
    return (hit * BLOCK + within)[:, 0]


def warp_logits(scores: Tensor, setting: Decoding) -> Tensor:
    """Apply temperature, top-k and top-p, in this order, to scores of shape (rows, vocabulary)."""
    scores = scores / setting.temperature
    if setting.top_k:
        kth = scores.topk(min(setting.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -float("inf"))
    if setting.top_p == 1.0:
        return scores
    return _nucleus(scores, setting.top_p, setting.top_k or CANDIDATES)


def _nucleus(scores: Tensor, top_p: float, candidates: int) -> Tensor:
    """Top-p filtering among the `candidates` likeliest tokens, or all for rows where these do not reach top_p."""
    whole = scores.logsumexp(-1, keepdim=True)
    ordered, order = scores.topk(min(candidates, scores.shape[-1]))
    shares = (ordered - whole).exp()
    upto = shares.cumsum(-1)
    # Drop the tokens after top_p is reached.
    kept = ordered.masked_fill(upto - shares >= top_p, -float("inf"))
    found = torch.full_like(scores, -float("inf")).scatter_(1, order, kept)
    flat = (upto[:, -1] < top_p).nonzero()[:, 0]
    if len(flat) and candidates < scores.shape[-1]:
        found[flat] = _nucleus(scores[flat], top_p, scores.shape[-1])
    return found
