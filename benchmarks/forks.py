"""folora's command line in forks: of a process that has everything imported, so that each begins at once."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

import folora.cli.commands  # noqa: F401 - which the command line imports when it is called
from folora.cli.main import entry

PATIENCE = 120.0  # seconds for a run that takes two


@dataclass(frozen=True)
class Ended:
    """Exit of an attempt.

    Attributes:
        code: Exit code; negative for a signal.
        said: What it wrote to stderr.
        seconds: From its start.
    """

    code: int
    said: str
    seconds: float

    @property
    def plain(self) -> bool:
        """Done, or refused with one of folora's sentences: no traceback."""
        return self.code in (0, 2) and "Traceback" not in self.said


class Fork:
    """A process that runs ``folora`` with given arguments.

    Args:
        words: The command line.
        place: A folder that receives what it says.
        name: For the files there.
        prepare: Called in it first.
        keeps: An object that is released when the process has ended.
    """

    def __init__(
        self,
        words: Sequence[str],
        place: Path,
        name: str = "folora",
        prepare: Callable[[], None] = lambda: None,
        keeps: object = None,
    ) -> None:
        self.words, self.began, self.keeps = words, time.monotonic(), keeps
        self.stderr = place / f"{name}.stderr"
        self.begun = place / f"{name}.begun"
        """There as soon as folora is on its own."""
        self.begun.unlink(missing_ok=True)
        self.process = os.fork()
        if self.process == 0:
            self._work(words, place / f"{name}.stdout", prepare)

    def lives(self) -> bool:
        """Whether it is still running."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process, options) is None

    def send(self, signum: int) -> None:
        """Send it a signal, if it is running."""
        if self.lives():
            os.kill(self.process, signum)

    def ended(self) -> Ended:
        """Wait for its exit, and kill it after a timeout."""
        while (found := os.waitpid(self.process, os.WNOHANG))[0] == 0:
            if time.monotonic() - self.began > PATIENCE:
                os.kill(self.process, signal.SIGKILL)
            time.sleep(0.001)
        self.keeps = None
        said = self.stderr.read_text(errors="replace") if self.stderr.exists() else ""
        return Ended(os.waitstatus_to_exitcode(found[1]), said, time.monotonic() - self.began)

    def _work(self, words: Sequence[str], stdout: Path, prepare: Callable[[], None]) -> NoReturn:
        try:
            for path, stream in ((stdout, 1), (self.stderr, 2)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = ["folora", *words]
            torch.set_num_threads(1)  # a fork inherits no threads
            prepare()
            self.begun.touch()
            entry()
        except SystemExit as error:
            _leave(error.code if isinstance(error.code, int) else 1)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        _leave(1)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
