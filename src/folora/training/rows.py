"""What the trainer does to a batch of task rows: masked labels, and KL to the base beside the loss."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from folora.data.contents import IGNORE
from folora.metrics.kl import labelled_logits, likely_labels, masked_target_kl
from folora.runtime.contexts import evaluating, without_adapter

Batch = dict[str, Any]


def first_rows(batch: Batch, real: int) -> Batch:
    """The batch with the labels of all but its first `real` rows masked."""
    labels = batch["labels"].clone()
    labels[max(0, real) :] = IGNORE
    return {**batch, "labels": labels}


def without_unlikely(model: PeftModel, batch: Batch, perplexity: float) -> Batch:
    """The batch with labels masked whose perplexity under the base is above a limit; see `likely_labels`."""
    with evaluating(model), without_adapter(model):
        return {**batch, "labels": likely_labels(model, batch, perplexity)}


def masked_kl(model: Any, peft_model: PeftModel, batch: Batch) -> Tensor | None:
    """`masked_target_kl` on a batch, mean over its labels, (); None if all labels are masked.

    Args:
        model: The model as the Trainer calls it (wrapped by DDP, ...).
        peft_model: The same, not wrapped.
        batch: Model inputs and ``labels``.
    """
    adapted, targets = labelled_logits(model, batch)
    with torch.no_grad(), without_adapter(peft_model):
        base, _ = labelled_logits(model, batch)
    return masked_target_kl(base, adapted, targets).mean() if len(targets) else None
