"""What must hold for several processes: equal results, one killed, all interrupted, unequal inputs."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.distributed.runs import ROUNDING, WAYS, Bench, ended
from benchmarks.forks import PATIENCE, Fork
from benchmarks.tiny import make_llama, make_tokenizer, write_model
from folora.calibration.calibration_set import CalibrationSet
from folora.pipeline.stages import Samples
from folora.pipeline.training import Training
from folora.runtime.checkpoints import latest_checkpoint

MIXED = [16, 12, 12]
"""Sequences of each source of `mixed`, of 40."""


def same_as_one(bench: Bench, counts: Sequence[int]) -> dict[str, dict[str, float]]:
    """Largest differences from the run of one process, by number of processes and part."""
    one = bench.undisturbed(1)
    return {
        str(n): {part: bench.difference(one, bench.undisturbed(n), part) for part in ROUNDING}
        for n in counts
    }


def mixed(bench: Bench, counts: Sequence[int]) -> dict[str, dict[str, Any]]:
    """A mixture of sources by several processes: how samples differ from one's, and the number of each source."""
    place = bench.place / "chat"
    make_llama().save_pretrained(place)
    make_tokenizer(chat=True).save_pretrained(place)
    prompts = bench.place / "prompts.jsonl"
    # Of different lengths: with sharded weights each process takes as many steps as the others.
    rows = ({"prompt": f"{'ab' * (1 + 40 * (n % 7 == 3))}{n}"} for n in range(60))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {"bos": 0.4, "chat": 0.3, f"prompts:{prompts}": 0.3}
    changes: dict[str, Any] = {
        "model": str(place),
        "sampling.sources": sources,
        "training.max_steps": 1,
    }

    def run(name: str, count: int, **more: Any) -> str:
        if any(codes := [e.code for e in ended(bench.start(name, count, **changes, **more))]):
            raise RuntimeError(f"{name}: {count} processes ended with {codes}")
        return name

    one = run("mixed-1", 1)
    found = {}
    for way in ("DDP", "--shard"):
        for n in counts:
            name = run(f"mixed-{way}-{n}", n, **WAYS[way][1])
            samples = CalibrationSet.load(bench.place / name / Samples.path)
            found[f"{n} by {way}"] = {
                "difference": bench.difference(one, name, Samples.path),
                "sequences": [samples.sources.count(source) for source in sources],
            }
    return found


def other_ways(bench: Bench, counts: Sequence[int]) -> dict[str, dict[str, float]]:
    """Largest differences of the weights from those of as many processes by DDP, by way and their number."""
    return {
        way: {
            str(n): bench.difference(bench.undisturbed(n), bench.undisturbed(n, way), Training.path)
            for n in counts
        }
        for way in ("FSDP2", "--shard")
    }


def killed(
    bench: Bench, count: int, victim: int, then: int, way: str = "DDP", then_by: str | None = None
) -> dict[str, Any]:
    """One process is killed in training; the run goes on with `then` processes, if asked another way."""
    name = f"killed-{way}-{count}-{victim}-{then}-{then_by}"
    (wrapped, changes), (wrapped_then, changes_then) = WAYS[way], WAYS[then_by or way]

    def prepare(rank: int) -> None:
        wrapped(rank)
        slowly(rank)

    forks = bench.start(name, count, prepare=prepare, **changes)
    seconds = after_checkpoint(bench, name, forks, lambda: forks[victim].send(signal.SIGKILL))
    found = ended(forks)
    reached = latest(bench, name)
    again = ended(bench.start(name, then, prepare=wrapped_then, **changes_then))
    return {
        "processes": count,
        "way": way,
        "then_by": then_by or way,
        "victim": victim,
        "codes": [e.code for e in found],
        "seconds": round(seconds, 2),
        "says": [
            r
            for r, e in enumerate(found)
            if "lost the connection to another process" in " ".join(e.said.split())
        ],
        "checkpoint": reached,
        "then": then,
        "codes_then": [e.code for e in again],
        **bench.compared(name, then, then == count, then_by or way),
        "kept_old": (bench.place / name / "old").exists(),
    }


def interrupted(bench: Bench, count: int) -> dict[str, Any]:
    """SIGTERM to all processes in training, at slightly different times, as a scheduler sends it."""
    name = f"interrupted{count}"
    forks = bench.start(name, count, prepare=slowly)

    def act() -> None:
        for fork in forks:
            fork.send(signal.SIGTERM)
            time.sleep(0.03)

    seconds = after_checkpoint(bench, name, forks, act)
    found = ended(forks)
    again = ended(bench.start(name, count))
    return {
        "codes": [e.code for e in found],
        "seconds": round(seconds, 2),
        "codes_then": [e.code for e in again],
        **bench.compared(name, count, exact=True),
    }


def refused(bench: Bench) -> dict[str, str]:
    """What is said when process 1 sees something else, by what that is; nothing may be trained.

    Data and model have the same names in both processes, but lie in other folders.
    """
    homes = [bench.place / f"home{rank}" for rank in range(2)]
    for seed, home in enumerate(homes):
        write_model(home / "same")
        write_model(home / "model")
        make_llama(seed=seed).save_pretrained(home / "model")
        for name, sign in (("same", "="), ("rows", "=:"[seed])):
            lines = (json.dumps({"prompt": f"{n}{sign}", "completion": f"{n}."}) for n in range(40))
            (home / f"{name}.jsonl").write_text("\n".join(lines))
    said = {}
    for what, model, data, more in (
        ("data set", "same", "rows", ()),
        ("model", "model", "same", ()),
        ("set of options", "same", "same", ("--lr", "0.5")),
    ):
        changes = {"model": model, "dataset": f"{data}.jsonl"}
        name = f"other {what}"
        forks = bench.start(name, 2, {1: more}, lambda rank: os.chdir(homes[rank]), **changes)
        found = ended(forks)
        message = " ".join(found[0].said.split())
        codes, begun = [e.code for e in found], (bench.place / name).exists()
        said[what] = message if codes == [2, 2] and not begun else f"codes {codes}: {message}"
    return said


def after_checkpoint(
    bench: Bench, name: str, forks: Sequence[Fork], act: Callable[[], None]
) -> float:
    """Do something as soon as there is a checkpoint, and return the seconds until all have ended."""
    while latest(bench, name) is None and all(fork.lives() for fork in forks):
        if time.monotonic() - forks[0].began > PATIENCE:
            break
        time.sleep(0.002)
    act()
    began = time.monotonic()
    while any(fork.lives() for fork in forks) and time.monotonic() - began < PATIENCE:
        time.sleep(0.002)
    return time.monotonic() - began


def latest(bench: Bench, name: str) -> int | None:
    """The number of the latest checkpoint of a run."""
    found = latest_checkpoint(bench.place / name / "4-training")
    return None if found is None else int(found.name.rpartition("-")[2])


def slowly(rank: int) -> None:
    """Make every step take a twentieth of a second, so that a moment in it can be met."""
    loss = torch.nn.functional.cross_entropy

    def slow_loss(*args: Any, **kwargs: Any) -> Tensor:
        time.sleep(0.05)
        return loss(*args, **kwargs)

    torch.nn.functional.cross_entropy = slow_loss
