"""Compare methods on pretrained models: ``python -m benchmarks.real.compare --plan PLAN.yaml``.

A seed decides the samples, which rows are held out, the order of training and the start of the
adapter, so seeds are repetitions of everything but the pretrained model. Kept is what the questions of
lm-evaluation-harness say before and after; what a target teaches is read as loss on held-out rows.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from benchmarks.gemma import gemma3_270m
from benchmarks.real.targets import TARGETS, data_folder, target_rows
from benchmarks.sweeps import planned, read_plan, shown, take_over
from demo.model import smollm2
from folora.artifacts import write_text
from folora.comparison import READ_AT, Comparison, Score, Scores
from folora.config import FoLoraConfig
from folora.errors import ConfigError, nearest
from folora.evaluation import Evaluation
from folora.pipeline import Run

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


def compare_model(
    plan: Mapping[str, Any],
    seed: int,
    methods: Container[str] | None,
    models: Path,
    runs: Path,
    output: Path,
    command: str,
) -> None:
    """Every target and arm of the plan for one seed.

    Args:
        plan: ``model``, ``base`` config by dotted name, ``tasks`` (targets), ``sweeps``, ``evaluation``.
        seed: See above.
        methods: Those of the plan that are run; default is all.
        models: Folder of pretrained models.
        runs: Folder for samples and statistics.
        output: Folder for results.
        command: For the record.
    """
    model = MODELS[plan["model"]](models)
    base = FoLoraConfig().changed(plan["base"])
    asked = plan["evaluation"]
    folder = runs / plan["runs"] / str(seed)
    score: Score | None = None
    donor: Path | None = None
    for target in plan["tasks"]:
        run = target_run(base, model, folder / target, target, donor, seed)
        donor = folder / target
        if score is None:
            evaluation = Evaluation(
                asked["documents"], run.tokenizer, folder=asked.get("folder"), batch_size=8
            )
            score = scorer(evaluation, asked["kept"], asked.get("other", {}))
        comparison = Comparison(
            run,
            output / target / str(seed),
            stage=plan["model"],
            task=target,
            command=command,
            score=score,
            read_at=plan.get("read_at", READ_AT),
            score_at=plan.get("score_at"),
        )
        due = [arm for arm in planned(plan) if methods is None or arm.method in methods]
        for result in comparison.run_all(due):
            print(shown(result), flush=True)


def check(plan: Mapping[str, Any]) -> None:
    """Refuse what cannot work before anything is downloaded or trained. Raises FoLoraError."""
    for word, known in (*((t, TARGETS) for t in plan["tasks"]), (plan["model"], MODELS)):
        if word not in known:
            raise ConfigError(f"the plan names {word!r}{nearest(word, known)}; known: {[*known]}")
    asked = plan["evaluation"]
    for task in (*asked["kept"], *asked.get("other", {})):
        if task not in asked["documents"]:
            raise ConfigError(f"evaluation.documents has no {task!r}, though a score is to be read")
    data_folder()
    planned(plan)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description="Compare methods on pretrained models.")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the plan's")
    parser.add_argument("--targets", nargs="+", help="default: the plan's tasks")
    parser.add_argument("--methods", nargs="+", help="of the plan; default: all")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--runs", type=Path, default=Path("runs/real"))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/PLAN")
    parser.add_argument("--threads", type=int, help="of torch; default: all cores")
    options = parser.parse_args(given)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("folora").setLevel(logging.INFO)
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = read_plan(options.plan)
    if options.targets:
        plan["tasks"] = options.targets
    check(plan)
    known = {arm.method for arm in planned(plan)}
    for name in options.methods or ():
        if name not in known:
            raise ConfigError(f"the plan has no method {name!r}{nearest(name, known)}")
    output = options.output or Path("benchmarks/results") / options.plan.stem
    command = f"python -m benchmarks.real.compare {shlex.join(given)}"
    for seed in options.seeds or plan["seeds"]:
        places = (options.models, options.runs, output)
        compare_model(plan, seed, options.methods, *places, command)


if __name__ == "__main__":
    main()
