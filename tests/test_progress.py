"""What long work says where there is no terminal."""

from __future__ import annotations

import logging

import pytest

from folora import progress as module
from folora.progress import progress


def test_it_says_what_is_left_and_what_it_took(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "folora")
    monkeypatch.setattr(module, "LOG_SECONDS", -1.0)
    with progress("reading", 10) as tick:
        tick(4, tokens=80)
    first, last = (record.getMessage() for record in caplog.records)
    assert first.startswith("reading: 4 of 10, 0 s left ") and first.endswith("tokens/s")
    assert last.startswith("reading: took 0.0 s ")  # though it ended before its ceiling


def test_what_failed_has_not_been_done(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "folora")
    with pytest.raises(ValueError), progress("reading", 10):
        raise ValueError
    assert not caplog.records
