"""The meter: task loss, KL to the base model, and norms of the update.

Learned: cross-entropy on held-out task rows. Retained: KL(base || adapted) per token and the change in
cross-entropy on held-out calibration text. Size of the update: ||dW||_F, and the H-norm
sqrt(trace(dW H dW')), the root mean square change of a layer's output on the model's own text (plus the
ridge).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from folora.adapters.adapter import Factors, lora_factors
from folora.data.contents import IGNORE, Example
from folora.data.rows import batches, text_examples
from folora.errors import DataError
from folora.metrics.kl import kl, labelled_logits
from folora.optim.sadam import SAdam
from folora.runtime.contexts import evaluating, without_adapter
from folora.runtime.shapes import Float
from folora.spectral.layers import GroupBasis

logger = logging.getLogger(__name__)

OUTSIDE = 1e-3  # relative norm of A outside a truncated basis; fp32 rounding is about 1e-6
UNTRAINED = 1e-6  # relative to the factors' norms; rounding of a subtracted initialization is 1e-8
CHUNK = 256  # rows of (tokens, vocabulary) log-probabilities in float32

Texts = Sequence[list[int]] | Mapping[str, Sequence[list[int]]]
"""Token ids of each sequence, or the same by source."""


def by_source(texts: Texts) -> Mapping[str, Sequence[list[int]]]:
    """Sequences by source; those of unknown sources under one empty name."""
    return texts if isinstance(texts, Mapping) else {"": texts}


@dataclass(frozen=True)
class Reading:
    """One reading of the meter.

    Attributes:
        kl: Mean KL(base || adapted) in nats per token, on held-out calibration text.
        ce_change: Cross-entropy of adapted minus base on the same tokens, in nats per token.
        task_loss: Cross-entropy in nats per response token on held-out task rows; NaN without rows.
        kl_by_source: The KL on the text of each source, if there are several.
    """

    kl: float
    ce_change: float
    task_loss: float
    kl_by_source: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerNorms:
    """Norms of one layer's update: Frobenius norm and H-norm."""

    frobenius: float
    h_norm: float


