"""Progress of long tasks, logged where there is no terminal."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from folora.runtime import progress as module
from folora.runtime.progress import progress


def test_progress_reports_time_left_and_time_taken(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "folora")
    monkeypatch.setattr(module, "LOG_SECONDS", (-1.0, -1.0))
    with progress("reading", 10) as tick:
        tick(4, tokens=80)
    first, last = (record.getMessage() for record in caplog.records)
    assert first.startswith("reading: 4 of 10, 0 s left ") and first.endswith("tokens/s")
    assert last.startswith("reading: took 0.0 s ")  # although it stopped early


def test_failed_work_is_not_reported_as_done(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "folora")
    with pytest.raises(ValueError), progress("reading", 10):
        raise ValueError
    assert not caplog.records


def test_progress_bars_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(module, "STDERR", Console(file=written, force_terminal=True, width=120))
    with progress("writing", 10) as outer:
        outer(4)
        with progress("looking", 5) as inner:
            inner(5)
        outer(6)
    last = written.getvalue().split("\n")[-2]
    assert "looking" in written.getvalue()
    assert "writing" in last and "10/10" in last


def test_log_lines_become_less_frequent_over_time() -> None:
    intervals = [module._log_interval(elapsed) for elapsed in (0.0, 60.0, 200.0, 600.0, 36000.0)]
    assert intervals == [5.0, 5.0, 10.0, 30.0, 30.0]


def test_resumed_work_starts_where_it_stopped(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "folora")
    monkeypatch.setattr(module, "LOG_SECONDS", (-1.0, -1.0))
    with progress("training", 10, already=6) as tick:
        tick()
    assert caplog.records[0].getMessage().startswith("training: 7 of 10")
