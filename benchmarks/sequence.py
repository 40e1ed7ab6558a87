"""Teach tasks in a row, each on the merged model before it: ``python -m benchmarks.sequence --plan PLAN.yaml --seeds 0``.

For every seed and arm, the first task of the plan is trained, its adapter merged into the base in float32,
the second task trained on the merged model, and so on. Each stage is a whole run of folora: it samples its own
calibration text and measures its own second moments, so that earlier tasks are part of what it preserves. After
each stage the merged model is read on all tasks and against the original base. An arm is one line of the
results; arms that have a result are skipped, and an interrupted arm resumes at its last stage.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from shutil import rmtree
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from benchmarks.compare import (
    SEQUENCE,
    TESTBEDS,
    Places,
    Testbed,
    parser,
    run_program,
    started,
    task_run,
)
from benchmarks.former import FORMER, with_former
from benchmarks.plan import THEN, Plan
from benchmarks.readings import backward_transfer, mean_kl
from folora.compare.arms import Arm, checked_arm
from folora.compare.readings import Score, rounded
from folora.compare.results import FORMAT, ResultFile
from folora.config import FoLoraConfig
from folora.data.rows import text_examples
from folora.errors import ConfigError, NumericsError
from folora.metrics.meter import Meter
from folora.pipeline.run import Run
from folora.pipeline.training import ADAPTER
from folora.runtime.artifacts import software_versions
from folora.runtime.loading import load_model


@dataclass(frozen=True)
class Yardstick:
    """What every model of a sequence is read on.

    Attributes:
        testbed: For the scores.
        runs: A run of each task on the original base, for its rows; the first has the base's samples.
        score: What the base retains.
    """

    testbed: Testbed
    runs: Mapping[str, Run]
    score: Score

    @property
    def first(self) -> Run:
        """The run of the first task."""
        return next(iter(self.runs.values()))

    def read(self, model: Any, task: str, step: int) -> dict[str, Any]:
        """A reading of a merged model after `task`, in the format of results.

        ``kl`` is that to the original base on the original base's held-out samples; ``task_loss`` that of
        `task`, and ``other`` has those of all tasks.
        """
        samples, size = self.first.samples().held_out, self.first.config.statistics.batch_size
        losses = {
            name: Meter(samples, run.context.task.held_out, size).task_loss(model)
            for name, run in self.runs.items()
        }
        scores = self.score(model)
        found = {
            "step": step,
            "kl": mean_kl(self.first.context.model, model, text_examples(samples), size),
            "ce_change": None,
            "task_loss": losses[task],
            "frobenius": None,
            "h_norm": None,
            **scores,
            "task": {
                name: self.testbed.accuracy(run, name, model) for name, run in self.runs.items()
            },
            "other": {**scores.get("other", {}), **{f"{n}.loss": v for n, v in losses.items()}},
        }
        return rounded(found)  # type: ignore[no-any-return]


def sequence(plan: Plan, testbed: Testbed, seed: int, arms: Sequence[Arm], places: Places) -> None:
    """Run the arms for one seed, and print a line for each.

    Args:
        plan: The plan; its tasks are learned in their order.
        testbed: Of that seed.
        seed: See above.
        arms: Those of the plan that are wanted.
        places: Where to read and write.
    """
    base = FoLoraConfig().changed(plan.base)
    folder = places.runs / testbed.kind / plan.runs / str(seed)
    runs = {task: task_run(base, testbed, folder / task, task, None) for task in plan.tasks}
    first = runs[plan.tasks[0]]
    yardstick = Yardstick(testbed, runs, testbed.score(first, plan.tasks[0]))
    base_reading = cache(lambda: yardstick.read(first.context.model, plan.tasks[0], 0))
    results = ResultFile(places.results)
    for calibration, arm in product(plan.calibration, arms):
        config = first.config.changed({"method": arm.method, **arm.changes})
        former = calibration or {}
        name = "--".join([arm.name, *(f"{k}={v}" for k, v in former.items())])
        key = plan.learned[0], config.training_seed, name
        shared = first.share()
        made_from = {
            **first.context.facts,
            "data": [run.context.task.fingerprint for run in runs.values()],
            "samples": shared.samples.manifest["fingerprint"],
        }
        if key not in results.read():
            began = time.monotonic()
            place = folder / "sequence" / name
            readings, diverged = taught(config, yardstick, place, former.get("count", 0))
            result = {
                "format": FORMAT,
                "stage": testbed.stage,
                "task": key[0],
                "seed": key[1],
                "name": name,
                "method": arm.method,
                "title": config.method.title,
                "changes": arm.changes,
                "calibration": former,
                "command": places.command,
                "config": config.differences(),
                "versions": software_versions(),
                "seconds": round(time.monotonic() - began, 1),
                "base": base_reading(),
                "readings": readings,
                "diverged": diverged,
                "made_from": made_from,
            }
            results.add(result)
            rmtree(place)  # gigabytes, of which the result is all that is needed
        print(shown(checked_arm(results.read()[key], config, made_from)), flush=True)


def taught(
    config: FoLoraConfig, yardstick: Yardstick, folder: Path, former: int
) -> tuple[list[dict[str, Any]], bool]:
    """Teach the tasks one after the other.

    Args:
        config: Of the first task's run.
        yardstick: For the tasks and the readings.
        folder: Of the runs of all stages, and of the merged models.
        former: Prompts of each earlier task that are added to the calibration text, see `with_former`.

    Returns:
        A reading after each stage, and whether training diverged, which ends it.
    """
    model, steps = Path(str(config.model)), 0
    readings: list[dict[str, Any]] = []
    for number, task in enumerate(yardstick.runs, 1):
        own = folder / f"{number}-{task}"
        donor = None if readings else yardstick.first.folder
        run = task_run(config, yardstick.testbed, own, task, donor, model)
        if former and readings:
            run = with_former(run, list(yardstick.runs.values())[: len(readings)], former)
        try:
            steps += run.run()["steps"]
        except NumericsError:
            return readings, True
        model = merge(run, own / "merged")
        readings.append(yardstick.read(load_model(run.config, str(model)), task, steps))
    return readings, False


def merge(run: Run, target: Path) -> Path:
    """Write the run's base with its adapter merged by PEFT in float32, unless that is done; returns `target`."""
    if not target.exists():
        base: PreTrainedModel = load_model(run.config.changed({"dtype": "float32"}), run.name)
        adapted: Any = PeftModel.from_pretrained(base, str(run.folder / ADAPTER))
        partial = target.with_name(f"{target.name}.part")
        adapted.merge_and_unload().save_pretrained(partial)
        run.context.tokenizer.save_pretrained(partial)
        partial.rename(target)
    return target


