"""A recipe: training data, training and evaluation, read from YAML and checked when it is built.

A recipe may ``include`` others (see `benchmarks.includes.read_included`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from benchmarks.includes import read_included
from folora.compare.arms import Arm, arms
from folora.config import FoLoraConfig
from folora.errors import ConfigError, nearest

TASKS = Path(__file__).parent / "tasks"

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows to train on.

    Attributes:
        dataset: A Hub name or a local file.
        split: Of a Hub data set.
        count: Training rows, the first that there are; `data.eval_rows` more are held out.
        prompt: Template of the prompt, filled with a row's columns (``{query}``; nested ones as
            ``{conversations[0][value]}``). No loss falls on it.
        completion: Template of the response.
        max_characters: Rows whose prompt and completion together are longer are passed over.
    """

    __pydantic_config__ = _STRICT
    dataset: str
    split: str = "train"
    count: int
    prompt: str
    completion: str
    max_characters: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"data.count is {self.count}, but must be >= 1")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Questions to ask.

    Attributes:
        task: A task or group of lm-evaluation-harness, or one in the folder ``tasks``.
        metric: The metric that is the score, in [0, 1].
        shots: Examples in front of every question; default is the task's own number.
        limit: Documents to ask, from the first on; default all.
        batch_size: Sequences a forward pass.
    """

    __pydantic_config__ = _STRICT
    task: str
    metric: str
    shots: int | None = None
    limit: int | None = None
    batch_size: int = 16

    @property
    def own(self) -> bool:
        """Whether the task is one of ours rather than the harness's."""
        return (TASKS / f"{self.task}.yaml").exists()


@dataclass(frozen=True, kw_only=True)
class Passages:
    """Texts on which the loss is read; the score is exp(-loss), in [0, 1].

    Attributes:
        dataset: A Hub name; read as a stream, since only its beginning is wanted.
        split: Of the data set.
        column: Of the text.
        count: Texts, the first that there are.
        max_length: Tokens of each.
    """

    __pydantic_config__ = _STRICT
    dataset: str
    split: str = "train"
    column: str = "text"
    count: int
    max_length: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One experiment.

    Attributes:
        stage: What model this is, for tables.
        task: What target this is, likewise.
        data: Training rows.
        base: Options of folora by dotted name.
        methods: Methods, each with its learning rates.
        seeds: Seeds of initialization and order.
        read_at: Shares of the training after which everything is asked.
        target: Benchmarks of the target.
        kept: Benchmarks, or passages, of what should be kept.
        benchmarks: Questions by the name that a table gives them.
        passages: Texts likewise.
        options: What the harness's tasks are told; see `folora.metrics.evaluation.Evaluation`.
    """

    __pydantic_config__ = _STRICT
    stage: str
    task: str
    data: Rows
    base: dict[str, Any]
    methods: dict[str, list[float]]
    seeds: list[int]
    read_at: list[float]
    target: list[str]
    kept: list[str]
    benchmarks: dict[str, Benchmark]
    passages: dict[str, Passages] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("methods", "seeds", "read_at"):
            if not getattr(self, name):
                raise ConfigError(f"the recipe's {name!r} is empty, but must name at least one")
        known = {*self.benchmarks, *self.passages}
        for name in (*self.target, *self.kept):
            _known(name, known, "benchmark")
        twice = set(self.target) & set(self.kept)
        if twice:
            raise ConfigError(f"both target and kept: {', '.join(sorted(twice))}; choose one")
        base = self.config
        for method, rates in self.methods.items():
            for rate in rates:
                base.changed({"method": method, "training.learning_rate": rate})

    @property
    def config(self) -> FoLoraConfig:
        """The base config. Raises ConfigError."""
        return FoLoraConfig().changed(self.base)

    @property
    def asked(self) -> dict[str, Benchmark]:
        """The benchmarks that are asked, by name, without the passages."""
        names = (*self.target, *self.kept)
        return {name: self.benchmarks[name] for name in names if name in self.benchmarks}

    def arms(self) -> list[Arm]:
        """Every method with its learning rates and seeds."""
        return [
            arm
            for method, rates in self.methods.items()
            for arm in arms([method], rates, **{"training.seed": self.seeds})
        ]


def read_recipe(path: Path) -> Recipe:
    """Read a recipe with all that it includes. Raises ConfigError."""
    return recipe_of(read_included(path), str(path))


def recipe_of(values: Mapping[str, Any], source: str) -> Recipe:
    """Build a recipe from what YAML gives; `source` is for messages. Raises ConfigError."""
    try:
        return TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {'; '.join(map(_explain, error.errors()))}") from None


def chosen(names: Iterable[str], known: Mapping[str, Any], kind: str) -> list[str]:
    """The names that a user asked for. Raises ConfigError for one that the recipe does not have."""
    found = list(names)
    for name in found:
        _known(name, known, kind)
    return found


def _known(name: str, known: Iterable[str], kind: str) -> None:
    known = list(known)
    if name not in known:
        raise ConfigError(
            f"the recipe has no {kind} {name!r}{nearest(name, known)}; there are {', '.join(known)}"
        )


def _explain(error: Any) -> str:
    """One of pydantic's errors in one sentence."""
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "unexpected_keyword_argument":
        return f"unknown entry {name!r}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] in ("missing", "missing_argument"):
        return f"{name} is missing"
    return f"{name} is {error['input']!r}: {error['msg']}"
