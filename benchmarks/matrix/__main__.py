"""`make matrix`: the wheel in an environment for each stack of stacks.yaml, and a battery there.

    python -m benchmarks.matrix [STACK ...] [--keep] [--folder FOLDER]

Writes the section on versions of docs/compatibility.md. Environments are removed again unless they
are to be kept: PyTorch with CUDA takes some 5 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.compatibility import FOLDER, read_section, write_section
from benchmarks.matrix import PACKAGES

ROOT = Path(__file__).parents[2]
STACKS = Path(__file__).with_name("stacks.yaml")
PYTHON, EXTRAS = "3.11", "trl"
TEXT = [
    "`make matrix` installs the wheel with the versions of each line and runs the same checks on tiny "
    "models: `prepare` on a LLaMA and a GPT-2 with the initializations `eigen` and `null_space` (exact "
    "at step 0, three steps, the meter, export, equal logits in stock PEFT and merged), three steps of "
    "`transformers.Trainer`, and where TRL is in the stack `folora run` and a resume from a checkpoint "
    "with the same bytes, the same under a budget, and its export scaled (the stacks on Python 3.11). The ranges in `pyproject.toml` are what has passed here.",
]
COLUMNS = ["stack", "why", "python", *PACKAGES[:6], "outcome"]


def main(arguments: list[str]) -> int:
    """Run the stacks that are named, or all. Returns 1 if a check failed."""
    stacks: dict[str, Any] = yaml.safe_load(STACKS.read_text())
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix")
    parser.add_argument("stacks", nargs="*", metavar="STACK", help=", ".join(stacks))
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="for environments")
    options = parser.parse_args(arguments)
    if unknown := set(options.stacks) - set(stacks):
        parser.error(f"no stack {', '.join(sorted(unknown))}; there are {', '.join(stacks)}")
    wheel = build(options.folder)
    failed = False
    for name in options.stacks or stacks:
        if not has_python(stacks[name].get("python", PYTHON)):
            print(f"{name}: skipped, there is no Python {stacks[name]['python']}", flush=True)
            continue
        row = {"stack": name, "why": stacks[name]["why"], **run(stacks[name], name, wheel, options)}
        failed = failed or row["outcome"] != "passed"
        print(f"{name}: {row['outcome']}", flush=True)
        record(row, list(stacks))
    return int(failed)


def build(folder: Path) -> Path:
    """The project's wheel."""
    shutil.rmtree(folder / "wheel", ignore_errors=True)
    uv("build", "--quiet", "--wheel", "--out-dir", str(folder / "wheel"), str(ROOT))
    (wheel,) = (folder / "wheel").glob("*.whl")
    return wheel


def run(
    stack: dict[str, Any], name: str, wheel: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """The versions of one stack and what came of its checks."""
    place, result = options.folder / name, options.folder / f"{name}.json"
    python = place / "bin" / "python"
    pins = options.folder / f"{name}.txt"
    pins.write_text("".join(f"{p}=={v}\n" for p, v in stack["pins"].items()))
    uv("venv", "--quiet", "--clear", "--python", stack.get("python", PYTHON), str(place))
    extras = f"[{EXTRAS}]" if "trl" in stack["pins"] else ""
    uv("pip", "install", "--quiet", "--python", str(python), "--override", str(pins), "--requirement", str(pins), f"{wheel}{extras}")  # fmt: skip
    result.unlink(missing_ok=True)
    with (options.folder / f"{name}.log").open("w") as log:
        subprocess.run(
            [python, "-m", "benchmarks.matrix.battery", result],
            cwd=ROOT, check=False, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    if not options.keep:
        shutil.rmtree(place)
    if not result.exists():
        last = Path(log.name).read_text().strip().rsplit("\n", 1)[-1]
        return {"python": stack.get("python", PYTHON), **stack["pins"], "outcome": last}
    row: dict[str, Any] = json.loads(result.read_text())
    bad = [f"{check}: {outcome}" for check, outcome in row["checks"].items() if outcome != "passed"]
    return {**row, "outcome": "; ".join(bad) or "passed"}


def has_python(version: str) -> bool:
    """Whether the machine has it; none is downloaded."""
    return uv("python", "find", "--quiet", "--no-python-downloads", version, check=False) == 0


def uv(*arguments: str, check: bool = True) -> int:
    """Run uv, of the environment of tools or on PATH. Raises CalledProcessError."""
    own = ROOT / ".venv-tools" / "bin" / "uv"
    command = [own if own.exists() else "uv", *arguments]
    return subprocess.run(command, check=check).returncode


def record(row: dict[str, Any], order: list[str]) -> None:
    """Put a row into the section, in place of the one of its stack."""
    before = read_section("versions")["rows"] if (FOLDER / "versions.json").exists() else []
    rows = [r for r in before if r["stack"] != row["stack"] and r["stack"] in order] + [row]
    rows.sort(key=lambda r: order.index(r["stack"]))
    write_section("versions", "Versions", TEXT, COLUMNS, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