class Meter:
    """Compares a PEFT model with its base model on fixed held-out tokens.

    Args:
        held_out_samples: Held-out calibration text, with the start token; or by source.
        held_out_task: Held-out task rows; may be empty.
        batch_size: Sequences per forward pass.
        check: Called before every reading.

    Raises:
        DataError: There are no held-out samples.
    """

    def __init__(
        self,
        held_out_samples: Texts,
        held_out_task: Sequence[Example],
        batch_size: int = 8,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        if not held_out_samples:
            raise DataError("the meter needs held-out samples; sample at least 32 sequences")
        self.samples = {
            name: text_examples(rows) for name, rows in by_source(held_out_samples).items()
        }
        self.task = list(held_out_task)
        self.batch_size = batch_size
        self.check = check

    @property
    def num_batches(self) -> int:
        """Number of batches of a reading: how often `on_batch` is called."""
        rows = [*self.samples.values(), self.task]
        return sum(-(-len(part) // self.batch_size) for part in rows)

    def read(self, model: PeftModel, on_batch: Callable[[], None] = lambda: None) -> Reading:
        """Take a reading; the model's mode and active adapter are restored."""
        self.check()
        total = change = tokens = 0.0
        sources: dict[str, float] = {}
        with evaluating(model):
            for name, samples in self.samples.items():
                before = total, tokens
                for batch in batches(samples, self.batch_size):
                    k, c, n = _kl_sums(model, batch)
                    total, change, tokens = total + k, change + c, tokens + n
                    on_batch()
                sources[name] = (total - before[0]) / (tokens - before[1])
        several = sources if len(sources) > 1 else {}
        return Reading(total / tokens, change / tokens, self.task_loss(model, on_batch), several)

    def task_loss(self, model: Any, on_batch: Callable[[], None] = lambda: None) -> float:
        """Cross-entropy in nats per response token on the held-out task rows; NaN without rows."""
        total = count = 0.0
        with evaluating(model):
            for batch in batches(self.task, self.batch_size):
                value, n = response_loss(model, batch)
                total, count = total + value, count + n
                on_batch()
        return total / count if self.task else float("nan")


def update_norms(factors: Factors, bases: Sequence[GroupBasis]) -> dict[str, LayerNorms]:
    """||dW||_F and sqrt(trace(dW H dW')) of every layer of `bases`, from its factors, in float64.

    With a truncated basis the H-norm is known only for updates within its span; otherwise it is NaN.
    """
    norms: dict[str, LayerNorms] = {}
    for b in bases:
        a64 = [factors[name][0].double() for name in b.group.layers]
        # Norms of T's columns differ by orders of magnitude; they are normalized for the solve.
        basis = b.basis.to(a64[0].device).double()
        lengths = basis.norm(dim=0)
        # H = T^-T T^-1, so the H-norm of A is the Frobenius norm of A T^-T.
        in_h = _coordinates(basis / lengths, torch.cat(a64)) / lengths
        parts = in_h.split([len(a) for a in a64])
        for name, a, own in zip(b.group.layers, a64, parts, strict=True):
            _, outer, scaling = factors[name]
            gram = outer.double().T @ outer.double()
            norms[name] = LayerNorms(
                scaling * _norm_of_product(gram, a), scaling * _norm_of_product(gram, own)
            )
    return norms


def warn_if_not_stepped(optimizer: SAdam, model: PeftModel, bases: Sequence[GroupBasis]) -> None:
    """Warn if an adapter was trained without its prepared optimizer, as by a Trainer's default AdamW.

    While A lies in the span of a truncated basis, another `SAdam` may have trained it: no warning.
    """
    spectral = any("basis" in group for group in optimizer.param_groups)
    if optimizer.state or not spectral:
        return
    factors = lora_factors(model)
    norms = update_norms(factors, bases)
    moved = [name for name, norm in norms.items() if norm.frobenius > _rounding(*factors[name])]
    cut = {n: len(b.gamma) < b.group.d_in for b in bases for n in b.group.layers}
    unexpected = [name for name in moved if not cut[name] or math.isnan(norms[name].h_norm)]
    if unexpected:
        logger.warning(
            "%d layers have been trained, such as %s, but the prepared optimizer has not taken a step. Pass "
            "optimizers=(prepared.optimizer, None) to the Trainer: otherwise it trains plain LoRA with "
            "AdamW, without protection against forgetting.",
            len(unexpected), unexpected[0],
        )  # fmt: skip


def _rounding(a: Tensor, b: Tensor, scaling: float) -> float:
    """Upper limit of ||dW||_F of an adapter that was not trained, due to rounding."""
    return UNTRAINED * abs(scaling) * float(a.double().norm() * b.double().norm())


def _coordinates(basis: Tensor, a: Tensor) -> Tensor:
    """X (rows, k) with X T' = A; rows of A outside the span of a truncated basis become NaN."""
    d, k = basis.shape
    if d == k:
        return torch.linalg.solve(basis, a.T).T
    q, upper = torch.linalg.qr(basis)
    inside = q.T @ a.T
    found = torch.linalg.solve_triangular(upper, inside, upper=True).T
    outside = (a.T - q @ inside).norm(dim=0) > OUTSIDE * a.norm(dim=1)
    return found.masked_fill_(outside[:, None], float("nan"))


@torch.no_grad()
def response_loss(model: Any, batch: dict[str, Tensor]) -> tuple[float, int]:
    """Summed cross-entropy of the labelled tokens, and their number."""
    logits, labels = labelled_logits(model, batch)
    return float(_cross_entropies(logits.float(), labels).sum()), len(labels)


def total_norm(norms: dict[str, LayerNorms]) -> LayerNorms:
    """Square root of the sum of squares over layers."""
    return LayerNorms(
        sum(n.frobenius**2 for n in norms.values()) ** 0.5,
        sum(n.h_norm**2 for n in norms.values()) ** 0.5,
    )


@torch.no_grad()
def _kl_sums(model: PeftModel, batch: dict[str, Tensor]) -> tuple[float, float, int]:
    """Summed KL(base || adapted), summed change in cross-entropy, and the number of tokens."""
    divergence, changes, _ = _token_kl(model, batch)
    return float(divergence.sum()), float(changes.sum()), len(divergence)


@torch.no_grad()
def sequence_kl(model: PeftModel, batch: dict[str, Tensor]) -> tuple[list[float], list[int]]:
    """KL(base || adapted) summed over each row's labelled tokens, in nats, and their numbers."""
    divergence, _, counts = _token_kl(model, batch)
    return [float(part.sum()) for part in divergence.split(counts)], counts


def _token_kl(
    model: PeftModel, batch: dict[str, Tensor]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], list[int]]:
    """KL(base || adapted) and change in cross-entropy of each labelled token, float64, and tokens per row."""
    adapted, labels = labelled_logits(model, batch)
    with without_adapter(model):
        base, _ = labelled_logits(model, batch)
    found = []
    for start in range(0, len(labels), CHUNK):
        rows = slice(start, start + CHUNK)
        losses = [_cross_entropies(x[rows].float(), labels[rows]) for x in (adapted, base)]
        found.append(torch.stack([kl(base[rows], adapted[rows]).double(), losses[0] - losses[1]]))
    divergence, change = torch.cat(found, dim=1)
    return divergence, change, (batch["labels"][:, 1:] != IGNORE).sum(1).tolist()


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Of every position, in float64."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none").double()


def _norm_of_product(gram: Tensor, a: Tensor) -> float:
    """||B A||_F from B'B (k, k) and A (k, d)."""
    square = float((gram * (a @ a.T)).sum())
    return square if math.isnan(square) else max(square, 0.0) ** 0.5
