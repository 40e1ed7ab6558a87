"""What the comparisons share: options, plans and their arms, and what one task's run takes over."""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os.path import normpath
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from folora.compare.comparison import READ_AT, Arm, Comparison, arms
from folora.config import read_yaml
from folora.data.rows import text_examples
from folora.errors import ConfigError
from folora.pipeline.prepare import measure
from folora.pipeline.run import SAMPLES, STATISTICS, Run

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Methods, each with all learning rates and every value of further options (``knobs``)."""

    __pydantic_config__ = _STRICT
    methods: list[str]
    learning_rates: list[float]
    knobs: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The names in a plan and their types; what they mean: `benchmarks.world`, `benchmarks.real`."""

    __pydantic_config__ = _STRICT
    base: dict[str, Any]
    tasks: list[str]
    seeds: list[int]
    sweeps: list[Sweep]
    runs: str
    model: str = ""
    calibration: list[dict[str, Any] | None] = field(default_factory=lambda: [None])
    read_at: list[float] = field(default_factory=lambda: [*READ_AT])
    score_at: list[float] | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)


def run_arms(
    comparison: Comparison,
    run: Run,
    plan: Mapping[str, Any],
    due: Sequence[Arm],
    texts: Callable[..., list[list[int]]],
) -> None:
    """Run and show arms, for every ``calibration`` of a plan: with C_pre of other texts than the run's own.

    Args:
        comparison: Of the run.
        run: See above.
        plan: Without ``calibration``, the run's own texts are all.
        due: Which arms.
        texts: Given what stands in a calibration, token ids to measure C_pre on.
    """
    for calibration in plan.get("calibration", [None]):
        one = comparison
        if calibration:
            run.sample()
            chosen = text_examples(texts(**calibration))
            pre = measure(run.model, run.groups, chosen, run.config.statistics, "C_pre").matrices
            one = comparison.calibrated(calibration, pre)
        for result in one.run_all(due):
            print(shown(result), flush=True)


@dataclass(frozen=True)
class Places:
    """Where a comparison keeps things.

    Attributes:
        models: Folder of pretrained models.
        runs: Folder for samples and statistics.
        output: Folder for results.
        command: What was typed, for the record.
    """

    models: Path
    runs: Path
    output: Path
    command: str

    @classmethod
    def of(cls, options: argparse.Namespace, module: str, given: Sequence[str]) -> Places:
        """From what the options of `parser` say, and the words given to a module."""
        output = options.output or Path("benchmarks/results") / options.plan.stem
        command = f"python -m {module} {shlex.join(given)}"
        return cls(options.models, options.runs, output, command)


def parser(description: str, models: str, runs: str) -> argparse.ArgumentParser:
    """The options that every comparison by plan has."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--plan", type=Path, required=True)
    found.add_argument("--seeds", type=int, nargs="+", help="default: the plan's")
    found.add_argument("--models", type=Path, default=Path(models))
    found.add_argument("--runs", type=Path, default=Path(runs))
    found.add_argument("--output", type=Path, help="default: benchmarks/results/PLAN")
    return found


def read_plan(path: Path) -> dict[str, Any]:
    """A YAML file on top of those that it says to ``include``, by path from its own folder.

    Mappings are joined, name by name; anything else that stands later wins.

    Raises:
        ConfigError: A file cannot be read, or includes itself.
    """
    return _joined(path, ())


def _joined(path: Path, outer: tuple[Path, ...]) -> dict[str, Any]:
    if path in outer:
        raise ConfigError(f"{path} includes itself")
    values = read_yaml(path)
    found: dict[str, Any] = {}
    included = values.pop("include", [])
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise ConfigError(f"{path}: include is {included!r:.80}, but must be a list of files")
    for name in included:
        _join(found, _joined(Path(normpath(path.parent / name)), (*outer, path)))
    _join(found, values)
    return found


def _join(target: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(target.get(name), dict):
            _join(target[name], value)
        else:
            target[name] = value


def checked_plan(values: Mapping[str, Any]) -> dict[str, Any]:
    """A plan with the names and types that a comparison needs. Raises ConfigError."""
    try:
        return asdict(TypeAdapter(Plan).validate_python(values))
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"the plan cannot be used: {said}") from None


def planned(plan: Mapping[str, Any]) -> list[Arm]:
    """The arms of a plan's sweeps."""
    found: list[Arm] = []
    for sweep in plan["sweeps"]:
        knobs = sweep.get("knobs", {})
        found += arms(sweep["methods"], sweep["learning_rates"], **knobs)
    return found


def take_over(donor: Path | None, folder: Path) -> None:
    """Copy what belongs to the base model, not to the task: its samples and C_pre."""
    for part in (SAMPLES, f"{STATISTICS}/pre"):
        if donor and (donor / part).exists() and not (folder / part).exists():
            shutil.copytree(donor / part, folder / part)


def shown(result: Mapping[str, Any]) -> str:
    """One line on an arm that is done."""
    last = result["readings"][-1]
    kept = [value for value in last["kept"].values() if value is not None]
    mean = f"{sum(kept) / len(kept):.4f}" if kept else "-"
    task = "".join(f"{name} {value}, " for name, value in last["task"].items())
    return (
        f"{result['seed']} {result['task']} {result['name']}: {task}loss {last['task_loss']}, "
        f"kept {mean}, KL {last['kl']}, {result['seconds']} s"
    )
