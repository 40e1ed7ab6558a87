"""Training steps by mode, beside plain LoRA with torch's fused AdamW, all in the same minutes.

Every mode has its own model with the same random weights. In each round every mode takes one step, in
shuffled order, so that other load on the machine affects all modes alike.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.speed.shapes import VOCABULARY, Shape, random_bases, random_groups, random_model
from folora.adapters.adapter import attach
from folora.adapters.constraint import project_after_step
from folora.adapters.low_rank import narrow_inputs
from folora.optim.fused import FusedSAdam
from folora.training.anchor import Anchor
from folora.training.optimizer import param_groups


@dataclass(frozen=True)
class Mode:
    """A row of the table.

    Attributes:
        about: Its name in the table.
        start: As in `attach`.
        columns: Columns of the bases: ``"r"`` for the rank, or all.
        plain: Stepped by ``torch.optim.AdamW(fused=True)``.
        peft: The adapter is PEFT's own, not that of `attach`.
        protect: OPLoRA's k is r.
        anchor: Share of the step's tokens on which KL to the base is added to the loss.
    """

    about: str
    start: str = "eigen"
    columns: str = "r"
    plain: bool = False
    peft: bool = False
    protect: bool = False
    anchor: float = 0.0


MODES = {
    "lora": Mode("PEFT's LoRA, fused AdamW", "kaiming", plain=True, peft=True),
    "folora": Mode("folora, r eigenvectors"),
    "folora-anchor": Mode("folora, r eigenvectors, anchor on 8 % of the tokens", anchor=0.08),
    "folora-4r": Mode("folora, 4 r eigenvectors", columns="4r"),
    "folora-all": Mode("folora, all eigenvectors", columns="all"),
    "folora-null": Mode("folora, all eigenvectors, null-space initialization", "null_space", "all"),
    "oplora": Mode("OPLoRA, fused AdamW", "kaiming", plain=True, protect=True),
}
BASELINE = "lora"
TEXT = 192  # tokens of a calibration text


class Contender:
    """One mode's model and optimizer, and the times of its steps.

    Args:
        mode: One of `MODES`.
        shape: See `SHAPES`.
        blocks: Of the model.
        dtype: Of the base.
        device: Where.
    """

    def __init__(
        self, mode: Mode, shape: Shape, blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.device = device
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []
        model = random_model(shape, blocks, dtype, device)
        groups = random_groups(model)
        columns = {"r": shape.r, "4r": 4 * shape.r, "all": None}[mode.columns]
        bases = random_bases(groups, shape.r, columns, device)
        protect = shape.r if mode.protect else 0
        self.model: PeftModel
        if mode.peft:
            names = [name for group in groups for name in group.layers]
            config = LoraConfig(r=shape.r, lora_alpha=shape.r, target_modules=names)
            self.model = get_peft_model(model, config)  # type: ignore[assignment]
        else:
            config = LoraConfig(r=shape.r, lora_alpha=shape.r)
            self.model = attach(model, bases, config, init=mode.start, protect=protect)
        self.model.train()
        self._as_in_training = ExitStack()
        self._as_in_training.enter_context(narrow_inputs(self.model))
        found = param_groups(
            self.model, bases, lr=1e-3, directions=columns, spectral=not mode.plain
        )
        self.optimizer: Optimizer
        if mode.plain:
            self.optimizer = AdamW([p for g in found for p in g["params"]], lr=1e-3, fused=True)
        else:
            self.optimizer = FusedSAdam(found)
        project_after_step(self.optimizer, self.model)
        self.anchor_share = mode.anchor
        self.anchor: Anchor | None = None
        self.basis_bytes = sum(_basis_bytes(g) for g in found)

    def step(self, ids: Tensor) -> None:
        """Take one step and record its times; the first prepares the anchor, if there is one."""
        if self.anchor_share and self.anchor is None:
            tokens = round(self.anchor_share / (1 - self.anchor_share) * ids.numel())
            texts = random_batch(64 * TEXT, TEXT, torch.device("cpu")).tolist()
            self.anchor = Anchor(self.model, texts, tokens=tokens, weight=1.0)
        began = self._now()
        self.optimizer.zero_grad()
        loss = self.model(input_ids=ids, labels=ids).loss
        if self.anchor is not None:
            loss = loss + self.anchor.loss()
        loss.backward()
        before = self._now()
        self.optimizer.step()
        ended = self._now()
        self.step_seconds.append(ended - began)
        self.optimizer_seconds.append(ended - before)

    def peak_bytes(self, ids: Tensor) -> int:
        """Largest number of bytes of tensors alive on the device at once, in a step after the first."""
        self.step(ids)
        self.optimizer.zero_grad()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step(ids)
            return torch.cuda.max_memory_allocated(self.device)
        return self._standing_bytes() + peak_of(lambda: self.step(ids))

    def _standing_bytes(self) -> int:
        held = [*self.model.parameters(), *self.model.buffers()]
        held += [v for state in self.optimizer.state.values() for v in state.values()]
        for group in self.optimizer.param_groups:
            held += [v for v in group.values() if isinstance(v, Tensor)]
        stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        return sum(stores.values())

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def race(
    contenders: Iterable[Contender], ids: Tensor, rounds: int, tick: Callable[[], None]
) -> None:
    """One step of every contender per round, in shuffled order; the first round is not counted."""
    order, shuffle = list(contenders), random.Random(0)
    for number in range(rounds + 1):
        shuffle.shuffle(order)
        for contender in order:
            contender.step(ids)
        if number == 0:
            for contender in order:
                contender.step_seconds.clear()
                contender.optimizer_seconds.clear()
        tick()


def random_batch(tokens: int, length: int, device: torch.device) -> Tensor:
    """Rows of `length` random tokens, `tokens` in all."""
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, tokens // length), min(tokens, length))
    return torch.randint(3, VOCABULARY, shape, generator=generator).to(device)


def _basis_bytes(group: dict[str, Any]) -> int:
    return group["basis"].nbytes if "basis" in group else 0


def peak_of(work: Callable[[], None]) -> int:
    """Largest number of bytes that `work` had allocated on the CPU at once, from the profiler."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak
