"""Compare methods on worlds: ``python -m benchmarks.world.compare --plan PLAN.yaml``.

For every seed a world is pretrained if it is not there yet, and for every task the arms of the plan
are run that have no result yet. Nothing is shared between seeds, so they can be given to as many
processes as there are cores. A task of one's own is two files of rows, ``prompt`` and ``completion``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from benchmarks.sweeps import Places, checked_plan, parser, planned, read_plan, run_arms, take_over
from benchmarks.world.language import Row, Task, World, pretraining_documents, tasks
from benchmarks.world.pretrain import STEPS, pretrain
from benchmarks.world.score import score_rows, score_skills
from folora.compare.comparison import READ_AT, Comparison, Score, Scores
from folora.config import FoLoraConfig
from folora.pipeline.run import Run

FEWEST_ROWS = 300  # of a task that is memorised; fewer would leave nothing to hold out
EVERY = 3  # of the probes of kept skills; scoring all would cost as much as training
NARROW = "sum"  # the one skill that a narrow calibration set asks about


def scorer(run: Run, world: World, task: Task) -> Score:
    """Exact match on the task's test rows and on every kept skill."""

    def score(model: PeftModel) -> Scores:
        return {
            "task": {"accuracy": score_rows(model, run.tokenizer, task.test)[0]},
            "kept": score_skills(model, run.tokenizer, world, EVERY),
        }

    return score


def prepared_run(
    base: FoLoraConfig, model: Path, folder: Path, task: Task, donor: Path | None, seed: int
) -> Run:
    """A run on a world's task; what belongs to the base model is taken over from another task's."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    repeats = max(1, FEWEST_ROWS // len(task.train))
    lines = [json.dumps({**r, "prompt": "<bos>" + r["prompt"]}) for r in task.train * repeats]
    rows.write_text("\n".join(lines) + "\n")
    take_over(donor, folder)
    return Run(
        base.changed(
            {
                "model": str(model),
                "dataset": str(rows),
                "output": str(folder),
                "training.seed": seed,
            }
        )
    )


def calibration_texts(run: Run, world: World, source: str, count: int) -> list[list[int]]:
    """Token ids to measure C_pre on.

    Args:
        run: For its tokenizer and self-samples.
        world: For its pretraining text.
        source: ``"self"``, ``"pretraining"`` (the true text) or ``"narrow"`` (sums alone).
        count: Sequences; texts that are no self-samples are packed to a similar length.
    """
    if source == "self":
        return run.proxies().calibration[:count]
    documents = pretraining_documents(world, world.rng(f"calibration {source}"))
    length = run.config.sampling.max_new_tokens
    bos, eos = run.tokenizer.bos_token, run.tokenizer.eos_token
    texts: list[list[int]] = []
    while len(texts) < count:
        ids: list[int] = []
        while len(ids) < length:
            text = next(documents)
            if source == "pretraining" or text.startswith(NARROW):
                ids += run.tokenizer(f"{bos}{text}{eos}")["input_ids"]
        texts.append(ids[:length])
    return texts


def compare_world(
    plan: dict[str, Any], seed: int, chosen: dict[str, Task] | None, places: Places
) -> None:
    """Every task and arm of the plan for one seed.

    Args:
        plan: ``base`` config by dotted name, ``tasks``, ``sweeps``, perhaps ``calibration``.
        seed: Of world, weights and training.
        chosen: Tasks instead of the plan's.
        places: For worlds, samples, statistics and results.
    """
    world, model = World(seed), places.models / str(seed)
    if not model.exists():
        pretrain(model, seed, STEPS)
    base = FoLoraConfig().changed(plan["base"])
    found = chosen or {name: tasks(world)[name] for name in plan["tasks"]}
    folder = places.runs / plan["runs"] / str(seed)
    donor: Path | None = None
    for name, task in found.items():
        run = prepared_run(base, model, folder / name, task, donor, seed)
        donor = folder / name
        score = scorer(run, world, task)
        comparison = Comparison(
            run,
            places.output / name / str(seed),
            stage=f"world-{seed}",
            task=name,
            command=places.command,
            score=score,
            read_at=plan.get("read_at", READ_AT),
            score_at=plan.get("score_at"),
        )
        run_arms(comparison, run, plan, planned(plan), partial(calibration_texts, run, world))


def read_rows(path: Path) -> list[Row]:
    """Rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    known = parser("Compare methods on synthetic worlds.", "models/world", "runs/world")
    known.add_argument("--train", type=Path, help="rows of a task of one's own")
    known.add_argument("--test", type=Path, help="its test rows")
    options = known.parse_args(given)
    torch.set_num_threads(1)
    plan = checked_plan(read_plan(options.plan))
    chosen = None
    if options.train:
        chosen = {options.train.stem: Task(read_rows(options.train), read_rows(options.test))}
    places = Places.of(options, "benchmarks.world.compare", given)
    for seed in options.seeds or plan["seeds"]:
        compare_world(plan, seed, chosen, places)


if __name__ == "__main__":
    main()
