"""A short `make soak`, which must also detect planted leaks."""

from __future__ import annotations

import io
import os
import platform
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

import folora.optim.sadam
from benchmarks.reliability.soak import breaches, soak, standing


def soaked(place: Path, **more: Any) -> list[str]:
    with redirect_stdout(io.StringIO()):
        return breaches(soak(place, 30, every=10, **more))


def test_memory_does_not_grow_and_interruptions_change_nothing(tmp_path: Path) -> None:
    assert soaked(tmp_path) == []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone can be asked to")
def test_freed_memory_is_returned_before_it_is_measured() -> None:
    pieces = [bytearray(b"1" * 10**5) for _ in range(10**3)]
    above = bytearray(b"1" * 10**5)  # without it the allocator would free everything below
    taken = standing(torch.nn.Module())["memory"]
    del pieces
    assert taken - standing(torch.nn.Module())["memory"] > 8e7 > len(above)


def leaking_memory() -> Callable[[int], None]:
    kept: list[bytearray] = []
    return lambda step: kept.append(bytearray(os.urandom(2 * 10**7)))


def leaking_handles() -> Callable[[int], None]:
    kept: list[Any] = []
    return lambda step: kept.append(open(os.devnull))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # leaked on purpose
@pytest.mark.parametrize(
    ("leak", "said"), [(leaking_memory, "memory grew by"), (leaking_handles, "handles grew by")]
)
def test_growth_is_detected(leak: Callable[[], Any], said: str, tmp_path: Path) -> None:
    assert any(said in line for line in soaked(tmp_path, disturb=leak()))


def test_an_unsaved_moment_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = folora.optim.sadam.SAdam.load_state_dict

    def forgetful(optimizer: Any, state: dict[str, Any]) -> None:
        load(optimizer, state)
        for moments in optimizer.state.values():
            moments["exp_avg_sq"] = torch.zeros_like(moments["exp_avg_sq"])

    monkeypatch.setattr(folora.optim.sadam.SAdam, "load_state_dict", forgetful)
    assert any("exp_avg_sq" in line and "differs" in line for line in soaked(tmp_path))
