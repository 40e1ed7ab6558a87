"""Results of experiments: a JSONL file with one line per arm, read as points of a frontier.

An arm is one training: a method with given options, one seed and one task. The readings of all arms of a
method, for one seed and task, are pooled into one set of points.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    GetPydanticSchema,
    ValidationError,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass

from folora.compare.frontier import Point
from folora.errors import ArtifactError, DataError
from folora.runtime.storage import exclusive, parse_json, read_text, write_text

FORMAT = 2
LOCK_SECONDS = 60.0  # maximum wait for another process that adds a result
REMEDY = "delete this line to rerun its arm"

Key = tuple[str, int, str]  # task, seed and name: no two lines of a file share all three
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]

NUMBERS = ("scale", "step", "task_loss", "kl", "ce_change", "frobenius", "h_norm")
SCORES = ("task", "kept", "other", "flips")  # numbers by name


def _complete(reading: dict[str, Any]) -> dict[str, Any]:
    """A reading on disk that has all its values. Raises ValueError."""
    reading = {"other": {}, "flips": {}, "scale": 1.0, **reading}
    for name in (*NUMBERS, *SCORES):
        if name not in reading:
            raise ValueError(f"{name!r} is missing")
        if isinstance(reading[name], dict) != (name in SCORES):
            raise ValueError(f"{name!r} is no {'mapping' if name in SCORES else 'number'}")
    if not reading["step"].is_integer():
        raise ValueError("'step' is no integer")
    return {**reading, "step": int(reading["step"])}


Reading = Annotated[
    Mapping[str, Any],
    GetPydanticSchema(lambda _, schema_of: schema_of(dict[str, Number | dict[str, Number]])),
    AfterValidator(_complete),
]
Readings = Annotated[
    Sequence[Reading], AfterValidator(lambda readings: sorted(readings, key=itemgetter("step")))
]


@dataclass(frozen=True)
class Scores:
    """How task and kept scores are computed from a reading; higher is better for both.

    Attributes:
        task_scored: If True, the task score is the mean of the reading's task scores, in [0, 1];
            otherwise minus the task loss, in nats per token.
        kept_scored: If True, the kept score is the mean of the reading's kept scores, in [0, 1];
            otherwise minus the KL to the base, in nats per token.
    """

    task_scored: bool
    kept_scored: bool

    def point(self, reading: Mapping[str, Any]) -> Point:
        """The point of one reading; NaN for missing values."""
        return Point(
            task=mean_score(reading["task"]) if self.task_scored else -reading["task_loss"],
            kept=mean_score(reading["kept"]) if self.kept_scored else -reading["kl"],
            kl=reading["kl"],
            frobenius=reading["frobenius"],
            h_norm=reading["h_norm"],
            step=reading["step"],
        )


@pydantic_dataclass(frozen=True, config=ConfigDict(strict=True))
class Result:
    """The result of one arm.

    Attributes:
        stage: Model (with its seed) and task.
        task: Name of the task.
        seed: Seed of the arm.
        method: Key of the method.
        title: Name of the method in tables.
        changes: Options changed in addition to the method's, by dotted name.
        command: Command that made it.
        config: The arm's config.
        versions: Versions of packages.
        seconds: Duration; None if not recorded.
        base: Reading of the base model, at step 0.
        readings: Readings during training, by step.
        diverged: Whether training diverged.
        place: File and line, for messages.
        calibration: Data that C_pre was measured on, if not on the run's samples.
        tokens: Of `compute.tokens_processed`; empty if they were not counted.
    """

    stage: str
    task: str
    seed: int
    method: str
    title: str
    changes: Mapping[str, Any]
    command: str
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float | None
    base: Reading
    readings: Readings
    diverged: bool
    place: str
    calibration: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)

    def points(self, scores: Scores) -> list[Point]:
        """The base and all readings, by step."""
        return [scores.point(reading) for reading in (self.base, *self.readings)]


class Line(NamedTuple):
    """One line of a file of results: file and line number for messages, and its values."""

    place: str
    values: dict[str, Any]


class ResultFile:
    """A JSONL file of results, to which several processes may add.

    Every addition rewrites the file atomically under a lock, so that a killed process leaves the file
    intact and no line is lost. Lines are sorted by task, seed and name, independent of the order in which
    arms end.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self) -> dict[Key, Line]:
        """All lines; empty if there is no file.

        Raises:
            ArtifactError: A line is damaged, truncated, not a result, of another format, or a duplicate.
                The message names file and line.
        """
        found: dict[Key, Line] = {}
        if not self.path.exists():
            return found
        for number, text in enumerate(read_text(self.path).split("\n"), 1):
            if not text.strip():
                continue
            line = _line(text, f"{self.path}, line {number}")
            task, seed, name = (line.values.get(field) for field in ("task", "seed", "name"))
            key = (str(task), int(seed) if isinstance(seed, int) else -1, str(name))
            if key in found:
                raise ArtifactError(
                    f"{line.place} has the same arm as {found[key].place}; {REMEDY}"
                )
            found[key] = line
        return found

    def add(self, result: Mapping[str, Any]) -> None:
        """Add the result of an arm; replaces a result with the same task, seed and name.

        Raises:
            ArtifactError: The file is damaged or cannot be written.
        """
        with exclusive(self.path.parent, LOCK_SECONDS):
            values = {key: line.values for key, line in self.read().items()}
            values[result["task"], result["seed"], result["name"]] = dict(result)
            text = "".join(json.dumps(values[key]) + "\n" for key in sorted(values))
            write_text(self.path, text)


