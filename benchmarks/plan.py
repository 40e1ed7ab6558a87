"""A plan: model, tasks, seeds, methods and learning rates to compare, read from YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from benchmarks.includes import read_included
from folora.compare.arms import Arm, arms
from folora.compare.readings import READ_AT
from folora.errors import ConfigError, nearest

RATE = "training.learning_rate"
THEN = ">"  # between the tasks of a sequence
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
    """A comparison.

    Attributes:
        model: ``"world"``, or a pretrained model: one of `benchmarks.compare.TESTBEDS`.
        tasks: What the model learns.
        seeds: Of everything but a pretrained model.
        base: Options that all arms share, by dotted name.
        sweeps: Methods and what is changed on top of them.
        runs: Folder for samples and statistics; plans with the same base may share it.
        calibration: What C_pre is measured on (``source`` and ``count``); None is the run's own samples.
            In a sequence ``source`` is ``"former"``, see `benchmarks.former`.
        read_at: Fractions of the training after which a reading is taken.
        score_at: Those at which scores are computed too; default: all.
        replay: Source of the real text that methods such as ``lora-replay-1`` replay: ``"pretraining"`` for
            worlds, ``"wikitext2"`` for pretrained models.
        scales: Factors of the trained update at which readings are taken too.
        h_norm: Whether readings have the H-norm of every update, for which all eigenvectors are solved.
        evaluation: Questions to a pretrained model, see `benchmarks.real.testbed`.
        sequence: Whether the tasks are learned in a row (`benchmarks.sequence`) instead of each on its own; readings
            are then taken after every task, and ``read_at``, ``score_at`` and ``scales`` are not used.
    """

    __pydantic_config__ = _STRICT
    model: str
    tasks: list[str]
    seeds: list[int]
    base: dict[str, Any]
    sweeps: list[Sweep]
    runs: str
    calibration: list[dict[str, Any] | None] = field(default_factory=lambda: [None])
    read_at: list[float] = field(default_factory=lambda: [*READ_AT])
    score_at: list[float] | None = None
    scales: list[float] = field(default_factory=list)
    h_norm: bool = True
    replay: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    sequence: bool = False

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a YAML file, which may include others. Raises ConfigError."""
        return cls.of(read_included(path), str(path))

    @classmethod
    def of(cls, values: Mapping[str, Any], name: str = "the plan") -> Plan:
        """From values by name. Raises ConfigError, with the names whose values are wrong."""
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ConfigError(f"{name} cannot be used: {wrong}") from None

    @property
    def learned(self) -> list[str]:
        """The tasks as results name them; a sequence is one."""
        return [THEN.join(self.tasks)] if self.sequence else self.tasks

    def arms(
        self,
        methods: Sequence[str] | None = None,
        learning_rates: Sequence[float] | None = None,
    ) -> list[Arm]:
        """The arms of all sweeps, or those with these methods and learning rates.

        Raises:
            ConfigError: No arm has one of them.
        """
        every = [
            arm
            for sweep in self.sweeps
            for arm in arms(sweep.methods, sweep.learning_rates, **sweep.knobs)
        ]
        chosen = [
            arm
            for arm in every
            if (methods is None or arm.method in methods)
            and (learning_rates is None or arm.changes[RATE] in learning_rates)
        ]
        for name in methods or ():
            if name not in {arm.method for arm in chosen}:
                methods_there = {arm.method for arm in every}
                hint = "" if name in methods_there else nearest(name, methods_there)
                raise ConfigError(f"the plan has no such arm with {name}{hint}")
        for rate in learning_rates or ():
            if rate not in {arm.changes[RATE] for arm in chosen}:
                raise ConfigError(f"the plan has no such arm with {rate}")
        return chosen


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ConfigError if a plan names what does not exist."""
    for name in names:
        if name not in known:
            raise ConfigError(
                f"the plan names {name!r}{nearest(name, known)}; known: {', '.join(known)}"
            )
