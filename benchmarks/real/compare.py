"""Compare methods on pretrained models: ``python -m benchmarks.real.compare --plan PLAN.yaml``.

A seed decides the samples, which rows are held out, the order of training and the start of the
adapter, so seeds are repetitions of everything but the pretrained model. Kept is what the questions of
lm-evaluation-harness say before and after; what a target teaches is read as loss on held-out rows.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from benchmarks.gemma import gemma3_270m
from benchmarks.real.targets import TARGETS, data_folder, target_rows
from benchmarks.source import RATE
from benchmarks.sweeps import Places, checked_plan, parser, planned, read_plan, run_arms, take_over
from demo.model import smollm2
from folora.compare.comparison import READ_AT, Arm, Comparison, Score, Scores
from folora.config import FoLoraConfig
from folora.errors import ConfigError, nearest
from folora.metrics.evaluation import Evaluation
from folora.pipeline.run import Run
from folora.runtime.storage import write_text

MODELS: Mapping[str, Callable[[Path], Path]] = {"smollm2": smollm2, "gemma3": gemma3_270m}


def scorer(evaluation: Evaluation, kept: Mapping[str, str], other: Mapping[str, str]) -> Score:
    """Answers as scores.

    Args:
        evaluation: Whom to ask.
        kept: By task, the metric in [0, 1] that counts as its kept score.
        other: By task, a metric of any scale to write down as well.

    Raises:
        ConfigError: A task has no such metric.
    """
    evaluation.check_metrics(kept)
    evaluation.check_metrics(other)

    def score(model: PeftModel) -> Scores:
        answers = evaluation(model)
        return {
            "task": {},
            "kept": {task: answers[task][metric] for task, metric in kept.items()},
            "other": {
                f"{task}.{metric}": answers[task][metric]
                for task in answers
                for metric in dict.fromkeys((other.get(task, "acc"), "acc"))
                if metric in answers[task]
            },
        }

    return score


def target_run(
    base: FoLoraConfig, model: Path, folder: Path, target: str, donor: Path | None, seed: int
) -> Run:
    """A run on a target; what belongs to the base model is taken over from another target's."""
    rows = folder / "rows.jsonl"
    write_text(rows, "".join(json.dumps(row) + "\n" for row in target_rows(target)))
    take_over(donor, folder)
    named = {"model": str(model), "dataset": str(rows), "output": str(folder)}
    seeds = dict.fromkeys(("training.seed", "sampling.seed", "data.seed"), seed)
    return Run(base.changed({**named, **seeds}))


def own_texts(run: Run, source: str, count: int) -> list[list[int]]:
    """The first of what the model wrote itself (source ``"self"``), to measure C_pre on."""
    assert source == "self"  # `check` sees to that
    return run.proxies().calibration[:count]


def compare_model(plan: Mapping[str, Any], seed: int, due: Sequence[Arm], places: Places) -> None:
    """Every target and arm for one seed.

    Args:
        plan: ``model``, ``base`` config by dotted name, ``tasks`` (targets), ``evaluation``.
        seed: See above.
        due: Arms of the plan.
        places: For models, samples, statistics and results.
    """
    model = MODELS[plan["model"]](places.models)
    base = FoLoraConfig().changed(plan["base"])
    asked = plan["evaluation"]
    folder = places.runs / plan["runs"] / str(seed)
    score: Score | None = None
    donor: Path | None = None
    for target in plan["tasks"]:
        run = target_run(base, model, folder / target, target, donor, seed)
        donor = folder / target
        if score is None:
            evaluation = Evaluation(
                asked["documents"],
                run.tokenizer,
                folder=asked.get("folder"),
                batch_size=asked.get("batch_size", 8),
            )
            score = scorer(evaluation, asked["kept"], asked.get("other", {}))
        comparison = Comparison(
            run,
            places.output / target / str(seed),
            stage=plan["model"],
            task=target,
            command=places.command,
            score=score,
            read_at=plan.get("read_at", READ_AT),
            score_at=plan.get("score_at"),
        )
        run_arms(comparison, run, plan, due, partial(own_texts, run))


def chosen(
    plan: Mapping[str, Any],
    methods: Sequence[str] | None = None,
    learning_rates: Sequence[float] | None = None,
) -> list[Arm]:
    """The arms of a plan with these methods and learning rates, or all.

    Raises:
        ConfigError: The plan has none with one of them.
    """
    arms = planned(plan)
    due = [
        arm
        for arm in arms
        if (methods is None or arm.method in methods)
        and (learning_rates is None or arm.changes[RATE] in learning_rates)
    ]
    for name in methods or ():
        if name not in {arm.method for arm in due}:
            hint = nearest(name, {arm.method for arm in arms})
            raise ConfigError(f"the plan has no such arm with {name}{hint}")
    for rate in learning_rates or ():
        if rate not in {arm.changes[RATE] for arm in due}:
            raise ConfigError(f"the plan has no such arm with {rate}")
    return due


def check(plan: Mapping[str, Any]) -> None:
    """Refuse what cannot work before anything is downloaded or trained. Raises FoLoraError."""
    for word, known in (*((t, TARGETS) for t in plan["tasks"]), (plan["model"], MODELS)):
        if word not in known:
            raise ConfigError(f"the plan names {word!r}{nearest(word, known)}; known: {[*known]}")
    asked = plan["evaluation"]
    for task in (*asked["kept"], *asked.get("other", {})):
        if task not in asked["documents"]:
            raise ConfigError(f"evaluation.documents has no {task!r}, though a score is to be read")
    for calibration in plan.get("calibration", []):
        if calibration and calibration["source"] != "self":
            raise ConfigError(f"calibration is {calibration}, but its source must be 'self' here")
    data_folder()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    known = parser("Compare methods on pretrained models.", "models", "runs/real")
    known.add_argument("--targets", nargs="+", help="default: the plan's tasks")
    known.add_argument("--methods", nargs="+", help="of the plan; default: all")
    known.add_argument("--learning-rates", nargs="+", type=float, help="of the plan; default: all")
    known.add_argument("--threads", type=int, help="of torch; default: all cores")
    known.add_argument("--device", help="instead of the plan's")
    known.add_argument("--dtype", help="instead of the plan's: bfloat16 takes hours on many a CPU")
    options = known.parse_args(given)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("folora").setLevel(logging.INFO)
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = checked_plan(read_plan(options.plan))
    if options.targets:
        plan["tasks"] = options.targets
    plan["base"] |= {k: v for k in ("device", "dtype") if (v := getattr(options, k)) is not None}
    check(plan)
    due = chosen(plan, options.methods, options.learning_rates)
    places = Places.of(options, "benchmarks.real.compare", given)
    for seed in options.seeds or plan["seeds"]:
        compare_model(plan, seed, due, places)


if __name__ == "__main__":
    main()
