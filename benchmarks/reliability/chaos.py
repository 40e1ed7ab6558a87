"""Disturb runs as machines do, and count what was lost: ``python -m benchmarks.reliability.chaos``.

Disturbances, each at times drawn from a seed:

- *kill*: SIGKILL in every stage of the same run, before a write of the stage or at a random time.
- *signal*: Ctrl-C or SIGTERM in every stage; the time until exit is measured.
- *full disk*: no file can grow beyond a limit.
- *gone*: the output folder is removed during the run.
- *two*: a second process is started in the same folder.
- *damage*: a file of a run is truncated, changed by a bit or removed.

The command is then rerun. Lost: files that differ by a byte from an undisturbed run, and finished work that
was repeated.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.forks import PATIENCE, Fork
from benchmarks.reliability.stand import FOLDERS, STAGES, Stand, on_write, stage_of
from benchmarks.tiny import make_llama
from folora.pipeline.training import REPORT
from folora.runtime.artifacts import software_versions
from folora.runtime.progress import progress
from folora.runtime.storage import write_json

STARTING = 0.02  # seconds, after which a process has its signal handlers
RESUME_HINT = "rerun the command"
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


@dataclass
class Trial:
    """One run and its disturbances.

    Attributes:
        kind: Disturbance.
        number: Its number, which with the seed gives every moment again.
        hits: Disturbances that came through, by stage.
        codes: Exit codes by how often.
        lost: Differences to the undisturbed run, and other breaches of a promise.
        slowest: Longest seconds from a signal to the end.
    """

    kind: str
    number: int
    hits: dict[str, int] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def hit(self, stage: str, code: int) -> None:
        """Count a disturbance and how the attempt ended."""
        self.hits[stage] = self.hits.get(stage, 0) + 1
        self.codes[code] = self.codes.get(code, 0) + 1


def at_write(stand: Stand, stage: str, count: int, act: Callable[[], None]) -> Callable[[], None]:
    """What an attempt prepares, so that `act` comes before its write number `count` in a stage.

    With fewer writes left in the stage it comes before the first of a later stage.
    """
    later = {*list(STAGES)[list(STAGES).index(stage) + 1 :]}
    seen = 0

    def tell(path: str) -> None:
        nonlocal seen
        seen += stage_of(path) == stage
        if seen == count or stage_of(path) in later or path.lstrip(".").startswith(REPORT):
            seen = count + 1
            act()

    return lambda: on_write(stand.run, tell)


def in_stage(stand: Stand, stage: str, after: float, signum: int) -> tuple[Fork, float]:
    """An attempt that is sent a signal when it has been in a stage for `after` seconds, and when."""
    before = list(STAGES).index(stage) - 1
    marker = stand.run / (list(STAGES.values())[before] if before >= 0 else "config.yaml")
    fork = stand.attempt()
    while not (marker.exists() and fork.begun.exists()) and fork.lives():
        if time.monotonic() - fork.began > PATIENCE:
            break
        time.sleep(0.0005)
    time.sleep(STARTING + after)
    sent = time.monotonic()
    fork.send(signum)
    return fork, sent


def kill_self() -> None:
    """What SIGKILL is."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill(stand: Stand, seconds: dict[str, float], draw: random.Random, trial: Trial) -> None:
    """SIGKILL once in every stage, one after the other, and then to the end."""
    for stage in STAGES:
        before = stand.done()
        if draw.random() < 0.5:
            write = draw.randint(1, stand.writes[stage])
            ended = stand.attempt(at_write(stand, stage, write, kill_self)).ended()
        else:
            after = draw.uniform(0, seconds[stage])
            ended = in_stage(stand, stage, after, signal.SIGKILL)[0].ended()
        trial.hit(stage, ended.code)
        if ended.code not in (-signal.SIGKILL, 0):
            trial.lost.append(f"{stage}: ended with {ended.code}: {ended.said[-300:]}")
        trial.lost += [f"{stage}: made again: {p}" for p in stand.redone(before)]
    finish(stand, trial)


def interrupt(stand: Stand, seconds: dict[str, float], draw: random.Random, trial: Trial) -> None:
    """Ctrl-C or SIGTERM once in every stage; each ends soon and says how to resume."""
    for stage in STAGES:
        before = stand.done()
        number = draw.choice((signal.SIGINT, signal.SIGTERM))
        after = draw.uniform(0, seconds[stage])
        fork, sent = in_stage(stand, stage, after, number)
        ended = fork.ended()
        trial.hit(stage, ended.code)
        trial.slowest = max(trial.slowest, fork.began + ended.seconds - sent)
        if ended.code not in (*STOPPED, 0) or "Traceback" in ended.said:
            trial.lost.append(f"{stage}: ended with {ended.code}: {ended.said[-300:]}")
        elif ended.code and RESUME_HINT not in " ".join(ended.said.split()):
            trial.lost.append(f"{stage}: did not say how to resume: {ended.said[-300:]}")
        trial.lost += [f"{stage}: made again: {p}" for p in stand.redone(before)]
    finish(stand, trial)


def full_disk(stand: Stand, seconds: dict[str, float], draw: random.Random, trial: Trial) -> None:
    """Files of at most so many bytes; what stderr says goes to a file as well, and needs some."""
    size = round(10 ** draw.uniform(3.5, 5.5))

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    ended = stand.attempt(prepare).ended()
    trial.hit(_stage_of(stand), ended.code)
    if not ended.plain or (ended.code == 2 and "cannot write" not in ended.said):
        trial.lost.append(f"{size} bytes: ended with {ended.code}: {ended.said[-300:]}")
    finish(stand, trial)


