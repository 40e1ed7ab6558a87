"""Compare methods by a plan: ``python -m benchmarks.compare --plan PLAN.yaml --seeds 0``.

For every seed and task, the arms of the plan that have no result yet are trained, and their results
are added to one JSONL file. An interrupted comparison resumes when the command is run again, and
several processes may share a plan if each has its own seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from benchmarks.models import MODELS
from benchmarks.plan import Plan, check_names
from benchmarks.real.testbed import RealTestbed
from benchmarks.rivals import RIVALS
from benchmarks.world.testbed import WorldTestbed, own_task
from folora.calibration.moments import measure
from folora.compare.arms import Arm
from folora.compare.comparison import Comparison
from folora.compare.inputs import RealText
from folora.compare.readings import Score
from folora.config import FoLoraConfig
from folora.data.rows import text_examples
from folora.errors import ConfigError, FoLoraError
from folora.pipeline.run import Run
from folora.pipeline.stages import KeepMoments
from folora.runtime.storage import write_text


class Testbed(Protocol):
    """What methods are compared on: a model, the rows of its tasks, and how it is scored.

    Attributes:
        kind: The folder of its runs.
        model: The folder of the model.
        stage: The model's name in tables; it includes the seed if models differ by seed.
    """

    kind: str
    model: Path
    stage: str

    def rows(self, task: str) -> Sequence[Mapping[str, str]]:
        """The rows that train, of which some are held out."""

    def options(self) -> dict[str, Any]:
        """Options of the config that the seed sets, by dotted name."""

    def score(self, run: Run, task: str) -> Score:
        """Task and retention scores of a model."""

    def accuracy(self, run: Run, task: str, model: nn.Module) -> float:
        """Exact match of a model's greedy answers on rows of a task that it was not trained on, if it has some."""

    def texts(self, run: Run, source: str, count: int) -> list[list[int]]:
        """Token ids to measure C_pre on or to replay, instead of the run's own samples."""


PROGRAM, SEQUENCE = "benchmarks.compare", "benchmarks.sequence"

TESTBEDS: Mapping[str, type[WorldTestbed] | type[RealTestbed]] = {
    "world": WorldTestbed,
    **dict.fromkeys(MODELS, RealTestbed),
}


@dataclass(frozen=True)
class Places:
    """Where a comparison reads and writes.

    Attributes:
        models: Folder of models.
        runs: Folder for samples and statistics.
        results: JSONL file of results.
        command: The command line, for the record.
    """

    models: Path
    runs: Path
    results: Path
    command: str


def compare(plan: Plan, testbed: Testbed, seed: int, arms: Sequence[Arm], places: Places) -> None:
    """Run the arms on every task of a plan, for one seed, and print a line for each.

    Args:
        plan: The plan.
        testbed: Of that seed.
        seed: See above.
        arms: Those of the plan that are wanted.
        places: Where to read and write.
    """
    base, source = FoLoraConfig().changed(plan.base), plan.replay
    folder = places.runs / testbed.kind / plan.runs / str(seed)
    donor: Path | None = None
    for task in plan.tasks:
        run = task_run(base, testbed, folder / task, task, donor)
        donor = folder / task
        comparison = Comparison(
            run,
            places.results,
            stage=testbed.stage,
            task=task,
            command=places.command,
            score=testbed.score(run, task),
            read_at=plan.read_at,
            score_at=plan.score_at,
            scales=plan.scales,
            h_norm=plan.h_norm,
            real_text=RealText(source, partial(testbed.texts, run, source)) if source else None,
            rivals=RIVALS,
        )
        for calibration in plan.calibration:
            one = calibrated(comparison, testbed, calibration) if calibration else comparison
            for result in one.run_all(arms):
                print(shown(result), flush=True)


def task_run(
    base: FoLoraConfig,
    testbed: Testbed,
    folder: Path,
    task: str,
    donor: Path | None,
    model: Path | None = None,
) -> Run:
    """A run on a task; what belongs to the base model is copied from another run, if it is there.

    Args:
        base: Options.
        testbed: For the rows and the seed.
        folder: Of the run.
        task: The task.
        donor: Folder of another run on the same model.
        model: Instead of the testbed's.
    """
    rows = folder / "rows.jsonl"
    write_text(rows, "".join(json.dumps(row) + "\n" for row in testbed.rows(task)))
    for part in ("1-samples", KeepMoments.path):
        if donor and (donor / part).exists() and not (folder / part).exists():
            shutil.copytree(donor / part, folder / part)
    paths = {"model": str(model or testbed.model), "dataset": str(rows), "output": str(folder)}
    return Run(base.changed({**paths, **testbed.options()}))


