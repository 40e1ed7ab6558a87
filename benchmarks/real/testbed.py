"""Pretrained models as a testbed: real data sets to learn, lm-evaluation-harness tasks to retain.

A seed decides the samples, which rows are held out, the order of training and the initialization of
the adapter, so seeds repeat everything but the pretrained model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from benchmarks.models import MODELS
from benchmarks.plan import Plan, check_names
from benchmarks.readings import adapter_off, exact_match, flips, mean_kl, prompt_of
from benchmarks.real.targets import TARGETS, data_folder, target_rows
from benchmarks.tasks.utils import passages
from folora.compare.readings import Score, Scores
from folora.data.contents import Example
from folora.data.files import load_rows
from folora.data.rows import text_examples
from folora.errors import ConfigError
from folora.metrics.evaluation import Evaluation, Graded
from folora.pipeline.run import Run

REAL = "wikitext2"  # text of the kind that pretraining had


class RealTestbed:
    """A pretrained model with the seed's own samples and held-out rows.

    Args:
        plan: For its model and ``evaluation``: ``documents`` per lm-eval task, the metric in [0, 1] of
            each task that counts as retained (``kept``), metrics to record besides (``other``),
            ``folder`` of task files (None: those of the Hub), ``batch_size``, and on how many texts KL to the
            base is read besides (``kl``: ``prompts`` of held-out rows, ``wikitext``).
        seed: See above.
        models: Folder of models.
    """

    kind = "real"

    def __init__(self, plan: Plan, seed: int, models: Path) -> None:
        self.seed, self.stage, self.asked = seed, plan.model, plan.evaluation
        self.model = MODELS[plan.model](models)
        self._scorer: Scorer | None = None

    @staticmethod
    def check(plan: Plan) -> None:
        """Refuse what cannot work before anything is downloaded or trained. Raises FoLoraError."""
        check_names(plan.tasks, [*TARGETS])
        asked = plan.evaluation
        for task in (*asked["kept"], *asked.get("other", {})):
            if task not in asked["documents"]:
                raise ConfigError(f"evaluation.documents has no {task!r}, but a metric names it")
        check_names([*asked.get("kl", {})], [*TEXTS])
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
        """Scores on all benchmarks, and KL to the base on the texts that the plan asks for."""
        if self._scorer is None:
            asked = self.asked
            evaluation = Evaluation(
                asked["documents"],
                run.context.tokenizer,
                folder=asked.get("folder"),
                batch_size=asked.get("batch_size", 8),
                options={"tokenizer": str(self.model)},
            )
            self._scorer = Scorer(evaluation, asked["kept"], asked.get("other", {}))
        scorer, size = self._scorer, run.config.statistics.batch_size

        @cache
        def texts() -> dict[str, list[Example]]:
            return {name: TEXTS[name](run, n) for name, n in self.asked.get("kl", {}).items()}

        def score(model: PeftModel) -> Scores:
            base = run.context.model
            found = scorer(model, base)
            found["other"] |= {
                f"kl.{name}": mean_kl(base, model, chosen, size) for name, chosen in texts().items()
            }
            return found

        return score

    def accuracy(self, run: Run, task: str, model: nn.Module) -> float:
        """Exact match on the held-out rows."""
        return exact_match(model, run.context.task.held_out, run.config.statistics.batch_size)

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


class Scorer:
    """Answers as scores, and as flips against those of the base.

    Args:
        evaluation: The questions.
        kept: By lm-eval task, the metric in [0, 1] that counts as retained.
        other: By lm-eval task, a metric of any scale to record besides.

    Raises:
        ConfigError: A task has no such metric.
    """

    def __init__(
        self, evaluation: Evaluation, kept: Mapping[str, str], other: Mapping[str, str]
    ) -> None:
        evaluation.check_metrics(kept)
        evaluation.check_metrics(other)
        self.evaluation, self.kept, self.other = evaluation, kept, other
        self._base: dict[str, Graded] = {}

    def __call__(self, model: Any, base: Any) -> Scores:
        """Scores of a model; `base` is evaluated at the first call, without the adapter that it may carry."""
        if not self._base:
            with adapter_off(model):
                self._base = self.evaluation.graded(base)[1]
        answers, graded = self.evaluation.graded(model)
        return {
            "task": {},
            "kept": {task: answers[task][metric] for task, metric in self.kept.items()},
            "other": {
                f"{task}.{metric}": answers[task][metric]
                for task in answers
                for metric in dict.fromkeys((self.other.get(task, "acc"), "acc"))
                if metric in answers[task]
            },
            "flips": {
                f"{task}.{name}": value
                for task, after in graded.items()
                for name, value in flips(self._base[task], after).items()
            },
        }


def _prompts(run: Run, count: int) -> list[Example]:
    """The prompts of the first held-out rows."""
    return text_examples(prompt_of(row) for row in run.context.task.held_out[:count])


def _wikitext(run: Run, count: int) -> list[Example]:
    """Passages of WikiText-2's test set, of 1000 characters."""
    texts = passages("wikitext2/test.jsonl.gz", 1000)["test"]["text"][:count]
    return text_examples(run.context.tokenizer(text)["input_ids"] for text in texts)


TEXTS: Mapping[str, Callable[[Run, int], list[Example]]] = {
    "prompts": _prompts,
    "wikitext": _wikitext,
}
"""Texts on which KL to the base may be read."""
