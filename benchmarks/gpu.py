"""What a CPU cannot reach, in twelve minutes of one GPU: ``python -m benchmarks.gpu``.

Phases run one after the other, each within its limit: models, times, then trainings in all the time that is
left. A command that fails or is stopped costs the others nothing: every arm and every table is written as
soon as it is measured, to where ``make results`` reads, and skipped when the script is run again.
``--trial`` takes the same way on a CPU in a few minutes, see `benchmarks.gpu_trial`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_trial import shortened
from benchmarks.plan import Plan

MINUTES = 12.0
PLANS = Path(__file__).parent / "plans"
COMPARED = ("gpu_smollm2", "gpu_qwen")
SHAPES = ("smollm2-135m", "qwen3-1.7b")
MODES = ("lora", "folora", "folora-anchor", "folora-all")


@dataclass(frozen=True)
class Phase:
    """Commands that share the GPU.

    Attributes:
        seconds: Limit.
        commands: Arguments after ``python -m``, by the name of their log.
    """

    seconds: float
    commands: dict[str, list[str]]


@dataclass(frozen=True)
class Places:
    """Folders of plans, models, runs (with logs) and results."""

    plans: Path
    models: Path
    runs: Path
    results: Path


def phases(places: Places, trial: bool = False) -> list[Phase]:
    """Models; times, which need the GPU to themselves; trainings."""
    plans = {name: Plan.load(places.plans / f"{name}.yaml") for name in COMPARED}
    models = ["--models", str(places.models)]
    into = ["--device", "cpu" if trial else "cuda", "--output", str(places.results / "speed")]
    whole = ["benchmarks.speed.whole", *models, *into, "--steps", "2" if trial else "100"]
    speed = ["benchmarks.speed", "--modes", *MODES, *into]
    if trial:
        speed += ["--shapes", SHAPES[0], "--blocks", "1", "--tokens", "64", "--rounds", "2"]
        speed += ["--skip-setup"]
    else:
        speed += ["--shapes", *SHAPES, "--rounds", "7"]
    compare = {
        f"{name}-{seed}": [
            *("benchmarks.compare", "--plan", str(places.plans / f"{name}.yaml"), *models),
            *("--seeds", str(seed), "--threads", "2", "--runs", str(places.runs)),
            *("--output", str(places.results / f"{name}.jsonl")),
        ]
        for name, plan in plans.items()
        for seed in plan.seeds
    }
    get = {plan.model: ["benchmarks.models", plan.model, *models] for plan in plans.values()}
    return [
        Phase(90, get),  # once, and not by every command that needs one
        Phase(60, {"whole": whole}),
        Phase(130, {"speed": speed}),
        Phase(60 * MINUTES, compare),
    ]


def run(phase: Phase, seconds: float, logs: Path) -> dict[str, str]:
    """Run the commands of a phase side by side, for so many seconds; returns the outcome of each."""
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // len(phase.commands))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    ends, started = time.monotonic() + seconds, {}
    for name, command in phase.commands.items():
        with (logs / f"{name}.log").open("a") as log:
            started[name] = subprocess.Popen(
                [sys.executable, "-m", *command], stdout=log, stderr=log, env=environment
            )
    found = {}
    for name, process in started.items():
        try:
            code = process.wait(max(0.0, ends - time.monotonic()))
            found[name] = "done" if code == 0 else f"failed, see {logs / f'{name}.log'}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            found[name] = "stopped at the limit"
    return found


def run_all(chosen: Sequence[Phase], seconds: float, logs: Path) -> dict[str, str]:
    """Run the phases in turn, each within its limit and all within `seconds`; prints and returns the outcomes."""
    ends, outcomes = time.monotonic() + seconds, dict[str, str]()
    for phase in chosen:
        began = time.monotonic()
        found = run(phase, min(phase.seconds, max(0.0, ends - began)), logs)
        for name, outcome in found.items():
            print(f"{name}: {outcome}, {time.monotonic() - began:.0f} s", flush=True)
        outcomes |= found
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 1 if a command failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all phases together")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--trial", action="store_true", help="a short form on the CPU")
    options = parser.parse_args(arguments)
    places = Places(PLANS, options.models, options.runs, options.results)
    if options.trial:
        trial = options.runs / "trial"
        os.environ |= shortened([PLANS / f"{name}.yaml" for name in COMPARED], trial)
        places = Places(*(trial / part for part in ("plans", "models", "runs", "results")))
    chosen = phases(places, options.trial)
    outcomes = run_all(chosen, 60 * options.minutes, places.runs / "logs")
    return int(any("failed" in outcome for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
