"""The anchor: KL to the base on a little calibration text, added to the loss of every batch.

The base's log-probabilities are computed once, before the first step; a step then pays for a forward and a
backward pass over the anchor's own tokens. The weight is constant, or follows a budget for the KL.

    loss = task_loss + anchor.loss(model)   # for each batch
    anchor.step(task_loss)                  # after each optimizer step; True if training may end
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from folora.data.rows import pad_batch, text_examples
from folora.errors import ConfigError
from folora.methods import KL_WEIGHT
from folora.metrics.kl import TopK, labelled_logits, top_k, top_k_kl
from folora.runtime import distributed
from folora.runtime.contexts import evaluating, without_adapter
from folora.runtime.progress import progress
from folora.training.budget_stop import BudgetStop

logger = logging.getLogger(__name__)

FEW = 10  # times of reading text that a training should have
POOL = 256  # texts in a process
WHOLE_VOCABULARY = 1024  # vocabularies up to here are stored whole
LISTED = 128  # tokens of larger ones: 1 KB a position, and some 80 % of the KL on SmolLM2


class BudgetWeight:
    """The weight of a KL term that keeps the KL within a budget: dual ascent.

    The weight is at least `KL_WEIGHT`, and rises while the KL is above the budget. The logarithm of its ratio to
    that is a proportional and integral controller's output on log(KL / budget), where the KL is a moving average.

    Args:
        budget: KL in nats per token.

    Attributes:
        state: Logarithm of the integral part over `KL_WEIGHT`, and the average KL; float64 (2,).
        stop: Whether training may end because the budget binds and nothing is gained.
    """

    TARGET = 0.9  # of the budget: the final, held-out KL is judged by the upper end of its interval
    MEMORY = 0.8  # of the moving average
    RATE = 0.1  # of the integral part, per update
    LARGEST = math.log(100.0)  # beyond it the task is hardly learned; the final scaling remains

    def __init__(self, budget: float) -> None:
        self.target = self.TARGET * budget
        self.state = torch.zeros(2, dtype=torch.float64)
        self.stop = BudgetStop()

    def __call__(self) -> Tensor:
        """The weight, a float64 scalar."""
        log_weight, average = self.state
        return KL_WEIGHT * (log_weight + self._excess(average)).clamp(0.0, self.LARGEST).exp()

    def update(self, kl: Tensor) -> None:
        """Follow a mean KL, without a synchronization with the accelerator."""
        log_weight, average = self.state.to(kl.device)
        average = self.MEMORY * average + (1 - self.MEMORY) * kl.double()
        log_weight = (log_weight + self.RATE * self._excess(average)).clamp(0.0, self.LARGEST)
        self.state = torch.stack([log_weight, average])

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"state": self.state.tolist(), "stop": self.stop.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        log_weight, average = state["state"]
        self.state = torch.tensor([log_weight, average], dtype=torch.float64)
        self.stop.load_state_dict(state["stop"])

    def _excess(self, average: Tensor) -> Tensor:
        """log(average / target) in [-1, 1]; rounding can make an average KL of 0 negative."""
        return (average.clamp_min(1e-9) / self.target).log().clamp(-1, 1)


class Anchor:
    """KL(base || adapted) on calibration text.

    Args:
        model: The PEFT model, whose base gives the distributions to keep.
        texts: Token ids of each calibration sequence, beginning with the start token.
        tokens: Tokens of the anchor for each batch of the task, on average. If they are fewer than a text has,
            not every batch has a text, and the KL of one that has counts as often.
        weight: Constant weight of the KL, or one that follows a budget.
        seed: Of the order of the texts.
        uses: Number of batches, if known: no more texts are prepared than they need.

    Raises:
        ConfigError: There are no texts.
    """

    def __init__(
        self,
        model: PeftModel,
        texts: Sequence[list[int]],
        *,
        tokens: int,
        weight: float | BudgetWeight,
        seed: int = 0,
        uses: int | None = None,
    ) -> None:
        self.model, self.weight, self.seed = model, weight, seed
        if not texts:
            raise ConfigError("the anchor needs calibration text, but there is none")
        length = sum(map(len, texts)) / len(texts)
        self.rows = max(1, round(tokens / length))
        self.every = max(1, round(length / tokens))
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        needed = POOL if uses is None else min(POOL, -(-uses // self.every) * self.rows)
        own = distributed.shard(order[: needed * distributed.world_size()])
        self.texts = [texts[i] for i in own or order]
        self.batches = 0
        logger.info(
            "anchor: %d texts of %.0f tokens in every %d batches, %.1f tokens a batch",
            self.rows, length, self.every, self.rows * length / self.every,
        )  # fmt: skip
        if uses is not None and uses // self.every < FEW:
            logger.warning(
                "the anchor reads calibration text only %d times in this training, so that it has little effect; "
                "raise anchor, or train with larger batches",
                uses // self.every,
            )
        self._base: list[TopK] | None = None
        self._step: list[Tensor] = []

    def loss(self, model: Any = None) -> Tensor:
        """The weighted KL on the next texts, float32; call it once for each batch.

        Args:
            model: The model as the training loop calls it (wrapped by DDP, ...). Default is the PEFT model.
        """
        self.batches += 1
        due, wait = divmod(
            self.batches, self.every
        )  # the first text is not for the first step: its KL is 0
        if wait:
            return torch.zeros((), device=self.model.device)
        base = self._base_distributions()
        chosen = [self._text(i) for i in range(due * self.rows, (due + 1) * self.rows)]
        batch = pad_batch(text_examples([self.texts[i] for i in chosen]), 0)
        adapted, _ = labelled_logits(self.model if model is None else model, batch)
        found = [base[i] for i in chosen]
        listed = TopK(torch.cat([f.ids for f in found]), torch.cat([f.log_p for f in found]))
        mean = top_k_kl(listed, adapted).mean()
        self._step.append(mean.detach())
        weight = self.weight if isinstance(self.weight, float) else self.weight().to(mean)
        return self.every * weight * mean

    def step(self, loss: Tensor | None = None) -> bool:
        """Adjust the weight after an optimizer step.

        Args:
            loss: The task's mean loss in this step, without the anchor's, (); needed for the early stop.

        Returns:
            Whether training may end because the budget binds and nothing is gained, see `BudgetStop`.
        """
        read, self._step = self._step, []
        if not isinstance(self.weight, BudgetWeight):
            return False
        found = [torch.stack(read).mean()] if read else []
        found += [] if loss is None else [loss.detach().to(self.model.device, torch.float32)]
        if found:
            means = distributed.all_reduce_(torch.stack(found)) / distributed.world_size()
        if read:
            self.weight.update(means[0])
        if loss is not None:
            kl, binds = self.weight.state[1].to(means), (self.weight() > KL_WEIGHT).to(means)
            self.weight.stop.update(means[-1], kl, binds)
        return self.weight.stop.reason is not None

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as JSON values."""
        weight = self.weight.state_dict() if isinstance(self.weight, BudgetWeight) else None
        return {"batches": self.batches, "weight": weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called."""
        self.batches = state["batches"]
        if isinstance(self.weight, BudgetWeight):
            self.weight.load_state_dict(state["weight"])

    @property
    def rest(self) -> float:
        """Mean probability of the tokens whose base log-probability is not stored."""
        return float(torch.cat([f.rest() for f in self._base_distributions()]).mean())

    @property
    def tokens(self) -> int:
        """Tokens of calibration text read so far."""
        read = range(self.rows, (self.batches // self.every + 1) * self.rows)
        return sum(len(self.texts[self._text(number)]) for number in read)

    def _text(self, number: int) -> int:
        """The number of a text: in each pass every text is used once, in an order of its own."""
        turn, place = divmod(number, len(self.texts))
        generator = torch.Generator().manual_seed(self.seed * 2**20 + turn)
        return int(torch.randperm(len(self.texts), generator=generator)[place])

    @torch.no_grad()
    def _base_distributions(self) -> list[TopK]:
        """The base's distributions of every text, computed when first needed: FSDP has sharded the model then."""
        if self._base is None:
            found = []
            with (
                evaluating(self.model),
                without_adapter(self.model),
                progress("anchor: base log-probabilities (texts)", len(self.texts)) as tick,
            ):
                for text in self.texts:
                    logits, _ = labelled_logits(self.model, pad_batch(text_examples([text]), 0))
                    vocabulary = logits.shape[-1]
                    k = vocabulary if vocabulary <= WHOLE_VOCABULARY else LISTED
                    found.append(top_k(logits, k))
                    tick()
            self._base = found
        return self._base
