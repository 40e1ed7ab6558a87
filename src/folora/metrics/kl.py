"""KL divergence between the next-token distributions of an adapted model and its base.

The meter reports it on self-samples; the KL penalties of the trainer add it to the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from folora.data.contents import IGNORE
from folora.runtime.shapes import Float, Int


def labelled_logits(
    model: Any, batch: dict[str, Tensor]
) -> tuple[Float[Tensor, "n vocab"], Int[Tensor, " n"]]:
    """Logits at the positions that predict a labelled token, and the labels, flattened over the batch.

    Args:
        model: A causal LM.
        batch: Model inputs, and ``labels`` (b, t) with -100 at ignored positions.
    """
    inputs = {k: v.to(model.device) for k, v in batch.items() if k not in ("labels", "use_cache")}
    labels = batch["labels"][:, 1:].to(model.device)
    wanted = labels != IGNORE
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return logits[wanted], labels[wanted]


def kl(base: Float[Tensor, "n vocab"], adapted: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """KL(base || adapted) at each position, in nats; computed in float32."""
    p, q = torch.log_softmax(base.float(), -1), torch.log_softmax(adapted.float(), -1)
    return (p.exp() * (p - q)).sum(-1)


def masked_target_kl(
    base: Float[Tensor, "n vocab"],
    adapted: Float[Tensor, "n vocab"],
    targets: Int[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """KL(base || adapted) with the target token masked in both (arXiv:2605.29498).

    The other probabilities are renormalized: learning the target is not penalized, changes of the
    base's preferences among all other tokens are.
    """
    target = torch.nn.functional.one_hot(targets, base.shape[-1]).bool()
    lowest = torch.finfo(torch.float32).min  # not -inf: 0 * inf would be NaN
    return kl(base.float().masked_fill(target, lowest), adapted.float().masked_fill(target, lowest))
