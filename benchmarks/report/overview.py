"""Blocks on all plans and methods: plans, methods, spectra."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

from benchmarks.report.blocks import Block, image, parts, stated_range
from benchmarks.report.charts import spectra_picture
from benchmarks.report.source import NoResultsError, Source
from folora.compare.tables import NONE, Table
from folora.methods import METHODS, Method

SEEDS = re.compile(r"\s+--seeds(?:[ =]\d+)+")


def runs(source: Source) -> Block:
    """Plans: completed arms, hours, commands and versions."""
    rows, commands, versions = [], dict[str, None](), dict[str, None]()
    for plan in dict.fromkeys([*source.plans, *source.results]):
        results, expected = source.results.get(plan, []), source.expected(plan)
        arms = f"{len(results)} of {len(expected)}" if expected else str(len(results))
        if expected and (more := len(results) - len(expected)) > 0:
            arms = f"{len(expected)} of {len(expected)}, {more} no longer planned"
        tasks = ", ".join(dict.fromkeys(r.task for r in results)) or NONE
        seeds = ", ".join(map(str, sorted({r.seed for r in results}))) or NONE
        hours = sum(r.seconds or 0.0 for r in results) / 3600
        rows.append((plan, tasks, seeds, arms, f"{hours:.1f}"))
        commands |= dict.fromkeys(SEEDS.sub("", r.command) for r in results)
        versions |= dict.fromkeys(
            ", ".join(f"{name} {number}" for name, number in r.versions.items()) for r in results
        )
    caption = "Arms (trainings): completed of planned. Hours: of one core, for these arms."
    table = Table(("plan", "tasks", "seeds", "arms", "hours"), tuple(rows), caption)
    typed = "\n".join(["```", *commands, "```"]) if commands else ""
    made = f"Versions: {'; '.join(versions)}." if versions else ""
    return Block(parts(table, typed, made))


def catalogue(source: Source) -> Block:
    """All methods: what each changes, and a description."""
    del source
    rows = [
        (
            name,
            m.title,
            ", ".join(f"{k} = {v}" for k, v in _changes(m).items()) or "nothing",
            m.about,
        )
        for name, m in METHODS.items()
    ]
    caption = (
        "Names for `folora run --method` and `folora compare --methods`; options of `folora run`."
    )
    return Block([Table(("name", "method", "changes", "what it is"), tuple(rows), caption)])


def _changes(method: Method) -> dict[str, Any]:
    """The ingredients that are not folora's, and the defaults of options that a method changes."""
    folora = METHODS["folora"]
    names = [n for n in Method.model_fields if n not in ("name", "title", "about", "settings")]
    own = {n: getattr(method, n) for n in names if getattr(method, n) != getattr(folora, n)}
    return {f"method.{name}": value for name, value in own.items()} | method.settings


def spectra(source: Source) -> Block:
    """How far C_task is from diagonal in C_pre's eigenbasis, and how few directions carry the task."""
    if not source.spectra:
        raise NoResultsError("No results of `benchmarks.spectra` yet.")
    header = (
        "model", "task", "groups", "off-diagonal mass", "gate above its floor", "half of gamma",
        "least gate", "over random directions", "task energy, leading", "text's, leading", "task energy, null space", "text's, null space",
    )  # fmt: skip
    rows = []
    for found in source.spectra:
        groups = found["groups"]
        mass, gate, half = ([g[name] for g in groups] for name in ("off_diagonal", "open", "half"))
        rows.append(
            (
                found["model"], found["task"], str(len(groups)), stated_range(mass, ".3f"),
                stated_range(gate, ".0%"), stated_range(half, "g"),
                stated_range([g["gate"] for g in groups], ".2f"),
                stated_range([g["leading"]["task"] * g["d"] / found["r"] for g in groups], ".2f"), *_energies(groups),
            )
        )  # fmt: skip
    caption = (
        "Median (range) over the groups, that is the shared inputs. Off-diagonal mass: share of "
        "||C_task||_F^2 off the diagonal in the eigenbasis of C_pre. Gate above its floor: share of "
        "the directions. Half of gamma: directions that carry half of the sum. Least gate: of the r leading "
        "directions, which A is stepped along. Over random directions: the task's energy in them over that of as many random "
        "directions (`Spectrum.concentration`). Task energy, text's: median share of C_task's and of C_pre's trace in the r leading "
        "directions, or in the r smallest eigenvectors of C_pre. At the default tau, lambda and s_min."
    )
    table = Table(header, tuple(rows), caption)
    picture = image("spectra.png", "off-diagonal mass, gamma and gate")
    content = parts(table, picture)
    return Block(content, {"spectra.png": partial(spectra_picture, source.spectra)})


def _energies(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Median shares of the task's and of the text's energy, by span."""
    return [
        f"{median(g[span][energy] for g in groups):.3%}"
        for span in ("leading", "null")
        for energy in ("task", "pre")
    ]


BLOCKS: dict[str, Callable[..., Block]] = {
    "runs": runs,
    "catalogue": catalogue,
    "spectra": spectra,
}
