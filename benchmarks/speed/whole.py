"""The set-up as a whole, beside an epoch of training: ``python -m benchmarks.speed.whole``.

A real model and real rows, since random weights say nothing about how much text suffices. Stages are
those of a run with the defaults, in memory. The next task on the same model needs its C_task and the
eigenproblems only, besides reading a base file.
"""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from benchmarks.models import MODELS
from benchmarks.real.targets import TARGETS, target_rows
from benchmarks.speed.__main__ import machine
from folora.config import FoLoraConfig, SamplingConfig
from folora.pipeline.context import Context
from folora.pipeline.stages import Solved, TaskMoments, share
from folora.pipeline.store import Memory, Stage, StageResult
from folora.runtime.artifacts import software_versions
from folora.runtime.storage import write_json
from folora.training.arguments import sft_config
from folora.training.prepared import assemble
from folora.training.trainer import FoLoraTrainer

FORMAT = "setup/1"
T = TypeVar("T")


class Timed(Memory):
    """A store in memory that keeps the seconds of every stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def make(self, stage: Stage[T]) -> StageResult[T]:
        """Compute a stage."""
        began = _now()
        result = super().make(stage)
        self.seconds[type(stage).__name__] = _now() - began
        return result


def measure(context: Context, steps: int | None) -> dict[str, Any]:
    """Seconds of each stage and of an epoch, of which `steps` steps are trained (default: all)."""
    _ = context.model, context.task, context.groups  # loading is not part of the set-up
    store = Timed()
    shared = share(context, store)
    spectrum = store.make(Solved(context, shared.keep, shared.task)).load()
    prepared = assemble(
        context.model, spectrum, context.task, shared.samples.load(), context.config
    )
    batch = context.config.training.per_device_train_batch_size
    epoch = math.ceil(len(context.task.train) / batch)
    trained = min(steps or epoch, epoch)
    with TemporaryDirectory() as folder:
        changes = {"training.max_steps": trained, "training.save_strategy": "no"}
        on_cpu = context.model.device.type == "cpu"
        config = context.config.changed(changes)
        asked = sft_config(config, Path(folder), evaluates=False, on_cpu=on_cpu)
        trainer = FoLoraTrainer(prepared, asked, context.tokenizer)
        began = _now()
        trainer.train()
        training = (_now() - began) / trained * epoch
    following = store.seconds[TaskMoments.__name__] + store.seconds[Solved.__name__]
    return {
        "seconds": store.seconds,
        "sequences": len(shared.samples.load().calibration),
        "epoch_steps": epoch,
        "trained_steps": trained,
        "epoch_seconds": training,
        "first_share": sum(store.seconds.values()) / training,
        "next_share": following / training,
    }


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    found = argparse.ArgumentParser(description="Measure the set-up beside an epoch of training.")
    found.add_argument("--model", choices=MODELS, default="smollm2")
    found.add_argument("--target", choices=TARGETS, default="mawps")
    found.add_argument("--models", type=Path, default=Path("models"))
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--steps", type=int, help="of the epoch, for its time; default: all")
    found.add_argument("--output", type=Path, default=Path("benchmarks/results/speed"))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = options.output / f"setup-{options.device}-{options.model}-{options.target}.json"
    if not path.exists():
        config = FoLoraConfig(
            model=str(MODELS[options.model](options.models)), device=options.device,
            sampling=SamplingConfig(sources={"bos": 1.0}),  # as the results so far
        )  # fmt: skip
        context = Context(config, dataset=target_rows(options.target))
        found = measure(context, options.steps)
        write_json(
            path,
            {
                "format": FORMAT,
                "command": f"python -m benchmarks.speed.whole {shlex.join(given)}".strip(),
                "machine": machine(context.model.device),
                "versions": software_versions(),
                "model": options.model,
                "target": options.target,
                "dtype": str(context.model.dtype).removeprefix("torch."),
                **found,
            },
        )
    print(path)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
