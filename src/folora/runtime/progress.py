"""Progress of long tasks: a Rich bar with rate and time left, or log lines without a terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from folora.runtime import distributed

logger = logging.getLogger(__name__)

LOG_SECONDS = (5.0, 30.0)  # shortest and longest interval between log lines
LOG_FRACTION = 20  # in between, the interval is the elapsed time over this
STDERR = Console(stderr=True)  # shared, so that bars and log lines do not overwrite each other


class Tick(Protocol):
    """Called with the units of work done, and the tokens processed if the rate counts tokens."""

    def __call__(self, units: int = 1, tokens: int = 0) -> None:
        """Count `units` as done."""
        ...


@contextmanager
def progress(what: str, total: int, already: int = 0) -> Iterator[Tick]:
    """Show progress on stderr while the block runs; blocks may be nested.

    Of `total` units of work an earlier, interrupted run did `already`.
    """
    started = time.monotonic()
    done, tokens_done = already, 0
    logs = not STDERR.is_terminal and distributed.rank() == 0
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
        console=STDERR,
        disable=not STDERR.is_terminal or distributed.rank() > 0,
    )
    last_log = started

    with bar:
        task = bar.add_task(what, total=total, completed=already, rate="")

        def tick(units: int = 1, tokens: int = 0) -> None:
            nonlocal done, tokens_done, last_log
            done, tokens_done = done + units, tokens_done + tokens
            now = time.monotonic()
            rate = _rate(tokens_done, now - started)
            bar.update(task, completed=done, rate=rate)
            if logs and now - last_log > _log_interval(now - started) and done < total:
                left = (now - started) / max(done - already, 1) * (total - done)
                logger.info("%s: %d of %d, %.0f s left %s", what, done, total, left, rate)
                last_log = now

        yield tick
    if logs:
        took = time.monotonic() - started
        logger.info("%s: took %.1f s %s", what, took, _rate(tokens_done, took))


def _log_interval(elapsed: float) -> float:
    """Seconds until the next log line, after `elapsed` seconds of work."""
    shortest, longest = LOG_SECONDS
    return min(longest, max(shortest, elapsed / LOG_FRACTION))


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / max(seconds, 1e-9):.0f} tokens/s" if tokens else ""
