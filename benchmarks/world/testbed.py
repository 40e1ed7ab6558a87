"""Synthetic worlds as a testbed: a model pretrained on a world of its own for each seed.

Nothing is shared between seeds, so they may run in as many processes as there are cores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import GenerationConfig

from benchmarks.plan import Plan, check_names
from benchmarks.world.language import Row, Task, World, pretraining_documents, tasks
from benchmarks.world.pretrain import STEPS, pretrain
from benchmarks.world.score import score_rows, score_skills
from folora.compare.readings import Score, Scores
from folora.errors import ConfigError
from folora.pipeline.run import Run

FEWEST_ROWS = 300  # of a task that is memorised; fewer would leave nothing to hold out
EVERY = 3  # of the probes of pretraining skills; scoring all would cost as much as training
NARROW = "sum"  # the one skill that a narrow calibration set asks about
REAL = "pretraining"  # the text that the model was pretrained on
SOURCES = ("self", REAL, "narrow")


class WorldTestbed:
    """The world of a seed; its model is pretrained if there is none yet.

    Args:
        plan: Not used; see `benchmarks.compare.Testbed`.
        seed: Of the world, the weights and the training.
        models: Folder of models.
        own: Tasks instead of the world's, by name.
    """

    kind = "world"

    def __init__(
        self, plan: Plan, seed: int, models: Path, own: Mapping[str, Task] | None = None
    ) -> None:
        del plan
        self.seed, self.world = seed, World(seed)
        self.stage, self.model = f"world-{seed}", models / "world" / str(seed)
        self.tasks = own or tasks(self.world)
        if not self.model.exists():
            pretrain(self.model, seed, STEPS)
        run_through_documents(self.model)

    @staticmethod
    def check(plan: Plan) -> None:
        """Refuse a plan that cannot work before a model is pretrained. Raises ConfigError."""
        check_names(plan.tasks, [*tasks(World(0))])
        if plan.evaluation:
            raise ConfigError("evaluation must not be set: a world has its own questions")
        for calibration in plan.calibration:
            if calibration and calibration.get("source") not in SOURCES:
                raise ConfigError(
                    f"calibration is {calibration}, but its source must be in {SOURCES}"
                )
        if plan.replay:
            check_names([plan.replay], [REAL])

    def rows(self, task: str) -> list[Row]:
        """The task's training rows, repeated if they are few."""
        train = self.tasks[task].train
        repeats = max(1, FEWEST_ROWS // len(train))
        return [{**row, "prompt": "<bos>" + row["prompt"]} for row in train * repeats]

    def options(self) -> dict[str, Any]:
        """The seed of the training."""
        return {"training.seed": self.seed}

    def score(self, run: Run, task: str) -> Score:
        """Exact match on the task's test rows and on every pretraining skill."""

        def score(model: PeftModel) -> Scores:
            return {
                "task": {"accuracy": self.accuracy(run, task, model)},
                "kept": score_skills(model, run.context.tokenizer, self.world, EVERY),
            }

        return score

    def accuracy(self, run: Run, task: str, model: nn.Module) -> float:
        """Exact match on the task's test rows."""
        return score_rows(model, run.context.tokenizer, self.tasks[task].test)[0]

    def texts(self, run: Run, source: str, count: int) -> list[list[int]]:
        """Token ids to measure C_pre on or to replay.

        Args:
            run: For its tokenizer and self-samples.
            source: ``"self"``, ``"pretraining"`` (the true text) or ``"narrow"`` (sums alone).
            count: Sequences; those that are no self-samples are packed to a similar length.
        """
        if source == "self":
            return run.samples().calibration[:count]
        documents = pretraining_documents(self.world, self.world.rng(f"calibration {source}"))
        length = run.config.sampling.max_new_tokens
        bos, eos = run.context.tokenizer.bos_token, run.context.tokenizer.eos_token
        texts: list[list[int]] = []
        while len(texts) < count:
            ids: list[int] = []
            while len(ids) < length:
                text = next(documents)
                if source == REAL or text.startswith(NARROW):
                    ids += run.context.tokenizer(f"{bos}{text}{eos}")["input_ids"]
            texts.append(ids[:length])
        return texts


def run_through_documents(model: Path) -> None:
    """Have sampled text go on after a document's end, as the sequences of pretraining do."""
    settings = GenerationConfig.from_pretrained(model)
    if settings.eos_token_id != []:
        settings.eos_token_id = []
        settings.save_pretrained(model)


def own_task(train: Path, test: Path) -> dict[str, Task]:
    """A task from two JSONL files of rows with ``prompt`` and ``completion``, named like the first."""
    rows = (
        [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        for path in (train, test)
    )
    return {train.stem: Task(*rows)}
