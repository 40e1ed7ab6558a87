"""Pretrained models as a testbed: real data sets to learn, lm-evaluation-harness tasks to retain.

A seed decides the samples, which rows are held out, the order of training and the initialization of
the adapter, so seeds repeat everything but the pretrained model.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel

from benchmarks.models import MODELS
from benchmarks.plan import Plan, check_names
from benchmarks.real.targets import TARGETS, data_folder, target_rows
from folora.compare.comparison import Score, Scores
from folora.data.files import load_rows
from folora.errors import ConfigError
from folora.metrics.evaluation import Evaluation
from folora.pipeline.run import Run

REAL = "wikitext2"  # text of the kind that pretraining had


class RealTestbed:
    """A pretrained model with the seed's own samples and held-out rows.

    Args:
        plan: For its model and ``evaluation``: ``documents`` per lm-eval task, the metric in [0, 1] of
            each task that counts as retained (``kept``), metrics to record besides (``other``),
            ``folder`` of task files (None: those of the Hub) and ``batch_size``.
        seed: See above.
        models: Folder of models.
    """

    kind = "real"

    def __init__(self, plan: Plan, seed: int, models: Path) -> None:
        self.seed, self.stage, self.asked = seed, plan.model, plan.evaluation
        self.model = MODELS[plan.model](models)
        self._score: Score | None = None

    @staticmethod
    def check(plan: Plan) -> None:
        """Refuse what cannot work before anything is downloaded or trained. Raises FoLoraError."""
        check_names(plan.tasks, [*TARGETS])
        asked = plan.evaluation
        for task in (*asked["kept"], *asked.get("other", {})):
            if task not in asked["documents"]:
                raise ConfigError(f"evaluation.documents has no {task!r}, but a metric names it")
        for calibration in plan.calibration:
            if calibration and calibration["source"] not in ("self", REAL):
                raise ConfigError(
                    f"calibration is {calibration}, but its source must be 'self' or {REAL!r} here"
                )
        if plan.replay:
            check_names([plan.replay], [REAL])
        data_folder()

    def rows(self, task: str) -> list[dict[str, str]]:
        """All training rows of a data set."""
        return target_rows(task)

    def options(self) -> dict[str, Any]:
        """The seed of training, samples and held-out rows."""
        return {"seed": self.seed}

    def score(self, run: Run, task: str) -> Score:
        """Scores on all benchmarks, the same for every target."""
        if self._score is None:
            asked = self.asked
            evaluation = Evaluation(
                asked["documents"],
                run.context.tokenizer,
                folder=asked.get("folder"),
                batch_size=asked.get("batch_size", 8),
            )
            self._score = scorer(evaluation, asked["kept"], asked.get("other", {}))
        return self._score

    def texts(self, run: Run, source: str, count: int) -> list[list[int]]:
        """Token ids to measure C_pre on or to replay.

        Args:
            run: For its tokenizer, start token and samples.
            source: ``"self"``, or ``"wikitext2"``: pieces of its validation articles, which share no line of text with
                the test articles that are scored. They have a sample's length, and the seed orders them.
            count: Sequences.
        """
        if source == "self":
            return run.samples().calibration[:count]
        context, length = run.context, run.config.sampling.max_new_tokens
        pieces = []
        for article in load_rows(str(data_folder() / "wikitext2" / "validation.jsonl.gz")):
            ids = context.tokenizer(article["text"], add_special_tokens=False)["input_ids"]
            pieces += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        random.Random(self.seed).shuffle(pieces)
        return [[context.start_id, *piece] for piece in pieces[:count]]


def scorer(evaluation: Evaluation, kept: Mapping[str, str], other: Mapping[str, str]) -> Score:
    """Answers as scores.

    Args:
        evaluation: The questions.
        kept: By lm-eval task, the metric in [0, 1] that counts as retained.
        other: By lm-eval task, a metric of any scale to record besides.

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
