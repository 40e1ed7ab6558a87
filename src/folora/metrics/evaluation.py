"""Benchmarks of lm-evaluation-harness on a model in memory.

Tasks are loaded once, from the harness or from a folder of YAML files, and evaluated on any number of
models, so that a base and its adapted versions are evaluated on the same documents. Random state, mode and
adapter of the model are restored afterwards. Needs the extra ``folora[eval]``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from folora.errors import ConfigError, DataError, nearest
from folora.runtime.contexts import evaluating
from folora.runtime.extras import needed_by

with needed_by("evaluation", "eval"):
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

FEWSHOT_SEED = 1234  # the harness's default

Answers = dict[str, dict[str, float]]
"""``{task: {metric: value}}``; a metric with several filters is named ``metric,filter``."""


@dataclass(frozen=True)
class Graded:
    """Which questions of a task a model answers right.

    Attributes:
        right: Whether each answer is right, in the order of the documents.
        guess: Odds of a right guess, 1 / (k - 1) with k choices, mean over the questions; 0 without choices.
    """

    right: Sequence[bool]
    guess: float


class Evaluation:
    """A fixed set of benchmark documents.

    Args:
        tasks: Names of tasks or groups, each with the number of documents to use, from the first; None
            for all.
        tokenizer: Of the models to evaluate.
        folder: Folder of custom YAML tasks; the harness's tasks are then not available.
        batch_size: Sequences per forward pass.
        num_fewshot: Number of few-shot examples; default is that of each task.
        max_new_tokens: Upper limit on generated tokens below that of the tasks, for quick trials.
        options: Task metadata, such as BABILong's ``max_seq_lengths``.
        chat_template: Apply the tokenizer's chat template.
        allow_code: Allow tasks that execute model-generated code. The harness executes it on this
            machine, with your rights.

    Raises:
        ConfigError: A task is unknown, or executes code without `allow_code`.
        DataError: The data of a task cannot be loaded.
    """

    def __init__(
        self,
        tasks: Mapping[str, int | None],
        tokenizer: PreTrainedTokenizerBase,
        *,
        folder: str | Path | None = None,
        batch_size: int = 16,
        num_fewshot: int | None = None,
        max_new_tokens: int | None = None,
        options: Mapping[str, Any] | None = None,
        chat_template: bool = False,
        allow_code: bool = False,
    ) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.chat_template, self.allow_code = chat_template, allow_code
        if folder is None:
            manager = _harness(json.dumps(options or {}))
        else:
            manager = TaskManager(
                include_path=str(folder), include_defaults=False, metadata=dict(options or {})
            )
        self._limits: dict[str, int | None] = {}
        self._tasks: dict[str, Task] = {}
        self._groups: dict[str, Group] = {}
        for name, limit in tasks.items():
            loaded = _load(manager, name)
            self._groups |= loaded["groups"]
            self._tasks |= loaded["tasks"]
            self._limits |= dict.fromkeys(loaded["tasks"], limit)
        for name, task in self._tasks.items():
            _configure(name, task, num_fewshot, max_new_tokens, allow_code)

    @property
    def metrics(self) -> dict[str, set[str]]:
        """The metrics of every task and group, by name."""
        found = {name: set(task.aggregation()) for name, task in self._tasks.items()}
        for name, group in self._groups.items():
            found[name] = {m.metric for m in group.aggregate_metric_list or []}
        return found

    def check_metrics(self, wanted: Mapping[str, str]) -> None:
        """Check that each task has the metric wanted of it. Raises ConfigError."""
        for task, metric in wanted.items():
            there = self.metrics.get(task, set())  # a tag has no metrics
            if metric not in there:
                raise ConfigError(
                    f"evaluation task {task!r} has no metric {metric!r}{nearest(metric, there)}; it "
                    f"has {', '.join(sorted(there))}"
                )

    def __call__(self, model: Any) -> Answers:
        """Evaluate a model on its device; a PEFT model with its active adapter."""
        return self.graded(model)[0]

    def graded(self, model: Any) -> tuple[Answers, dict[str, Graded]]:
        """The same, and single questions of the tasks that have the metric ``acc``."""
        samples = {
            name: list(range(min(limit, len(task.eval_docs))))
            for name, task in self._tasks.items()
            if (limit := self._limits[name]) is not None
        }
        for task in self._tasks.values():
            task.set_fewshot_seed(FEWSHOT_SEED)  # otherwise its state carries over between calls
        padding = self.tokenizer.padding_side  # the harness changes it for generation
        try:
            with evaluating(model):  # the harness leaves a model in evaluation mode
                lm = HFLM(
                    pretrained=model,
                    tokenizer=self.tokenizer,
                    batch_size=self.batch_size,
                    backend="causal",
                    softmax_dtype=torch.float32,  # bf16 has 8 significant bits
                )
                found: Any = evaluate(
                    lm,
                    {"tasks": self._tasks, "groups": self._groups},  # type: ignore[arg-type]
                    samples=samples or None,
                    bootstrap_iters=0,
                    apply_chat_template=self.chat_template,
                    confirm_run_unsafe_code=self.allow_code,
                )
        finally:
            self.tokenizer.padding_side = padding
        answers = {name: _metrics(values) for name, values in found["results"].items()}
        graded = {
            name: _graded(self._tasks[name], questions)
            for name, questions in found.get("samples", {}).items()
            if "acc" in questions[0]
        }
        return answers, graded


@cache
def _harness(options: str) -> TaskManager:
    """The harness's task index, cached: its 14,000 names take ten seconds to load."""
    return TaskManager(metadata=json.loads(options))


def _load(manager: TaskManager, name: str) -> Any:
    if name not in manager.task_index:
        raise ConfigError(f"unknown evaluation task {name!r}{nearest(name, manager.all_tasks)}")
    try:
        return manager.load([name])
    except Exception as error:  # loaders of many data sets, with many types of errors
        raise DataError(f"cannot load the data of evaluation task {name!r}: {error}") from error


def _configure(
    name: str, task: Task, num_fewshot: int | None, max_new_tokens: int | None, allow_code: bool
) -> None:
    if getattr(task, "UNSAFE_CODE", False) and not allow_code:
        raise ConfigError(
            f"evaluation task {name!r} executes code that the model generates; set allow_code=True only "
            "in a sandbox"
        )
    default = task.get_config("num_fewshot")
    if default is None or (num_fewshot is not None and default != 0):  # 0 requires zero-shot
        task.set_config("num_fewshot", num_fewshot or 0)
    if max_new_tokens is not None and task.OUTPUT_TYPE == "generate_until":
        task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Values by metric, without standard errors, and without the filter where there is only one."""
    found = {
        tuple(key.split(",", 1)): float(value)
        for key, value in values.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    names = [metric for metric, _ in found]
    return {
        metric if names.count(metric) == 1 else f"{metric},{rule}": value
        for (metric, rule), value in found.items()
    }


def _graded(task: Any, questions: Sequence[Mapping[str, Any]]) -> Graded:
    """Of the first filter, if there are several."""
    questions = [q for q in questions if q["filter"] == questions[0]["filter"]]
    guess = 0.0
    if task.OUTPUT_TYPE == "multiple_choice":
        guess = mean(1 / max(1, len(task.doc_to_choice(q["doc"])) - 1) for q in questions)
    return Graded([bool(q["acc"]) for q in questions], guess)
