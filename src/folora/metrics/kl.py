"""KL divergence between the next-token distributions of an adapted model and its base.

The meter reports it on self-samples; the KL penalties of the trainer add it to the loss.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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


@torch.no_grad()
def likely_labels(
    model: Any, batch: dict[str, Tensor], perplexity: float
) -> Int[Tensor, "batch tokens"]:
    """The labels of a batch, -100 also at tokens whose perplexity 1/p under the model is above a limit.

    Selective token masking (arXiv:2501.14315) of a base model's own training rows.
    """
    logits, targets = labelled_logits(model, batch)
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    labels = batch["labels"].clone()
    shifted = labels[:, 1:]  # a view
    kept = targets.masked_fill(losses > math.log(perplexity), IGNORE)
    shifted[shifted != IGNORE] = kept.to(labels.device)
    return labels


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


class TopK(NamedTuple):
    """The k most likely tokens of some distributions, in natural logarithms.

    Attributes:
        ids: Tokens.
        log_p: Their log-probabilities.
    """

    ids: Int[Tensor, "n k"]
    log_p: Float[Tensor, "n k"]

    def rest(self) -> Float[Tensor, " n"]:
        """Probability of all other tokens together."""
        return (1 - self.log_p.double().exp().sum(-1)).clamp_min(0).float()


def top_k(logits: Float[Tensor, "n vocab"], k: int) -> TopK:
    """The `k` most likely tokens, or the whole vocabulary if it has no more; computed in float32."""
    log_p, ids = torch.log_softmax(logits.float(), -1).topk(min(k, logits.shape[-1]), dim=-1)
    return TopK(ids, log_p)


def top_k_kl(base: TopK, adapted: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """KL(base || adapted) in nats, where all tokens that `base` does not list count as one.

    At most `kl`, by the probability of these tokens times the KL among them, and equal to it if `base`
    lists the whole vocabulary. Computed in float32.
    """
    logits = adapted.float()
    log_z = logits.logsumexp(-1)
    log_q = logits.gather(-1, base.ids) - log_z[:, None]
    listed = (base.log_p.exp() * (base.log_p - log_q)).sum(-1)
    if base.ids.shape[-1] == logits.shape[-1]:
        return listed
    others = logits.scatter(-1, base.ids, float("-inf")).logsumexp(-1) - log_z
    rest = base.rest()
    # xlogy: 0 log 0 = 0
    return listed + torch.xlogy(rest, rest) - rest * others
