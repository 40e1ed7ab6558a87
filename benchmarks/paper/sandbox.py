"""Run one generated program in a restricted process, and only if the user allowed it.

A program runs in a Python of its own (``-I``: no user site, no environment), in a session and process
group of its own, in a temporary folder, with an empty environment, no standard input, hard limits on
memory, processor time, file size, open files and processes, no core dump, and a limit of wall-clock
time after which the whole group is killed. Where the system lets us, it also has network and process
namespaces of its own (no network at all; nothing outlives it), and is run as nobody if we are root. An
audit hook refuses writing outside of the folder, starting processes, and sockets.

It counts as passed only if it came to its end behind the last assertion: the process then writes a
secret, so that exiting early with status 0 does not pass.

What this protects against is clumsiness: endless loops, runaway memory, output without end, fork bombs,
stray files, deletions, calls home. **It is no wall against a program written to break out.** Code that
attacks the interpreter itself (through a memory bug in a C extension, say) gets around the audit hook,
can read whatever you can read, can find the secret in its own process's memory, and, where there are no
namespaces, reach the network. Run untrusted weights in a container or a virtual machine on top.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.paper import sandbox_child
from folora.errors import ConfigError

_allowed: ContextVar[bool] = ContextVar("allowed", default=False)

PROBE = (
    "import collections, functools, heapq, itertools, math, re, typing\nassert math.sqrt(4) == 2"
)
NAMESPACES = ("--net", "--pid", "--fork", "--kill-child")


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: Of wall-clock time; of processor time it is the same, rounded up.
        memory: Bytes of address space.
        output: Bytes that it may write to standard output and error together, or to any one file.
    """

    seconds: float = 10.0
    memory: int = 1 << 30
    output: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: It came to its end.
        reason: Why not, in words; ``"passed"`` if it did.
        output: The end of what it wrote.
        network: Whether it could have reached the network.
    """

    passed: bool
    reason: str
    output: str
    network: bool


@dataclass(frozen=True)
class Isolation:
    """A way to start a program: what stands before Python, and whether it becomes nobody."""

    prefix: tuple[str, ...] = ()
    drop: bool = False

    @property
    def network(self) -> bool:
        """Whether the network is in reach."""
        return "--net" not in self.prefix


@contextmanager
def permission() -> Iterator[None]:
    """Let programs run inside the block; the user has asked for it."""
    token = _allowed.set(True)
    try:
        yield
    finally:
        _allowed.reset(token)


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Run a program to its end, or to a limit.

    Args:
        program: Python source, with the assertions that it must come past.
        limits: What it may use.

    Raises:
        ConfigError: Outside of `permission`.
    """
    if not _allowed.get():
        raise ConfigError(
            "programs that a model wrote run only where that was allowed: give --allow-code, on a "
            "machine where they can do no harm"
        )
    return _run(program, limits or Limits(), isolation())


@cache
def isolation() -> Isolation:
    """The strictest way to start a program that works on this machine."""
    root = os.geteuid() == 0
    ways = [
        *([Isolation(("unshare", *NAMESPACES), drop=True)] if root else []),
        Isolation(("unshare", "--user", *NAMESPACES)),
        *([Isolation(drop=True)] if root else []),
        Isolation(),
    ]
    for way in ways:
        if _run(PROBE, Limits(seconds=30), way).passed:
            return way
    raise ConfigError(f"no program can be run by {sys.executable}: even a trivial one fails")


def _run(program: str, limits: Limits, way: Isolation) -> Outcome:
    secret = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as output,
    ):
        if way.drop:
            os.chown(folder, sandbox_child.NOBODY, sandbox_child.NOBODY)
        heard, tell = os.pipe()
        try:
            order = {
                "secret": secret,
                "tell": tell,
                "drop": way.drop,
                "limits": {
                    "AS": limits.memory,
                    "CPU": math.ceil(limits.seconds),
                    "FSIZE": limits.output,
                    "NOFILE": 64,
                    "NPROC": 1,  # binds ordinary users; the audit hook refuses root's forks
                    "CORE": 0,
                },
            }
            child = Path(sandbox_child.__file__).read_text(encoding="utf-8")
            try:
                process = subprocess.Popen(
                    [*way.prefix, sys.executable, "-I", "-c", child],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    env={},
                    pass_fds=[tell],
                    start_new_session=True,
                )
            except OSError as error:
                return Outcome(False, f"cannot be started: {error}", "", way.network)
            late = _feed_and_wait(
                process, f"{json.dumps(order)}\n{program}".encode(errors="replace"), limits
            )
            os.set_blocking(heard, False)
            try:
                passed = os.read(heard, 2 * len(secret)) == secret.encode()
            except BlockingIOError:
                passed = False
        finally:
            os.close(heard)
            os.close(tell)
        length = output.seek(0, os.SEEK_END)
        output.seek(max(0, length - 2000))
        text = output.read().decode(errors="replace")
        reason = "passed" if passed and not late else _why(late, length >= limits.output, process)
        return Outcome(passed and not late, reason, text, way.network)


def _feed_and_wait(process: subprocess.Popen[bytes], text: bytes, limits: Limits) -> bool:
    """Give a process its input and wait; whatever happens, its whole group is gone afterwards.

    Returns whether it had to be stopped.
    """
    try:
        process.communicate(text, timeout=limits.seconds)
        return False
    except subprocess.TimeoutExpired:
        return True
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _why(late: bool, full: bool, process: subprocess.Popen[bytes]) -> str:
    if late:
        return "ran out of time"
    if full:
        return "wrote too much"
    if process.returncode == 0:
        return "ended before its tests"
    return f"failed with status {process.returncode}"
