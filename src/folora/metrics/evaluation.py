"""Benchmarks of lm-evaluation-harness, asked of a model in memory.

Tasks are built once, from the harness's own collection or from a folder of YAML files, and asked of as
many models as one likes, so that a base and its adapted versions answer the same questions. Random
states, mode and adapter of the model are as before afterwards. Needs the extra ``folora[eval]``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
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

FEWSHOT_SEED = 1234  # the harness's own default

Answers = dict[str, dict[str, float]]
"""``{task: {metric: value}}``; a metric that has several filters is named ``metric,filter``."""


class Evaluation:
    """A fixed set of questions.

    Args:
        tasks: Names of tasks (or groups of them), each with the number of documents to ask, from the
            first on; None for all.
        tokenizer: Of the models that will be asked.
        folder: YAML tasks of one's own; the harness's are then left out.
        batch_size: Sequences a forward pass.
        num_fewshot: Examples in front of every question; default is each task's own number.
        max_new_tokens: A lower limit on what is generated than the tasks' own, for trials.
        options: What tasks that make their data are told, such as BABILong's ``max_seq_lengths``.
        chat_template: Wrap every question in the tokenizer's chat template.
        allow_code: Let tasks run programs that the model writes. The harness's own tasks run them on
            this machine, as you.

    Raises:
        ConfigError: A task is unknown, or runs programs without `allow_code`.
        DataError: The data of a task cannot be had.
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
            for found, task in loaded["tasks"].items():
                self._tasks[found] = task
                self._limits[found] = limit
        for name, task in self._tasks.items():
            _settle(name, task, num_fewshot, max_new_tokens, allow_code)

    @property
    def metrics(self) -> dict[str, set[str]]:
        """The metrics of every task and group, by name."""
        found = {name: set(task.aggregation()) for name, task in self._tasks.items()}
        for name, group in self._groups.items():
            found[name] = {m.metric for m in group.aggregate_metric_list or []}
        return found

    def check_metrics(self, wanted: Mapping[str, str]) -> None:
        """Refuse a metric that its task does not have; by task. Raises ConfigError."""
        for task, metric in wanted.items():
            there = self.metrics.get(task, set())  # a tag has none of its own
            if metric not in there:
                raise ConfigError(
                    f"evaluation task {task!r} has no metric {metric!r}{nearest(metric, there)}; it "
                    f"has {', '.join(sorted(there))}"
                )

    def __call__(self, model: Any) -> Answers:
        """Ask a model on its device; a PEFT model answers with its adapter, as it is now."""
        samples = {
            name: list(range(min(limit, len(task.eval_docs))))
            for name, task in self._tasks.items()
            if (limit := self._limits[name]) is not None
        }
        for task in self._tasks.values():
            task.set_fewshot_seed(FEWSHOT_SEED)  # it goes on from call to call otherwise
        padding = self.tokenizer.padding_side  # the harness turns it round to generate
        try:
            with evaluating(model):  # the harness leaves a model in evaluation mode
                lm = HFLM(
                    pretrained=model,
                    tokenizer=self.tokenizer,
                    batch_size=self.batch_size,
                    backend="causal",
                    softmax_dtype=torch.float32,  # bf16 keeps eight bits of a log-probability
                )
                found: Any = evaluate(
                    lm,
                    {"tasks": self._tasks, "groups": self._groups},  # type: ignore[arg-type]
                    samples=samples or None,
                    bootstrap_iters=0,
                    log_samples=False,
                    apply_chat_template=self.chat_template,
                    confirm_run_unsafe_code=self.allow_code,
                )
        finally:
            self.tokenizer.padding_side = padding
        return {name: _metrics(values) for name, values in found["results"].items()}


@cache
def _harness(options: str) -> TaskManager:
    """The harness's own index, once: it has fourteen thousand names and takes ten seconds."""
    return TaskManager(metadata=json.loads(options))


def _load(manager: TaskManager, name: str) -> Any:
    if name not in manager.task_index:
        raise ConfigError(f"unknown evaluation task {name!r}{nearest(name, manager.all_tasks)}")
    try:
        return manager.load([name])
    except Exception as error:  # loaders of many data sets, each with errors of its own
        raise DataError(f"the data of evaluation task {name!r} cannot be had: {error}") from error


def _settle(
    name: str,
    task: Task,
    num_fewshot: int | None,
    max_new_tokens: int | None,
    allow_code: bool,
) -> None:
    if getattr(task, "UNSAFE_CODE", False) and not allow_code:
        raise ConfigError(
            f"evaluation task {name!r} runs programs that the model writes; allow it (allow_code) "
            "only where they can do no harm"
        )
    default = task.get_config("num_fewshot")
    if default != 0 and (num_fewshot is not None or default is None):  # a 0 is the task's own wish
        task.set_config("num_fewshot", num_fewshot or 0)
    if max_new_tokens is not None and task.OUTPUT_TYPE == "generate_until":
        task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by metric, without standard errors, and without the filter where there is but one."""
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
