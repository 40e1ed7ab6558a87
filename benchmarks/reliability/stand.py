"""Runs under disturbance: a tiny run that takes seconds, started in a fork, and compared file by file.

A fork of a process that has everything imported begins at once, so that hundreds of runs are affordable.
What happens inside is folora's own command line. Python tells of every file that is opened for writing,
renamed, made or removed (its audit events), which gives moments that no clock would hit.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from benchmarks.forks import Fork
from benchmarks.tiny import tiny_task
from folora.errors import ArtifactError
from folora.pipeline.stages import KeepMoments, Samples, Solved, TaskMoments
from folora.pipeline.training import ADAPTER, Training
from folora.runtime.checkpoints import SEAL
from folora.runtime.storage import LOCK, file_sha256, json_fingerprint, read_json

STAGES = {
    "sample": Samples.path,
    "measure": KeepMoments.path,
    "solve": Solved.path,
    "train": Training.path,
    "export": f"{ADAPTER}/adapter_model.safetensors",
}
"""What is there when a stage is done, in order."""
FOLDERS = {
    "sample": "1-samples",
    "measure": "2-statistics",
    "solve": Solved.path,
    "train": "4-training",
    "export": ADAPTER,
}
STEPS = 6  # of the tiny config's training
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

Event = Callable[[str], None]
"""Told the path, relative to the run, before anything is written, renamed, made or removed there."""


@dataclass
class Stand:
    """A place with a tiny model, its rows, and the run that is disturbed.

    Args:
        place: An empty folder.
        changes: Of the run's config.
    """

    place: Path
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run = self.place / "run"
        self.whole = self.place / "whole"
        self.config = self.place / "config.yaml"
        self.config.write_text(tiny_task(self.place).changed(self.changes).to_yaml())

    def attempt(self, prepare: Callable[[], None] = lambda: None) -> Fork:
        """Start the run; `prepare` is called in its process first."""
        return Fork(["run", "--config", str(self.config)], self.place, prepare=prepare)

    def reference(self) -> dict[str, float]:
        """Two runs that nothing disturbs: one to compare with, one to know what differs anyhow.

        Writes are counted by stage.

        Returns:
            Seconds that each stage took.
        """
        found = []
        noted = self.place / "writes"
        for _ in range(2):
            noted.unlink(missing_ok=True)
            shutil.rmtree(self.run, ignore_errors=True)
            ended = self.attempt(
                lambda: on_write(self.run, lambda path: _note(noted, path))
            ).ended()
            if ended.code != 0:
                raise RuntimeError(ended.said)
            found.append(self.contents())
        self.varying = {n for n in found[0] | found[1] if found[0].get(n) != found[1].get(n)}
        self.expected = found[1]
        stages = [stage_of(path) for path in noted.read_text().splitlines()]
        self.writes = {stage: stages.count(stage) for stage in STAGES}
        times = [(self.run / "config.yaml").stat().st_mtime]
        times += [(self.run / part).stat().st_mtime for part in STAGES.values()]
        shutil.rmtree(self.whole, ignore_errors=True)
        shutil.copytree(self.run, self.whole)
        return dict(zip(STAGES, (b - a for a, b in pairwise(times)), strict=True))

    def afresh(self, finished: bool = False) -> None:
        """An empty run folder, or a copy of the finished run."""
        shutil.rmtree(self.run, ignore_errors=True)
        if finished:
            shutil.copytree(self.whole, self.run)

    def contents(self) -> dict[str, str]:
        """Checksum of every file of the run, by its name; the Trainer's state without its log.

        What the Trainer logs after going on is averaged over the steps since, and TRL counts tokens
        from there.
        """
        files = (p for p in self.run.rglob("*") if p.is_file() and p.name != LOCK)
        return {p.relative_to(self.run).as_posix(): _checksum(p) for p in files}

    def lost(self, but: str = "") -> list[str]:
        """Files that differ from the run that nothing disturbed, are missing, or are left over.

        Checkpoints on the way are there for going on only: which there are depends on where it was
        stopped. Of the last one the seal is left out, since it covers the log.

        Args:
            but: A file that the attempt itself has damaged.
        """
        last = f"{FOLDERS['train']}/checkpoint-{STEPS}/"
        found = self.contents()
        return sorted(
            name
            for name in (found.keys() | self.expected.keys()) - self.varying - {but}
            if found.get(name) != self.expected.get(name)
            and ("checkpoint-" not in name or name.startswith(last))
            and not name.endswith(SEAL)
        )

    def done(self) -> dict[str, int]:
        """What is finished by now, shards and checkpoints included, with when it was written."""
        parts = [
            self.run / part
            for part in (
                Samples.path,
                KeepMoments.path,
                TaskMoments.path,
                Solved.path,
                Training.path,
            )
        ]
        parts += (self.run / FOLDERS["sample"]).glob("shard-*")
        parts += (p.parent for p in (self.run / FOLDERS["train"]).glob(f"checkpoint-*/{SEAL}"))
        return {str(p): p.stat().st_mtime_ns for p in parts if p.exists()}

    def redone(self, before: dict[str, int]) -> list[str]:
        """What of `done` was made once more; checkpoints that were rotated away do not count."""
        after = {path: Path(path).stat().st_mtime_ns for path in before if Path(path).exists()}
        return [p for p, when in before.items() if after.get(p, when) != when]


def stage_of(path: str) -> str | None:
    """The stage that writes a path of the run, temporary names included."""
    return next((s for s, f in FOLDERS.items() if path.lstrip(".").startswith(f)), None)


def on_write(folder: Path, tell: Event) -> None:
    """Have `tell` called before Python changes anything under a folder, for the rest of the process."""
    start = f"{folder}{os.sep}"
    busy = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        path = arguments[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(start):
            return
        if event == "open" and not (arguments[2] or 0) & WRITES:
            return
        busy = True
        try:
            tell(os.fspath(path)[len(start) :])
        finally:
            busy = False

    sys.addaudithook(watch)


def _note(file: Path, line: str) -> None:
    with open(file, "a") as noted:
        noted.write(f"{line}\n")


def _checksum(file: Path) -> str:
    if file.name != TRAINER_STATE_NAME:
        return file_sha256(file)
    try:
        return json_fingerprint(read_json(file) | {"log_history": None})
    except ArtifactError:  # damaged on purpose
        return "damaged"
