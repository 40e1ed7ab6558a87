"""Plans and results of comparisons: what was planned, what was run, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.plan import RATE, Plan
from benchmarks.rivals import RIVALS
from benchmarks.spectra import FORMAT as SPECTRA
from benchmarks.speed.shapes import SHAPES
from benchmarks.speed.whole import FORMAT as SETUP
from folora.compare.results import Result, load_results
from folora.errors import ConfigError, DataError, nearest
from folora.methods import METHODS
from folora.runtime.storage import read_json

MAIN = "world_methods"

Identity = tuple[str, int, str, str, str]  # task, seed, method, changes, calibration


class NoResultsError(DataError):
    """There are no results yet of something that is planned."""


@dataclass(frozen=True)
class Source:
    """What blocks are made from.

    Attributes:
        plans: Plans by name.
        results: Results by plan.
        spectra: What `benchmarks.spectra` wrote.
        demo: What `make demo` wrote; empty if it is not there.
        speed: What `benchmarks.speed` wrote, by device and shape, ``"cpu-smollm2-135m"``, and `benchmarks.speed.whole`.
        reliability: What `benchmarks.reliability` wrote, by harness.
        amounts: What `benchmarks.amounts` wrote, by model.
    """

    plans: Mapping[str, Plan]
    results: Mapping[str, Sequence[Result]]
    spectra: Sequence[Mapping[str, Any]]
    demo: Mapping[str, Any] = field(default_factory=dict)
    speed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reliability: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    amounts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, results: Path, plans: Path, demo: Path) -> Source:
        """Read the plans, the results in a JSONL file named after each plan, and the demo's."""
        found = {
            path.stem: [_titled(r) for r in load_results(path)]
            for path in sorted(results.glob("*.jsonl"))
        }
        spectra = [read_json(path) for path in sorted((results / "spectra").glob("*.json"))]
        return cls(
            {path.stem: Plan.load(path) for path in sorted(plans.glob("*.yaml"))},
            found,
            [values for values in spectra if values.get("format") == SPECTRA],
            read_json(demo) if demo.exists() else {},
            *(
                {path.stem: read_json(path) for path in sorted((results / name).glob("*.json"))}
                for name in ("speed", "reliability", "amounts")
            ),
        )

    def measured(self, device: str, shape: str = "") -> list[Mapping[str, Any]]:
        """Times on a device, of one shape or of all. Raises NoResultsError if there are none."""
        order = [shape] if shape else [*SHAPES]
        names = [f"{device}-{name}" for name in order if f"{device}-{name}" in self.speed]
        if not names:
            raise NoResultsError(
                f"No times on `{device}` {shape} yet: `python -m benchmarks.speed`."
            )
        return [self.speed[name] for name in names]

    def setups(self) -> list[Mapping[str, Any]]:
        """What `benchmarks.speed.whole` wrote. Raises NoResultsError if it has not run."""
        found = [values for values in self.speed.values() if values.get("format") == SETUP]
        if not found:
            raise NoResultsError("No set-up as a whole yet: `python -m benchmarks.speed.whole`.")
        return found

    def disturbances(self, harness: str) -> Mapping[str, Any]:
        """What a harness of `benchmarks.reliability` found. Raises NoResultsError if it has not run."""
        if harness not in self.reliability:
            raise NoResultsError(f"No figures of `make {harness}` yet.")
        return self.reliability[harness]

    def amounts_of(self, model: str) -> Mapping[str, Any]:
        """What amounts of text and rows are worth to a model. Raises NoResultsError if it has not run."""
        if model not in self.amounts:
            raise NoResultsError(f"No figures of `python -m benchmarks.amounts` on `{model}` yet.")
        return self.amounts[model]

    def tasks(self) -> list[str]:
        """Tasks of all plans and results."""
        planned_tasks = [task for plan in self.plans.values() for task in plan.learned]
        return planned_tasks + [r.task for results in self.results.values() for r in results]

    def expected(self, plan: str) -> list[Identity]:
        """The arms of a plan, in its order; none of a plan that is not there."""
        if (found := self.plans.get(plan)) is None:
            return []
        arms = found.arms()
        return [
            (task, seed, arm.method, _text(arm.changes), _text(calibration or {}))
            for task in found.learned
            for seed in found.seeds
            for calibration in found.calibration
            for arm in arms
        ]

    def chosen(self, plan: str, task: str = "", method: str = "") -> list[Result]:
        """Results of a plan, of one task and one method if given, methods in the plan's order.

        Raises:
            ConfigError: No plan has such a task, or there is no such method.
            NoResultsError: There are no such results, since they are missing or not planned.
        """
        results, expected = self.results.get(plan, []), self.expected(plan)
        if task:
            check_word(task, self.tasks(), "task")
        if method:
            check_word(method, [*METHODS, *(rival.method.name for rival in RIVALS)], "method")
        found = [r for r in results if task in ("", r.task) and method in ("", r.method)]
        if not found:
            what = " ".join(f"`{word}`" for word in (plan, task, method) if word)
            due = any(task in ("", a[0]) and method in ("", a[2]) for a in expected)
            raise NoResultsError(f"No results of {what}{' yet' if due else '; none are planned'}.")
        order = list(dict.fromkeys([*(arm[2] for arm in expected), *(r.method for r in results)]))
        return sorted(found, key=lambda r: order.index(r.method))

    def maybe(self, plan: str, task: str) -> list[Result]:
        """Results of a plan and task, or none."""
        return [r for r in self.results.get(plan, []) if r.task == task]

    def pooled(self, plan: str, task: str, others: Sequence[str]) -> list[Result]:
        """Results of a plan's arms, at all seeds that these and other plans have.

        Raises:
            NoResultsError: There are none.
        """
        wanted = {(arm[2], arm[3]) for arm in self.expected(plan)}
        pooled = [
            r
            for name in (*others, plan)
            for r in self.maybe(name, task)
            if (r.method, settings(r)) in wanted
        ]
        if not pooled:
            raise NoResultsError(f"No results of `{plan}` `{task}` yet.")
        return pooled

    def missing(self, plan: str, task: str = "", method: str = "") -> str:
        """A sentence on the arms of a plan that have no result yet, or nothing."""
        expected = [a for a in self.expected(plan) if task in ("", a[0]) and method in ("", a[2])]
        done = {_identity(result) for result in self.results.get(plan, [])}
        left = [arm for arm in expected if arm not in done]
        if not left:
            return ""
        seeds = ", ".join(map(str, sorted({arm[1] for arm in left})))
        return (
            f"*Incomplete: {len(left)} of {len(expected)} arms of `{plan}` have no result yet "
            f"(of seed {seeds}).*"
        )

    def main_rates(self, plan: str) -> list[float]:
        """Learning rates of a plan's first sweep, which most of its methods share."""
        return self.plans[plan].sweeps[0].learning_rates if plan in self.plans else []

    def beside(self, results: Iterable[Result], methods: Iterable[str]) -> list[Result]:
        """Arms of the main plan with a task, a seed and a learning rate that occur in `results`."""
        results = list(results)
        tasks, seeds = {r.task for r in results}, {r.seed for r in results}
        rates = {rate_of(r) for r in results}
        candidates = [
            r
            for r in self.results.get(MAIN, [])
            if r.task in tasks and r.seed in seeds and rate_of(r) in rates
        ]
        return [r for method in methods for r in candidates if r.method == method]


def check_word(word: str, known: Iterable[str], what: str) -> None:
    """Raise ConfigError, with the nearest right word, if a word is not known."""
    known = list(dict.fromkeys(known))
    if word not in known:
        raise ConfigError(
            f"unknown {what} {word!r}{nearest(word, known)}; known: {', '.join(known)}"
        )


def rate_of(result: Result) -> float:
    """The arm's learning rate."""
    return float(result.changes[RATE])


def settings(result: Result) -> str:
    """What the arm changes beyond its method, as `Source.expected` writes it."""
    return _text(result.changes)


def _titled(result: Result) -> Result:
    """With the present title of its method."""
    known = METHODS.get(result.method)
    return replace(result, title=known.title) if known else result


def _identity(result: Result) -> Identity:
    calibration = _text(result.calibration)
    return (result.task, result.seed, result.method, settings(result), calibration)


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values), sort_keys=True)