def shown(result: Mapping[str, Any]) -> str:
    """One line on the result of an arm: the score of each task after each stage, and what is retained at the end."""
    tasks, readings = result["task"].split(THEN), result["readings"]
    scores = [reading["task"] for reading in readings]
    parts = [
        f"{task} {' '.join(f'{values[task]:.3f}' for values in scores)}"
        for task in tasks
    ]  # fmt: skip
    if len(scores) == len(tasks):
        parts.append(f"backward transfer {backward_transfer(scores, tasks):+.4f}")
    for reading in readings[-1:]:
        kept = reading["kept"].values()
        parts.append(f"retained {sum(kept) / len(kept):.4f}, KL {reading['kl']}")
    outcome = "diverged" if result["diverged"] else f"{result['seconds']} s"
    return f"{result['seed']} {result['name']}: {', '.join(parts)}, {outcome}"


def check(plan: Plan) -> None:
    """Refuse a plan that cannot be taught in a row. Raises ConfigError."""
    TESTBEDS[plan.model].check(replace(plan, calibration=[None]))
    if len(plan.tasks) < 2:
        raise ConfigError(f"a sequence needs at least two tasks, but the plan has {plan.tasks}")
    if plan.replay:
        raise ConfigError("replay must not be set: a sequence has no methods that replay real text")
    for calibration in plan.calibration:
        if calibration is not None and (
            calibration.get("source") != FORMER or calibration.get("count", 0) < 1
        ):
            raise ConfigError(
                f"calibration is {calibration}, but must be null or {{source: {FORMER}, count: 1 or more}}: each "
                "stage samples from its own model"
            )
    if plan.base.get("dtype") != "float32":
        raise ConfigError(
            f"dtype is {plan.base.get('dtype')!r}, but must be 'float32': in others the rounding of each "
            "merge would count as forgetting"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser(SEQUENCE, "Teach the tasks of a plan in a row.").parse_args(given)
    plan, places = started(SEQUENCE, options, given)
    check(plan)
    arms = plan.arms(options.methods, options.learning_rates)
    for seed in options.seeds or plan.seeds:
        testbed: Any = TESTBEDS[plan.model](plan, seed, places.models)
        sequence(plan, testbed, seed, arms, places)


if __name__ == "__main__":
    run_program(main)
