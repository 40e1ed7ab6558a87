"""The wheel in a fresh environment, with README's commands verbatim.

First without extras, then with ``trl``, then with ``compare``. The model is a very small Qwen3 in a
folder named as in README. Not collected by pytest; ``make wheel`` runs it::

    python tests/project/wheel.py DIRECTORY CONSTRAINTS WHEEL [TORCH_REQUIREMENTS]

The directory is created, and may hold the environment of an earlier run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WRITE = """
from pathlib import Path
from benchmarks.tiny import write_qwen3, write_rows
write_qwen3(Path("Qwen/Qwen3-1.7B"))
write_rows(Path("rows.jsonl"))
write_rows(Path("other.jsonl"))
"""
REFUSED = {"run": "trl", "compare": "compare"}
"""What a plain install refuses, and the extra that it names."""


def main(place: Path, constraints: Path, wheel: Path, torch: Path | None) -> None:
    """Run everything until a command differs from README."""
    place.mkdir(parents=True, exist_ok=True)
    stranger = Stranger(place, constraints)
    if torch is not None:
        stranger.install(
            "--require-hashes", "--no-deps", "--requirement", str(torch), may_fail=True
        )
    stranger.install(str(wheel))
    stranger.python(WRITE, PYTHONPATH=str(ROOT))
    commands = readme_commands()

    stranger.folora("folora --version")
    stranger.python(
        "import runpy, sys; sys.argv[1:] = ['--version']; runpy.run_module('folora', run_name='__main__')"
    )
    for command in commands:
        name = command.split()[1]
        if name in REFUSED:
            stranger.refuses(command, REFUSED[name])
        else:
            stranger.folora(command)
    stranger.python(readme_example())
    stranger.install(f"{wheel}[trl]")
    for command in commands:
        if command.split()[1] == "run":
            stranger.folora(command)
    stranger.install(f"{wheel}[compare]")
    for command in commands:
        if command.split()[1] == "compare":
            stranger.folora(command)


def readme_commands() -> list[str]:
    """The commands of "Use it", one per line, without comments."""
    block = re.search(r"## Use it\n\n```\n(.*?)```", README, re.S)
    assert block is not None
    lines = block[1].replace("\\\n", " ").splitlines()
    commands = [re.sub(r"\s+#.*", "", line) for line in lines]
    assert len(commands) >= 5
    assert all(command.startswith("folora ") for command in commands)
    return commands


def readme_example() -> str:
    """The Python example that prepares a model."""
    (example,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.S) if ".prepare(" in b)
    return example


class Stranger:
    """A virtual environment and a working folder.

    Args:
        place: Holds both.
        constraints: The lock file, whose versions are taken.
    """

    def __init__(self, place: Path, constraints: Path) -> None:
        self.bin, self.folder = place / "venv" / "bin", place / "work"
        self.folder.mkdir(exist_ok=True)
        if not self.bin.exists():
            subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True)
        self.constraints = place / "constraints.txt"
        # Without hashes, since the local wheel has none.
        pins = re.findall(r"^[a-z0-9].*==.*?(?= *\\?$)", constraints.read_text(), re.M)
        self.constraints.write_text("\n".join(pins) + "\n")

    def install(self, *what: str, may_fail: bool = False) -> None:
        """pip install."""
        given = [] if may_fail else ["--constraint", str(self.constraints)]
        self._run([str(self.bin / "pip"), "install", "--quiet", *given, *what], may_fail=may_fail)

    def python(self, code: str, **environment: str) -> None:
        """Run Python code."""
        self._run([str(self.bin / "python"), "-c", code], environment)

    def folora(self, command: str) -> None:
        """Run a command, which must succeed and write only folora's lines to stderr."""
        errors = self._run(["bash", "-c", command])
        foreign = [line for line in errors.splitlines() if NOISE.search(line)]
        assert not foreign, f"{command}: {foreign}"

    def refuses(self, command: str, extra: str) -> None:
        """Run a command that needs an extra."""
        errors = self._run(["bash", "-c", command], code=2)
        assert f"pip install 'folora[{extra}]'" in errors, errors

    def _run(
        self,
        command: list[str],
        environment: dict[str, str] | None = None,
        code: int = 0,
        may_fail: bool = False,
    ) -> str:
        own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        own |= {"PATH": f"{self.bin}:{own['PATH']}", "HF_HUB_OFFLINE": "1", **(environment or {})}
        began = time.monotonic()
        done = subprocess.run(command, cwd=self.folder, env=own, text=True, capture_output=True)
        shown = command[-1].strip().splitlines()[0]
        print(f"{time.monotonic() - began:6.1f} s  {shown}", flush=True)
        if done.returncode != code and not may_fail:
            sys.exit(
                f"ended with {done.returncode} instead of {code}:\n{done.stdout}\n{done.stderr}"
            )
        return done.stderr


NOISE = re.compile(r"Warning|warn\(|bitsandbytes|kernels|GGUF|it/s\]")

if __name__ == "__main__":
    given = [Path(argument).resolve() for argument in sys.argv[1:]]
    main(*given[:3], given[3] if len(given) > 3 else None)
