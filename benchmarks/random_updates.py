"""What an update costs that reads given directions and writes random ones: ``python -m benchmarks.random_updates``.

A is on r directions of each layer's input (leading eigenvectors, the null space of C_pre, or random), B is random.
B is scaled until the KL to the base on the task's responses is a given level; the KL on self-generated text is
then the forgetting that the directions alone explain, without any training. Results go to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.compare import TESTBEDS, task_run
from benchmarks.plan import Plan
from folora.config import FoLoraConfig
from folora.data.contents import Example
from folora.data.rows import batches, text_examples
from folora.metrics.meter import sequence_kl
from folora.pipeline.run import Run
from folora.pipeline.stages import solve_all, solve_options
from folora.runtime.artifacts import software_versions
from folora.runtime.contexts import evaluating
from folora.runtime.storage import write_text
from folora.training.prepared import attach_configured

FORMAT = "random_updates/1"
DIRECTIONS = {"random": "lora", "null space": "null-frozen", "eigenvectors": "folora"}
"""Directions that A reads, and the method whose initialization puts it there."""
ROWS = 32  # of the task, held out
CLOSE = 0.03  # of the level that ends the search
MOST_TRIES = 40


def mean_kl(model: PeftModel, examples: Sequence[Example], batch_size: int) -> float:
    """KL(base || adapted) in nats per labelled token."""
    total, tokens = 0.0, 0
    for batch in batches(examples, batch_size):
        sums, counts = sequence_kl(model, batch)
        total, tokens = total + sum(sums), tokens + sum(counts)
    return total / tokens


def scale_to(model: PeftModel, rows: Sequence[Example], level: float, batch_size: int) -> float:
    """Scale B, normal with variance 1 / d_out at first, until the KL on the rows is `level`; return that KL."""
    factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    units = [p.detach().clone() for p in factors]
    low, high, scale = 0.0, math.inf, 0.01
    for _ in range(MOST_TRIES):
        for factor, unit in zip(factors, units, strict=True):
            factor.data = scale * unit
        found = mean_kl(model, rows, batch_size)
        if abs(found / level - 1) < CLOSE:
            break
        low, high = (scale, high) if found < level else (low, scale)
        scale = 2 * low if math.isinf(high) else (low + high) / 2
    return found


@torch.no_grad()
def costs(run: Run, levels: Sequence[float], draws: int) -> list[dict[str, Any]]:
    """KL on self-samples at each level of KL on the task, for each choice of directions and each draw of B."""
    context, shared, config = run.context, run.share(), run.config
    options = {**solve_options(config), "null_rank": config.adapter.r, "directions": None}
    spectrum = solve_all(context, shared.keep.load(), shared.task.load(), **options)
    texts, rows = text_examples(shared.samples.load().held_out), context.task.held_out[:ROWS]
    size, found = config.statistics.batch_size, []
    for directions, method in DIRECTIONS.items():
        for seed in range(draws):
            changed = config.changed({"method": method, "training.seed": seed})
            model = attach_configured(context.model, spectrum, changed)
            fill(model, torch.Generator().manual_seed(seed))
            with evaluating(model):
                for level in levels:
                    on_task = scale_to(model, rows, level, size)
                    kl = {"task": on_task, "text": mean_kl(model, texts, size)}
                    found.append({"directions": directions, "draw": seed, "level": level, **kl})
            model.unload()
            print(found[-len(levels) :], flush=True)
    return found


def fill(model: PeftModel, generator: torch.Generator) -> None:
    """Every B normal with variance 1 / d_out."""
    for name, factor in model.named_parameters():
        if "lora_B" in name:
            noise: Tensor = torch.randn(factor.shape, generator=generator)
            factor.data = (noise / math.sqrt(len(factor))).to(factor)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description="KL of random updates that read given directions.")
    parser.add_argument("--plan", type=Path, required=True, metavar="FILE.yaml")
    parser.add_argument("--tasks", nargs="+", help="default: the plan's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=4, help="of B; default: 4")
    parser.add_argument(
        "--levels", nargs="+", type=float, default=[0.05, 1.0], help="KL on the task"
    )
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--output", type=Path, required=True, help="the .json to write")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    plan = Plan.load(options.plan)
    testbed: Any = TESTBEDS[plan.model](plan, options.seed, options.models)
    folder, donor, found = options.runs / testbed.kind / plan.runs / str(options.seed), None, []
    for task in options.tasks or plan.tasks:
        run = task_run(FoLoraConfig().changed(plan.base), testbed, folder / task, task, donor)
        donor = folder / task
        found += [{"name": task, **cost} for cost in costs(run, options.levels, options.draws)]
    command = f"python -m benchmarks.random_updates {shlex.join(given)}"
    result = {
        "format": FORMAT,
        "stage": testbed.stage,
        "command": command,
        "versions": software_versions(),
        "costs": found,
    }
    write_text(options.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
