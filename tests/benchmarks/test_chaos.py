"""A short `make chaos`, which must also detect planted bugs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import folora.pipeline.store
import folora.runtime.artifacts
from benchmarks.reliability.chaos import KINDS, Trial, at_write, disturb, finish, kill_self
from benchmarks.reliability.stand import Stand


def test_killed_runs_lose_nothing(tmp_path: Path) -> None:
    found = disturb(tmp_path, seed=7, counts=dict.fromkeys(KINDS, 1))
    assert [trial["lost"] for trial in found["trials"]] == [[]] * len(KINDS)
    assert found["varying"] == []  # two uninterrupted runs have the same bytes
    codes = {
        kind: {c for t in found["trials"] if t["kind"] == kind for c in t["codes"]}
        for kind in KINDS
    }
    assert -9 in codes["kill"]
    assert codes["signal"] & {130, 143}


def test_a_non_atomic_writer_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def direct(path: Path, write: Callable[[Path], None]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)

    monkeypatch.setattr(folora.runtime.artifacts, "write_atomically", direct)
    stand, trial = Stand(tmp_path), Trial("kill", 0)
    stand.reference()
    stand.afresh()
    assert stand.writes["solve"] == 2  # folder and manifest; it is killed between them
    assert stand.attempt(at_write(stand, "solve", 2, kill_self)).ended().code == -9
    finish(stand, trial)
    assert "3-spectrum/manifest.json is missing" in trial.lost[0]


class BeforeWrites(random.Random):
    """Always kills before the first write, which does not depend on the load of the machine."""

    def random(self) -> float:
        return 0.0


def test_repeated_work_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "Random", BeforeWrites)
    read = folora.pipeline.store.read_manifest

    def forgetful(path: Path, kind: str, *more: Any) -> dict[str, Any]:
        return {} if kind == "spectrum" and not more else read(path, kind, *more)

    monkeypatch.setattr(folora.pipeline.store, "read_manifest", forgetful)
    found = disturb(tmp_path, seed=0, counts={"kill": 1})
    assert any("made again" in line for trial in found["trials"] for line in trial["lost"])
