"""What a CPU cannot reach, in twelve minutes of one GPU: ``python -m benchmarks.gpu``.

Phases run one after the other, the most valuable first, and the commands of a phase side by side. A phase
ends at its limit, and all at ``--minutes``. Every arm and every table is written as soon as it is
measured and skipped when the command is run again. ``--trial`` runs every command on the CPU within
minutes: tiny random models, two steps, one question of each kind.
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

import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.models import MODELS
from benchmarks.plan import Plan

PLANS = Path(__file__).parent / "plans"
EQUATIONS = ("gpu_smollm2", "gpu_qwen")
SHAPES = ("smollm2-135m", "qwen3-1.7b")
MODES = ("lora", "folora", "folora-anchor", "folora-all")
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": ["full_attention"] * 2,
    "max_window_layers": 2,
    "initializer_range": 0.1,
}
SHORT = {
    "device": "cpu",
    "sampling.num_sequences": 36,
    "sampling.min_new_tokens": 32,
    "sampling.max_new_tokens": 32,
    "sampling.batch_size": 32,
    "statistics.task_examples": 4,
    "data.eval_rows": 2,
    "training.max_steps": 2,
}


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


def phases(places: Places, device: str, trial: bool = False) -> list[Phase]:
    """Trainings, then times, which need the GPU to themselves."""
    compare = {
        f"{name}-{seed}": [
            *("benchmarks.compare", "--plan", str(places.plans / f"{name}.yaml")),
            *("--seeds", str(seed), "--threads", "2", "--models", str(places.models)),
            *("--runs", str(places.runs), "--output", str(places.results / f"{name}.jsonl")),
        ]
        for seed in Plan.load(places.plans / f"{EQUATIONS[0]}.yaml").seeds
        for name in EQUATIONS
    }
    into = ["--device", device, "--output", str(places.results / "speed")]
    speed = ["benchmarks.speed", "--modes", *MODES, *into]
    setup = ["benchmarks.speed.whole", "--models", str(places.models), *into]
    if trial:
        speed += ["--shapes", SHAPES[0], "--blocks", "1", "--tokens", "64", "--rounds", "2"]
        speed += ["--skip-setup"]
        setup += ["--steps", "2"]
    else:
        speed += ["--shapes", *SHAPES, "--rounds", "7"]
    return [
        Phase(460, compare),
        Phase(150, {"speed": speed}),
        Phase(110, {"setup": setup}),
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


def shortened(places: Places) -> Places:
    """The plans and models of a trial: two steps and one question, and random models with the real tokenizers."""
    trial = Places(
        *(places.runs / "trial" / part for part in ("plans", "models", "runs", "results"))
    )
    trial.plans.mkdir(parents=True, exist_ok=True)
    for name in EQUATIONS:
        plan = Plan.load(places.plans / f"{name}.yaml")
        short = {
            "include": [str((places.plans / f"{name}.yaml").resolve())],
            "base": SHORT,
            "seeds": plan.seeds[:1],
            "evaluation": {"documents": dict.fromkeys(plan.evaluation["documents"], 1)},
        }
        (trial.plans / f"{name}.yaml").write_text(yaml.safe_dump(short))
        real = MODELS[plan.model](places.models)
        tiny = trial.models / real.name
        if not tiny.exists():
            config = AutoConfig.from_pretrained(real, **TINY)
            AutoModelForCausalLM.from_config(config).save_pretrained(tiny)
            AutoTokenizer.from_pretrained(real).save_pretrained(tiny)
    return trial


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 1 if a command failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=12.0, help="of all phases together")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--trial", action="store_true", help="a short form on the CPU")
    options = parser.parse_args(arguments)
    ends = time.monotonic() + 60 * options.minutes
    places = Places(PLANS, options.models, options.runs, options.results)
    if options.trial:
        places = shortened(places)
    else:
        for name in EQUATIONS:  # once, and not by all commands of a phase
            MODELS[Plan.load(PLANS / f"{name}.yaml").model](places.models)
    outcomes: dict[str, str] = {}
    for phase in phases(places, "cpu" if options.trial else "cuda", options.trial):
        began = time.monotonic()
        limit = ends - began if options.trial else min(phase.seconds, ends - began)
        found = run(phase, limit, places.runs / "logs")
        for name, outcome in found.items():
            print(f"{name}: {outcome}, {time.monotonic() - began:.0f} s", flush=True)
        outcomes |= found
    return int(any("failed" in outcome for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
