"""Thousands of steps on a tiny model: does anything grow, and is going on the same as going through?

``python -m benchmarks.reliability.soak``. One training goes through without a stop, with memory, file
handles, threads and hooks read on the way. Another is stopped every 50 steps, and gone on with by a
trainer, an optimizer and a model made anew from what lies on disk. Both must end with the same bits.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState

import folora
from benchmarks.tiny import make_llama, make_tokenizer, rows, tiny_config
from folora.adapters.adapter import lora_factors
from folora.optim.sadam import FINGERPRINT
from folora.runtime.artifacts import software_versions
from folora.runtime.checkpoints import latest_checkpoint
from folora.runtime.progress import progress
from folora.runtime.storage import write_json
from folora.training.callbacks import AfterStep
from folora.training.prepared import Prepared, assemble
from folora.training.train import train

EVERY = 50  # steps
MOST_GROWTH = 8e6  # bytes of memory that allocators may keep between two thirds of a run
COUNTED = ("handles", "threads", "hooks")
# glibc keeps what is freed, and what leaks would take its place unseen.
give_back = getattr(ctypes.CDLL(None), "malloc_trim", lambda kept: 0)


def standing(model: torch.nn.Module) -> dict[str, int]:
    """What a process holds: bytes of memory, open files, threads, and hooks on a model."""
    gc.collect()
    give_back(0)
    process = psutil.Process()
    hooks = (len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return {
        "memory": process.memory_info().rss,
        "handles": process.num_fds(),
        "threads": process.num_threads(),
        "hooks": sum(hooks),
    }


def state_of(prepared: Prepared) -> dict[str, Tensor]:
    """All that training changes, and what it must not change: factors, moments, sketches of bases."""
    found = {
        f"{name}/{which}": t.detach().clone()
        for name, (a, b, _) in lora_factors(prepared.model).items()
        for which, t in (("A", a), ("B", b))
    }
    state = prepared.optimizer.state_dict()
    for index, group in enumerate(state["param_groups"]):
        if FINGERPRINT in group:
            found[f"basis {index}"] = group[FINGERPRINT]
    for index, moments in state["state"].items():
        found |= {f"{name} {index}": torch.as_tensor(t).clone() for name, t in moments.items()}
    return found


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of what is not equal to the bit."""
    return sorted(
        n for n in a.keys() | b.keys() if n not in a or n not in b or not torch.equal(a[n], b[n])
    )


def growth(values: Sequence[float]) -> float:
    """Median of the last third less that of the second: what comes first is warming up."""
    third = len(values) // 3
    return median(values[-third:]) - median(values[third : 2 * third])


def soak(
    place: Path,
    steps: int,
    every: int = EVERY,
    disturb: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Both trainings.

    Args:
        place: An empty folder.
        steps: How many; a multiple of `every`.
        every: After how many readings are taken, and the second training is stopped.
        disturb: Called along the way of the first one; tests plant a leak by it.

    Returns:
        JSON: readings, what grew, and what differs.
    """
    config = tiny_config(
        training={
            "max_steps": steps, "save_steps": every, "logging_steps": 10 * every, "eval_steps": 5 * every,
        }
    )  # fmt: skip
    tokenizer = make_tokenizer()
    first = folora.prepare(make_llama(), tokenizer, rows(), config)
    readings: list[dict[str, int]] = []
    began = time.monotonic()

    def again() -> Prepared:
        return assemble(make_llama(), first.bases, first.task, first.samples, config)

    with progress("steps", 2 * steps) as tick:

        def read(state: TrainerState, control: TrainerControl) -> None:
            if state.global_step % every == 0:
                disturb(state.global_step)
                readings.append({"step": state.global_step, **standing(first.model)})
                tick(every)

        train(first, tokenizer, place / "through", callbacks=[AfterStep(read)])
        through = time.monotonic() - began
        expected = state_of(first)
        changed: list[str] = []
        stops = 0
        state: dict[str, Tensor] = {}

        def stop(state: TrainerState, control: TrainerControl) -> None:
            if state.global_step % every == 0:
                control.should_save = control.should_training_stop = True

        for step in range(every, steps + 1, every):
            part = again()
            sketches = {n: t for n, t in state_of(part).items() if n.startswith("basis")}
            found = train(part, tokenizer, place / "stopped", callbacks=[AfterStep(stop)])
            assert found.state.global_step == step
            state = state_of(part)
            changed += differing(
                sketches, {n: t for n, t in state.items() if n.startswith("basis")}
            )
            stops += 1
            tick(every)
    return {
        "steps": steps,
        "stops": stops,
        "seconds": [round(through, 1), round(time.monotonic() - began - through, 1)],
        "readings": readings,
        "memory_growth": growth([r["memory"] for r in readings]),
        "counted_growth": {n: readings[-1][n] - readings[len(readings) // 3][n] for n in COUNTED},
        "compared": len(expected),
        "differing": differing(expected, state),
        "changed_bases": sorted(set(changed)),
        "checkpoints_left": len(list((place / "through").glob("checkpoint-*"))),
        "latest": str(latest_checkpoint(place / "through")).rpartition("-")[2],
        "versions": software_versions(),
    }


def breaches(found: dict[str, Any]) -> list[str]:
    """What is not as promised, in words."""
    said = [f"{n} differs after {found['stops']} stops" for n in found["differing"]]
    said += [f"{n} changed by save and load" for n in found["changed_bases"]]
    if found["memory_growth"] > MOST_GROWTH:
        said.append(f"memory grew by {found['memory_growth'] / 1e6:.1f} MB")
    said += [f"{n} grew by {by}" for n, by in found["counted_growth"].items() if by > 0]
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a promise was broken."""
    known = argparse.ArgumentParser(prog="benchmarks.reliability.soak", description=__doc__)
    known.add_argument(
        "--steps", type=int, default=3000, help=f"a multiple of {EVERY} [%(default)s]"
    )
    known.add_argument("--output", type=Path, help="JSON file")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = known.parse_args(given)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, at every stop
    with (
        tempfile.TemporaryDirectory() as place,
        redirect_stdout(io.StringIO()),
    ):  # the Trainer's log
        found = soak(Path(place), options.steps)
    said = breaches(found)
    print(
        "\n".join(said)
        or f"{found['steps']} steps, {found['stops']} stops: nothing grew, nothing differs"
    )
    if options.output:
        command = " ".join(["python -m benchmarks.reliability.soak", *given])
        write_json(options.output, {"command": command, **found})
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())