def load_results(path: str | Path) -> list[Result]:
    """All results in a JSONL file, in the order of its lines.

    Raises:
        ArtifactError: The file is missing, or a line is not a result; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"there is no file of results {path}; run the comparison first")
    found = []
    for place, values in ResultFile(path).read().values():
        try:
            found.append(Result(**{**values, "place": place}))
        except ValidationError as error:
            wrong = error.errors()[0]
            name = ".".join(map(str, wrong["loc"]))
            given = "" if wrong["type"] == "missing" else f", not {wrong['input']!r:.80}"
            raise ArtifactError(f"{place}: {name}: {wrong['msg']}{given}; {REMEDY}") from error
    return found


def of_task(
    results: Iterable[Result], task: str, methods: Sequence[str] | None = None
) -> list[Result]:
    """Results of one task, by method in the order of `methods` (default: first appearance).

    Raises:
        DataError: There are none, or none of a requested method.
    """
    results = list(results)
    chosen = [r for r in results if r.task == task]
    if not chosen:
        tasks = ", ".join(sorted({r.task for r in results})) or "none"
        raise DataError(f"no results of task {task!r}; tasks with results: {tasks}")
    present = list(dict.fromkeys(r.method for r in chosen))
    for method in methods or ():
        if method not in present:
            raise DataError(
                f"no results of method {method!r} on task {task!r}; there are: {', '.join(present)}"
            )
    order = list(dict.fromkeys(methods or present))
    return [r for method in order for r in chosen if r.method == method]


def scores_of(results: Iterable[Result]) -> Scores:
    """How to score results of one task: whether their base readings have scores.

    Raises:
        DataError: Only some results have scores, so they cannot be compared; or a base reading lacks a
            value.
    """
    results = list(results)
    have_scores = []
    for kind in ("task", "kept"):
        scored = {bool(r.base[kind]) for r in results}
        if len(scored) > 1:
            without = next(r.place for r in results if not r.base[kind])
            raise DataError(f"{without} has no scores of {kind!r}, but other results have")
        have_scores.append(scored.pop() if scored else False)
    scores = Scores(*have_scores)
    for result in results:
        point = scores.point(result.base)
        if not (math.isfinite(point.task) and math.isfinite(point.kept)):
            raise DataError(f"the base of {result.place} has no task score or no kept score")
    return scores


def grouped(results: Iterable[Result]) -> dict[str, dict[int, list[Result]]]:
    """Results of one task by method (in order of appearance) and seed (ascending).

    Raises:
        DataError: Results with the same seed are of two tasks or stages, that is of two models.
    """
    results = list(results)
    groups: dict[str, dict[int, list[Result]]] = {r.method: {} for r in results}
    first: dict[int, Result] = {}
    for result in sorted(results, key=attrgetter("seed")):
        other = first.setdefault(result.seed, result)
        if (other.task, other.stage) != (result.task, result.stage):
            raise DataError(
                f"seed {result.seed} of task {result.task!r} has two stages, {other.stage!r} "
                f"({other.place}) and {result.stage!r} ({result.place}); compare one at a time"
            )
        groups[result.method].setdefault(result.seed, []).append(result)
    return groups


def point_sets(results: Iterable[Result]) -> dict[str, dict[int, list[Point]]]:
    """Points of all arms of one task by method and seed, including the base model.

    Raises:
        DataError: See `grouped` and `scores_of`.
    """
    results = list(results)
    scores = scores_of(results)
    return {
        method: {
            seed: [p for arm in arms for p in arm.points(scores)] for seed, arms in seeds.items()
        }
        for method, seeds in grouped(results).items()
    }


def mean_score(scores: Mapping[str, float]) -> float:
    """Mean of named scores; NaN if there are none or one is missing."""
    return sum(scores.values()) / len(scores) if scores else math.nan


def _line(text: str, place: str) -> Line:
    try:
        values = parse_json(text, place)
    except ArtifactError as error:  # it may be truncated
        raise ArtifactError(f"{error}; {REMEDY}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ArtifactError(f"{place} is not a result of format {FORMAT}; {REMEDY}")
    return Line(place, values)
