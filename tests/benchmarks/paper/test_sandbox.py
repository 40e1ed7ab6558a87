"""The sandbox for generated programs: what they may do, and which limits stop them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.paper_hub import HUMANEVAL

from benchmarks.paper import sandbox
from benchmarks.paper.sandbox import Limits, permission, run
from benchmarks.paper.tasks import functions
from folora.errors import ConfigError


@pytest.fixture
def allowed() -> Iterator[Callable[..., sandbox.Outcome]]:
    def go(program: str, seconds: float = 20.0, **limits: int) -> sandbox.Outcome:
        return run(program, Limits(seconds=seconds, **limits))

    with permission():
        yield go


def test_nothing_runs_without_permission() -> None:
    with pytest.raises(ConfigError, match="--allow-code"):
        run("pass")
    with permission():
        assert run("pass").passed
    with pytest.raises(ConfigError, match="--allow-code"):
        functions.humaneval(HUMANEVAL[0], ["    return sum(xs)\n"])


def test_a_correct_program_passes_and_a_wrong_one_reports_why(allowed: Any) -> None:
    assert allowed("assert sum([1, 2]) == 3").passed
    wrong = allowed("assert sum([1, 2]) == 4")
    assert not wrong.passed
    assert "AssertionError" in wrong.output
    assert wrong.reason == "failed with status 1"


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)\nassert False",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "import sys\nsys.stdout.write('passed')\nquit = 1\nraise SystemExit(0)",
    ],
)
def test_exiting_early_does_not_pass(allowed: Any, program: str) -> None:
    outcome = allowed(program)
    assert not outcome.passed
    assert outcome.reason == "ended before its tests"


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)"])
def test_an_endless_program_is_stopped(allowed: Any, program: str) -> None:
    began = time.monotonic()
    outcome = allowed(program, seconds=1.0)
    assert not outcome.passed
    assert time.monotonic() - began < 10


def test_child_processes_of_a_stopped_program_are_killed(allowed: Any, tmp_path: Path) -> None:
    """Also if the process bypasses the hook; a plain fork does not."""
    for start in ("os.fork()", "os.forkpty()", "os.system('sleep 30')"):
        outcome = allowed(f"import os\nwhile True: {start}", seconds=5.0)
        assert not outcome.passed
        assert "the sandbox refuses" in outcome.output


def test_memory_is_limited(allowed: Any) -> None:
    outcome = allowed("x = bytearray(1 << 29)", memory=1 << 28)
    assert not outcome.passed
    assert "MemoryError" in outcome.output


@pytest.mark.parametrize(
    "program",
    [
        "open({path!r}, 'w').write('x')",
        "open({path!r}, 'a')",
        "import os\nos.open({path!r}, os.O_CREAT | os.O_WRONLY)",
        "import pathlib\npathlib.Path({path!r}).touch()",
        "import os\nos.symlink({folder!r}, 'link')\nopen('link/new', 'w')",
        "import os\nos.mkdir({path!r})",
    ],
)
def test_nothing_is_written_outside_the_folder(allowed: Any, tmp_path: Path, program: str) -> None:
    path = tmp_path / "new"
    outcome = allowed(program.format(path=str(path), folder=str(tmp_path)))
    assert not outcome.passed
    assert not path.exists()


def test_nothing_is_deleted_outside_the_folder(allowed: Any, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("x")
    for call in ("os.remove", "os.unlink", "os.truncate", "shutil.rmtree"):
        extra = ", 0" if "truncate" in call else ""
        assert not allowed(f"import os, shutil\n{call}({str(kept)!r}{extra})").passed
    assert kept.read_text() == "x"


def test_a_program_may_use_its_own_folder(allowed: Any) -> None:
    program = (
        "import os\nos.mkdir('d')\nopen('d/a', 'w').write('x')\nos.remove('d/a')\nos.rmdir('d')"
    )
    assert allowed(program).passed


def test_output_is_limited(allowed: Any) -> None:
    outcome = allowed("while True: print('x' * 1000)", output=1 << 16)
    assert not outcome.passed
    assert outcome.reason == "wrote too much"
    assert len(outcome.output) <= 2000


def test_there_is_no_input_no_environment_and_no_network(allowed: Any, monkeypatch: Any) -> None:
    assert "EOFError" in allowed("input()").output
    monkeypatch.setenv("TOKEN", "secret")
    assert allowed(
        "import os\nassert 'TOKEN' not in os.environ\nassert 'HOME' not in os.environ"
    ).passed
    outcome = allowed("import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)")
    assert not outcome.passed
    assert outcome.network is ("--net" not in sandbox.isolation().prefix)