def calibrated(
    comparison: Comparison, testbed: Testbed, calibration: Mapping[str, Any]
) -> Comparison:
    """The comparison with C_pre measured on other texts than the run's own samples."""
    run = comparison.run
    run.sample()
    chosen = text_examples(testbed.texts(run, **calibration))
    context, config = run.context, run.config.statistics
    pre = measure(context.model, context.groups, chosen, config, "C_pre")
    return comparison.calibrated(dict(calibration), pre)


def shown(result: Mapping[str, Any]) -> str:
    """One line on the result of an arm."""
    readings = result["readings"]
    if "budget" not in result["config"]:
        readings = [reading for reading in readings if reading.get("scale", 1.0) == 1.0]
    last = readings[-1]
    kept = [value for value in last["kept"].values() if value is not None]
    mean = f"{sum(kept) / len(kept):.4f}" if kept else "-"
    task = "".join(f"{name} {value}, " for name, value in last["task"].items())
    return (
        f"{result['seed']} {result['task']} {result['name']}: {task}loss {last['task_loss']}, "
        f"retained {mean}, KL {last['kl']}, {result['seconds']} s"
    )


def parser(
    program: str = PROGRAM, about: str = "Compare methods by a plan."
) -> argparse.ArgumentParser:
    """The arguments of all programs that run the arms of a plan."""
    found = argparse.ArgumentParser(prog=f"python -m {program}", description=about)
    found.add_argument("--plan", type=Path, required=True, metavar="FILE.yaml")
    found.add_argument("--seeds", type=int, nargs="+", help="default: the plan's")
    found.add_argument("--tasks", nargs="+", help="default: the plan's")
    found.add_argument("--methods", nargs="+", help="of the plan's; default: all")
    found.add_argument("--learning-rates", nargs="+", type=float, help="likewise")
    found.add_argument("--threads", type=int, help="default: 1 for worlds, else all cores")
    found.add_argument("--device", help="instead of the plan's")
    found.add_argument("--dtype", help="instead of the plan's; bfloat16 is slow on many CPUs")
    found.add_argument("--models", type=Path, default=Path("models"), help="default: models")
    found.add_argument("--runs", type=Path, default=Path("runs"), help="default: runs")
    found.add_argument("--output", type=Path, help="default: benchmarks/results/PLAN.jsonl")
    return found


def started(program: str, options: argparse.Namespace, given: Sequence[str]) -> tuple[Plan, Places]:
    """The plan with what the command line changes, and the places; sets up logging and threads.

    Raises:
        ConfigError: The plan cannot be used, is for another program, or its model is unknown.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("folora").setLevel(logging.INFO)
    plan = Plan.load(options.plan)
    instead = {name: v for name in ("device", "dtype") if (v := getattr(options, name))}
    plan = replace(plan, base={**plan.base, **instead}, tasks=options.tasks or plan.tasks)
    check_names([plan.model], [*TESTBEDS])
    if plan.sequence != (program == SEQUENCE):
        raise ConfigError(
            f"{options.plan} is {'a' if plan.sequence else 'no'} sequence of tasks: run it by "
            f"python -m {SEQUENCE if plan.sequence else PROGRAM}"
        )
    if threads := options.threads or (1 if plan.model == "world" else None):
        torch.set_num_threads(threads)
    results = options.output or Path("benchmarks/results") / f"{options.plan.stem}.jsonl"
    command = f"python -m {program} {shlex.join(given)}"
    return plan, Places(options.models, options.runs, results, command)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    known = parser()
    known.add_argument("--train", type=Path, help="rows of your own task, for worlds")
    known.add_argument("--test", type=Path, help="its test rows")
    options = known.parse_args(given)
    plan, places = started(PROGRAM, options, given)
    testbed: Any = TESTBEDS[plan.model]
    if options.train or options.test:
        if plan.model != "world" or not (options.train and options.test):
            raise ConfigError("--train and --test belong together, and to plans of worlds")
        plan = replace(plan, tasks=[options.train.stem])
        testbed = partial(WorldTestbed, own=own_task(options.train, options.test))
    else:
        testbed.check(plan)
    arms = plan.arms(options.methods, options.learning_rates)
    for seed in options.seeds or plan.seeds:
        compare(plan, testbed(plan, seed, places.models), seed, arms, places)


def run_program(main: Callable[[], None]) -> None:
    """Run a command line; an error of folora ends it with its message."""
    try:
        main()
    except FoLoraError as error:
        print(f"folora: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run_program(main)
