"""A tiny run by several processes, in every way they can train together, and how two runs differ."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]
from transformers import Trainer

from benchmarks.distributed.meeting import MeetingPoint
from benchmarks.forks import Ended, Fork
from benchmarks.tiny import rows, tiny_config, write_model
from folora.pipeline.stages import KeepMoments, Samples, Solved, TaskMoments
from folora.pipeline.training import Training
from folora.runtime.artifacts import TENSORS

ROWS_A_STEP = 12  # by 1, 2, 3, 4 or 6 processes
STEPS = 6
ROUNDING = {
    Samples.path: 0.0,
    KeepMoments.path: 1e-5,
    TaskMoments.path: 1e-5,
    Solved.path: 1e-3,
    Training.path: 1e-3,
}
"""Largest difference that is allowed, over the largest value of a tensor."""


def as_it_is(rank: int) -> None:
    """Nothing is to be prepared in a process."""


def by_fsdp2(rank: int) -> None:
    """Have a process train by FSDP2, with the settings of ``accelerate launch --use_fsdp``.

    Accelerate takes FSDP on accelerators alone, although torch has it for the CPU; here it is told to.
    """
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }  # fmt: skip
    if "RANK" not in os.environ:  # FSDP wants to be one of several also alone
        alone = HashStore()
        torch.distributed.init_process_group("gloo", store=alone, rank=0, world_size=1)
    trainers: Any = Trainer
    create = trainers.create_accelerator_and_postprocess

    def on_the_cpu(trainer: Any) -> None:
        create(trainer)
        state = trainer.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if state.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
        trainer.is_fsdp_enabled = True

    trainers.create_accelerator_and_postprocess = on_the_cpu


WAYS: dict[str, tuple[Callable[[int], None], dict[str, Any]]] = {
    "DDP": (as_it_is, {}),
    "FSDP2": (by_fsdp2, {}),
    "--shard": (as_it_is, {"shard": True}),
}
"""How processes train together: what is prepared in each, and what is changed in the config."""


class Bench:
    """A tiny model and rows, and runs of them by several processes.

    Args:
        place: An empty folder.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.model = write_model(place / "model")
        self.rows = place / "rows.jsonl"
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows()))

    def words(self, name: str, count: int, **changes: Any) -> list[str]:
        """The command line of a run by so many processes."""
        training = {
            "per_device_train_batch_size": ROWS_A_STEP // count,
            "max_steps": STEPS,
            "save_steps": 2,
        }
        config = tiny_config(
            model=str(self.model), dataset=str(self.rows), output=str(self.place / name),
            training=training,
        ).changed(changes)  # fmt: skip
        file = self.place / f"{name}-{count}.yaml"
        file.write_text(config.to_yaml())
        return ["run", "--config", str(file)]

    def start(
        self,
        name: str,
        count: int,
        more: Mapping[int, Sequence[str]] | None = None,
        prepare: Callable[[int], None] = as_it_is,
        **changes: Any,
    ) -> list[Fork]:
        """Start the processes of a run.

        Args:
            name: Of its folder.
            count: How many.
            more: Words that some of them get besides.
            prepare: Called in each with its rank.
            changes: Of the config.
        """
        # Released when the processes have ended: the next fork must not inherit the lock of its thread.
        point = MeetingPoint()

        def begin(rank: int) -> Callable[[], None]:
            def set_up() -> None:
                if count > 1:
                    os.environ |= point.place_among(rank, count)
                prepare(rank)

            return set_up

        words = self.words(name, count, **changes)
        forks = [
            Fork([*words, *(more or {}).get(r, ())], self.place, f"{name}-{r}", begin(r), point)
            for r in range(count)
        ]
        point.open()
        return forks

    def tensors(self, name: str, part: str) -> dict[str, Tensor]:
        """What a part of a run holds."""
        return load_file(self.place / name / part / TENSORS)

    def difference(self, one: str, other: str, part: str) -> float:
        """Largest difference of two runs in a part, over the largest value of its tensor."""
        a, b = self.tensors(one, part), self.tensors(other, part)
        if a.keys() != b.keys():
            return float("inf")
        return max(_difference(a[name], b[name]) for name in a)

    def compared(self, name: str, count: int, exact: bool, way: str = "DDP") -> dict[str, float]:
        """How far the weights are from those of a run that was not disturbed.

        Args:
            name: The run.
            count: How many processes it ended with.
            exact: Whether it always had so many: then not a bit may differ.
            way: One of `WAYS`.
        """
        other = self.undisturbed(count, way) if exact else self.undisturbed(1)
        allowed = 0.0 if exact else ROUNDING[Training.path]
        return {"difference": self.difference(other, name, Training.path), "allowed": allowed}

    def undisturbed(self, count: int, way: str = "DDP") -> str:
        """The run of so many processes that nothing disturbs, made when it is first asked for."""
        name = f"{way}-{count}"
        if not (self.place / name / Training.path).exists():
            prepare, changes = WAYS[way]
            forks = self.start(name, count, prepare=prepare, **changes)
            if any(codes := [e.code for e in ended(forks)]):
                raise RuntimeError(f"{count} processes ended with {codes}")
        return name


def ended(forks: Sequence[Fork]) -> list[Ended]:
    """All of them, by rank."""
    return [fork.ended() for fork in forks]


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    scale = a.double().abs().max().clamp(min=1e-30)
    return float((a.double() - b.double()).abs().max() / scale)
