"""What was learned, what was kept, and what it cost.

Kept: on the model's own held-out samples, KL(base || adapted) a token and the change in
cross-entropy. Learned: loss on held-out rows of the task. Cost: ||dW||_F, and its H-norm
sqrt(trace(dW H dW')), which is the root mean square change of the layer's response to the model's
own text (plus the ridge).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor

from folora.adapter import lora_factors
from folora.data import IGNORE, Example, batches, text_examples
from folora.errors import DataError
from folora.modes import evaluating
from folora.solving import GroupBasis

ROWS_AT_ONCE = 256  # of (tokens, vocabulary) log-probabilities in float32


@dataclass(frozen=True)
class Reading:
    """One reading of the meter.

    Attributes:
        kl: Mean KL(base || adapted) a token, in nats, on held-out self-samples.
        ce_change: Cross-entropy of adapted minus base on the same tokens, in nats a token.
        task_loss: Cross-entropy a response token on held-out task rows; NaN without rows.
    """

    kl: float
    ce_change: float
    task_loss: float


@dataclass(frozen=True)
class LayerNorms:
    """Size of one layer's update: Frobenius, and in the metric of H."""

    frobenius: float
    h_norm: float


class Meter:
    """Reads a PEFT model against its own base, on the same fixed tokens every time.

    Args:
        held_out_samples: Self-samples set aside, with the start token in front.
        held_out_task: Task rows set aside; may be empty.
        batch_size: Sequences a forward pass.

    Raises:
        DataError: There are no held-out samples.
    """

    def __init__(
        self,
        held_out_samples: Sequence[list[int]],
        held_out_task: Sequence[Example],
        batch_size: int = 8,
    ) -> None:
        if not held_out_samples:
            raise DataError("the meter needs held-out samples; sample at least 32 sequences")
        self.samples = text_examples(held_out_samples)
        self.task = list(held_out_task)
        self.batch_size = batch_size

    def read(self, model: PeftModel, on_batch: Callable[[], None] = lambda: None) -> Reading:
        """Take a reading; the model's mode and adapter are as before afterwards."""
        with evaluating(model):
            kl = change = tokens = 0.0
            for batch in batches(self.samples, self.batch_size):
                k, c, n = _divergence(model, batch)
                kl, change, tokens = kl + k, change + c, tokens + n
                on_batch()
        return Reading(kl / tokens, change / tokens, self.task_loss(model, on_batch))

    def task_loss(self, model: Any, on_batch: Callable[[], None] = lambda: None) -> float:
        """Cross-entropy a response token on the held-out task rows; NaN without rows."""
        total = count = 0.0
        with evaluating(model):
            for batch in batches(self.task, self.batch_size):
                value, n = response_loss(model, batch)
                total, count = total + value, count + n
                on_batch()
        return total / count if self.task else float("nan")


def update_norms(
    model: PeftModel, bases: Sequence[GroupBasis], adapter_name: str = "default"
) -> dict[str, LayerNorms]:
    """||dW||_F and sqrt(trace(dW H dW')) of every adapted layer, from the factors in float64."""
    factors = lora_factors(model, adapter_name)
    norms: dict[str, LayerNorms] = {}
    for b in bases:
        basis = b.basis.double()
        factored = torch.linalg.lu_factor(basis)
        for name in b.group.layers:
            a, bb, scaling = factors[name]
            # H = T^-T T^-1, so an H-norm is a plain norm after solving with T.
            a64 = a.double().to(basis.device)
            in_h = torch.linalg.lu_solve(*factored, a64.T).T
            outer = bb.double().to(basis.device)
            gram = outer.T @ outer
            norms[name] = LayerNorms(
                scaling * _norm_of_product(gram, a64), scaling * _norm_of_product(gram, in_h)
            )
    return norms


@torch.no_grad()
def response_loss(model: Any, batch: dict[str, Tensor]) -> tuple[float, int]:
    """Summed cross-entropy of the labelled tokens, and their number."""
    logits, labels = _logits_at(model, batch, _inputs(model, batch))
    log_probs = torch.log_softmax(logits.float(), -1)
    picked = log_probs.gather(1, labels[:, None])
    return -float(picked.double().sum()), len(labels)


def total_norm(norms: dict[str, LayerNorms]) -> LayerNorms:
    """Root of the summed squares over layers."""
    return LayerNorms(
        sum(n.frobenius**2 for n in norms.values()) ** 0.5,
        sum(n.h_norm**2 for n in norms.values()) ** 0.5,
    )


@torch.no_grad()
def _divergence(model: PeftModel, batch: dict[str, Tensor]) -> tuple[float, float, int]:
    """Summed KL(base || adapted), summed change in cross-entropy, and the number of tokens."""
    inputs = _inputs(model, batch)
    adapted, labels = _logits_at(model, batch, inputs)
    with model.disable_adapter():
        base, _ = _logits_at(model, batch, inputs)
    kl = change = 0.0
    for start in range(0, len(labels), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        p = torch.log_softmax(base[rows].float(), -1)
        q = torch.log_softmax(adapted[rows].float(), -1)
        kl += float((p.exp() * (p - q)).sum(-1).double().sum())
        change += float((p - q).gather(1, labels[rows, None]).double().sum())
    return kl, change, len(labels)


def _inputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.to(model.device) for k, v in batch.items() if k != "labels"}


def _logits_at(
    model: Any, batch: dict[str, Tensor], inputs: dict[str, Tensor]
) -> tuple[Float[Tensor, "n vocab"], Tensor]:
    """Logits that predict a labelled token, and those labels, flattened over the batch."""
    labels = batch["labels"][:, 1:].to(model.device)
    wanted = labels != IGNORE
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return logits[wanted], labels[wanted]


def _norm_of_product(gram: Tensor, a: Tensor) -> float:
    """||B A||_F from B'B (k, k) and A (k, d)."""
    return max(float((gram * (a @ a.T)).sum()), 0.0) ** 0.5