def gone(stand: Stand, seconds: dict[str, float], draw: random.Random, trial: Trial) -> None:
    """The output folder vanishes before some write; what is there at the end is whole or refused."""
    stage = draw.choice(list(STAGES))

    def remove() -> None:
        shutil.rmtree(stand.run, ignore_errors=True)

    ended = stand.attempt(
        at_write(stand, stage, draw.randint(1, stand.writes[stage]), remove)
    ).ended()
    trial.hit(stage, ended.code)
    if not ended.plain:
        trial.lost.append(f"{stage}: ended with {ended.code}: {ended.said[-300:]}")
    finish(stand, trial)


def two(stand: Stand, seconds: dict[str, float], draw: random.Random, trial: Trial) -> None:
    """A second process begins while the first one works; one of the two may be refused."""
    forks = [stand.attempt()]
    time.sleep(draw.uniform(0, sum(seconds.values())))
    forks.append(Fork(forks[0].words, stand.place, "second"))
    ended = [fork.ended() for fork in forks]
    for which, one in zip(("first", "second"), ended, strict=True):
        trial.hit(which, one.code)
    codes = [one.code for one in ended]
    if 0 not in codes or not set(codes) <= {0, 2}:
        trial.lost.append(f"ended with {codes}: {ended[1].said[-300:]}")
    finish(stand, trial)


def damage(stand: Stand, seconds: dict[str, float], draw: random.Random, trial: Trial) -> None:
    """Some file of a finished run, or of one that was stopped, is not what it was."""
    stand.afresh(finished=True)
    stage = draw.choice([*STAGES, "finished"])
    for name in list(STAGES)[list(STAGES).index(stage) :] if stage != "finished" else []:
        part = stand.run / (RESULTS[name])
        shutil.rmtree(part)
    files = sorted(n for n in stand.contents() if (stand.run / n).stat().st_size)
    name = draw.choice(files)
    file = stand.run / name
    content = bytearray(file.read_bytes())
    how = draw.choice(("bit", "cut", "gone"))
    if how == "bit":
        bit = draw.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(content if how == "bit" else content[: draw.randrange(len(content))])
    ended = stand.attempt().ended()
    trial.hit(stage, ended.code)
    said = " ".join(ended.said.split())
    if not ended.plain or (ended.code == 2 and Path(name).name not in said):
        trial.lost.append(f"{name} {how}: ended with {ended.code}: {ended.said[-300:]}")
    if ended.code == 0:  # it was not needed, or was seen and made again
        trial.lost += [f"{name} {how}: differs: {n}" for n in stand.lost(but=name)]
        return
    shutil.copy(stand.whole / name, file)
    finish(stand, trial)


RESULTS = {**STAGES, "measure": FOLDERS["measure"], "export": FOLDERS["export"]}
"""What is removed of a finished run so that it looks as if it had been stopped before a stage."""

KINDS: dict[str, Callable[[Stand, dict[str, float], random.Random, Trial], None]] = {
    "kill": kill,
    "signal": interrupt,
    "full disk": full_disk,
    "gone": gone,
    "two": two,
    "damage": damage,
}


def finish(stand: Stand, trial: Trial) -> None:
    """The same command once more, undisturbed."""
    ended = stand.attempt().ended()
    if ended.code != 0:
        trial.lost.append(f"does not go on: {ended.code}: {ended.said[-500:]}")
    else:
        trial.lost += [f"differs: {name}" for name in stand.lost()]


def _stage_of(stand: Stand) -> str:
    """The stage that was not finished."""
    there = ((name, (stand.run / part).exists()) for name, part in STAGES.items())
    return next((name for name, exists in there if not exists), "nowhere")


def disturb(
    place: Path, seed: int, counts: dict[str, int], changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """All trials.

    Args:
        place: An empty folder.
        seed: Of every moment and every choice.
        counts: Trials by kind.
        changes: Of the tiny run's config.

    Returns:
        JSON: one entry a trial, what two undisturbed runs do not share, and seconds by stage.
    """
    stand = Stand(place, changes or {})
    seconds = stand.reference()
    began = time.monotonic()
    trials = []
    with progress("trials", sum(counts.values())) as tick:
        for kind, count in counts.items():
            for number in range(count):
                stand.afresh()
                trial = Trial(kind, number)
                KINDS[kind](stand, seconds, random.Random(f"{seed} {kind} {number}"), trial)
                trials.append(trial)
                for line in trial.lost:
                    print(f"{kind} {number}: {line}", flush=True)
                tick()
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "stages": {name: round(s, 3) for name, s in seconds.items()},
        "writes": stand.writes,
        "varying": sorted(stand.varying),
        "trials": [asdict(trial) for trial in trials],
        "versions": software_versions(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if anything was lost."""
    known = argparse.ArgumentParser(prog="benchmarks.reliability.chaos", description=__doc__)
    known.add_argument("--seed", type=int, default=0)
    known.add_argument("--count", type=int, default=50, help="trials of each kind [%(default)s]")
    known.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    known.add_argument("--output", type=Path, help="JSON file")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = known.parse_args(given)
    torch.set_num_threads(1)  # a fork inherits no threads
    make_llama()  # loads what forks would each load
    with tempfile.TemporaryDirectory() as place:
        found = disturb(Path(place), options.seed, dict.fromkeys(options.kinds, options.count))
    lost = sum(len(trial["lost"]) for trial in found["trials"])
    print(f"{len(found['trials'])} runs disturbed in {found['seconds']:.0f} s; lost: {lost}")
    if options.output:
        command = " ".join(["python -m benchmarks.reliability.chaos", *given])
        write_json(options.output, {"command": command, **found})
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
