"""Blocks on synthetic worlds: frontiers, norms, ablations, hyperparameters, seeds, calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter

import numpy as np

from benchmarks.report.blocks import (
    REFERENCE,
    REFERENCES,
    Block,
    calibrated,
    count_of,
    image,
    knob_name,
    knob_place,
    knobs_of,
    only_task,
    parts,
    present,
    relabelled,
    setting,
    source_of,
)
from benchmarks.report.charts import (
    Matched,
    Panel,
    at_matched_task,
    calibration_picture,
    knob_picture,
)
from benchmarks.report.source import MAIN, NoResultsError, Source, check_word, rate_of
from folora.compare.frontier import at_norm
from folora.compare.plots import NORMS, Norm, frontier_picture, norm_picture
from folora.compare.results import Result, grouped, scores_of
from folora.compare.tables import NONE, Cell, Column, Table, comparison_table
from folora.config import FoLoraConfig

STRENGTH, KNOBS, CALIBRATION = "world_strength", "world_knobs", "world_calibration"

VARIANTS = ("world_ablation", "world_complements")

PICTURED = (
    "folora", "folora-null", "lora", "milora", "corda", "lora-null", "lora-null-v2", "oplora",
    "null-frozen",
)  # fmt: skip

SELF, COUNT = "self", 256  # calibration: the model's own text, and the number to compare sources at

DEFAULTS = "defaults"
REMOVED = {
    "training.lr_b_ratio": 1.0
}  # defaults of options that results have, but configs have no more


def methods(source: Source, task: str) -> Block:
    """All methods on one task, with the frontier and the norm of some of them."""
    results = [*source.chosen(MAIN, task), *source.maybe(STRENGTH, task)]
    shown = present(results, PICTURED)
    frontier, norm = f"methods_{task}.png", f"norms_{task}.png"
    content = parts(
        comparison_table(results, task, reference=REFERENCE),
        source.missing(MAIN, task),
        source.missing(STRENGTH, task),
        image(frontier, f"retained against task score, {task}"),
        image(norm, f"retained against the norm of the update, {task}"),
    )
    return Block(
        content,
        {
            frontier: partial(frontier_picture, results, task, methods=shown),
            norm: partial(norm_picture, results, task, methods=shown),
        },
    )


def norms(source: Source, task: str) -> Block:
    """What methods retain at equal norm of the update: one table per norm."""
    results = [*source.chosen(MAIN, task), *source.maybe(STRENGTH, task)]
    tables = [norm_table(results, which) for which in NORMS]
    return Block(parts(*tables, source.missing(MAIN, task)))


def variants(source: Source, plan: str, task: str) -> Block:
    """Variants of folora, with the references of the main plan at the same learning rates and seeds."""
    check_word(plan, VARIANTS, "plan of variants")
    results = source.chosen(plan, task)
    rates = source.main_rates(plan)
    beside = source.beside([r for r in results if not rates or rate_of(r) in rates], REFERENCES)
    absent = [name for name in REFERENCES if name not in present(beside, REFERENCES)]
    lacking = f"*No arms of {', '.join(absent)} to compare with yet.*" if absent else ""
    used = ", ".join(f"{rate:g}" for rate in sorted({rate_of(r) for r in beside}))
    there = ", ".join(present(beside, REFERENCES))
    same = f"From `{MAIN}`, at the same seeds and learning rates {used}: {there}."
    table = comparison_table([*beside, *results], task, reference=REFERENCE)
    return Block(parts(table, same if beside else "", lacking, source.missing(plan, task)))


def seeds(source: Source, plan: str, task: str) -> Block:
    """The arms of a plan at all seeds, including those of other plans."""
    pooled = source.pooled(plan, task, (MAIN, *VARIANTS))
    table = comparison_table(pooled, task, reference=REFERENCE)
    return Block(parts(table, source.missing(plan, task)))


def knobs(source: Source, method: str) -> Block:
    """Each value of a hyperparameter as a row, after the defaults; one panel per hyperparameter."""
    results = source.chosen(KNOBS, method=method)
    task = only_task(results)
    defaults = [relabelled(r, DEFAULTS) for r in source.beside(results, [method])]
    if not defaults:
        raise NoResultsError(f"No results of `{MAIN}` `{method}` to compare the knobs with yet.")
    turned = sorted(results, key=lambda r: [(knob_place(k), r.changes[k]) for k in knobs_of(r)])
    together = [*defaults, *(relabelled(r, setting(r)) for r in turned)]
    picture = f"knobs_{method}.png"
    content = parts(
        comparison_table(together, task, reference=DEFAULTS),
        source.missing(KNOBS, method=method),
        image(picture, f"hyperparameters of {method}"),
    )
    panels = knob_panels(turned, defaults, at_matched_task(together, task)[1])
    return Block(content, {picture: partial(knob_picture, panels, f"{method}, {task}")})


def calibration(source: Source) -> Block:
    """Source and number of sequences of C_pre: a table per method."""
    results = source.chosen(CALIBRATION)
    task = only_task(results)
    ordered = sorted(results, key=lambda r: (source_of(r) != SELF, source_of(r), count_of(r)))
    level, matched = at_matched_task([relabelled(r, calibrated(r)) for r in ordered], task)
    tables = []
    for title in dict.fromkeys(r.title for r in ordered):
        rows = [relabelled(r, calibrated(r)) for r in ordered if r.title == title]
        reference = f"{title}, {SELF} {COUNT}"
        tables.append(comparison_table(rows, task, level, reference=reference))
    shared = "Both tables use the same level: 90 % of the way from the base to the best row of all."
    kept = {(r.title, source_of(r), count_of(r)): matched[calibrated(r)].kept for r in ordered}
    picture = image("calibration.png", "retained by source and number of sequences")
    content = parts(*tables, shared, source.missing(CALIBRATION), picture)
    return Block(content, {"calibration.png": partial(calibration_picture, kept, COUNT)})


def norm_table(results: Sequence[Result], which: Norm) -> Table:
    """Retained score at three values of one norm of the update, and the difference from folora."""
    scores, arms = scores_of(results), grouped(results)
    titles = {r.method: r.title for r in results}
    paths = {
        method: {seed: [arm.points(scores) for arm in group] for seed, group in seeds.items()}
        for method, seeds in arms.items()
    }
    mine = REFERENCE if REFERENCE in arms else next(iter(arms))
    points = [p for arm in results for p in arm.points(scores) if math.isfinite(p.task)]
    half = max(p.task for p in points) / 2
    sizes = [
        size
        for found in paths[mine].values()
        for path in found
        for p in path
        if p.task >= half and 0 < (size := getattr(p, which)) < math.inf
    ]
    if not sizes:
        raise NoResultsError(f"No arm of `{mine}` has learned half of what the best has.")
    quartiles = [float(f"{q:.2g}") for q in np.quantile(sizes, (0.25, 0.5, 0.75))]
    cells: list[tuple[str, Cell]] = []
    for size in dict.fromkeys(quartiles):
        values = {
            method: {seed: at_norm(found, size, which) for seed, found in seeds.items()}
            for method, seeds in paths.items()
        }
        column = Column(f"{which[0].upper()} = {size:g}", 3, values)
        cells.append((column.title, column.cell))
        if REFERENCE in arms:
            difference = partial(column.difference, reference=REFERENCE)
            cells.append((f"minus {titles[REFERENCE]}", difference))
    caption = (
        f"{results[0].task}: retained score at equal {which[0].upper()} = {NORMS[which]}, interpolated along each arm, mean over the "
        "arms of a method that reach it, then mean ± half-width of the 95 % interval over seeds. "
        f"Values: rounded quartiles over the measurements of {titles[mine]} with at least "
        f"half of the best task score. *: the interval of the differences by seed excludes zero. {NONE}: no arm reaches "
        "it."
    )
    return Table.by_method(titles, cells, caption)


def knob_panels(
    turned: Sequence[Result], defaults: Sequence[Result], matched: Mapping[str, Matched]
) -> list[Panel]:
    """One panel for each hyperparameter that was varied alone."""
    panels = []
    for knob in dict.fromkeys(knob for r in turned for knob in knobs_of(r)):
        alone = [r for r in turned if knobs_of(r) == [knob]]
        values = {float(r.changes[knob]): matched[setting(r)] for r in alone}
        known = REMOVED.get(knob) or attrgetter(knob)(FoLoraConfig())
        default = defaults[0].config.get(knob, known)
        default = default if isinstance(default, int | float) else None  # "all" has no place
        if default is not None:
            values[float(default)] = matched[DEFAULTS]
        panels.append(Panel(knob_name(knob), values, default, matched[DEFAULTS]))
    return panels


BLOCKS: dict[str, Callable[..., Block]] = {
    "methods": methods,
    "norms": norms,
    "variants": variants,
    "seeds": seeds,
    "knobs": knobs,
    "calibration": calibration,
}
