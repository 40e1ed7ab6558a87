"""Plots that compare methods on one task: the frontier, and kept score against the norm of the update.

A method has the same colour and marker in all plots. Thin: readings of single arms. Bold: the mean over
seeds, drawn only where every seed has a value, so that curves do not jump where a seed ends.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from folora.compare.frontier import Point, at_norm, kept_at, pareto, task_at
from folora.compare.results import (
    Result,
    Scores,
    grouped,
    of_task,
    point_sets,
    scores_of,
)
from folora.runtime.extras import needed_by

with needed_by("drawing", "compare"):
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure  # without pyplot there is no state and no window
    from PIL import Image

Norm = Literal["frobenius", "h_norm"]

NORMS: dict[Norm, str] = {
    "frobenius": "‖ΔW‖ (Frobenius)",
    "h_norm": "‖ΔW‖ (metric of H)",
}
# The Okabe-Ito palette, safe for colour-blind readers, without yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
THIN: dict[str, Any] = {"markersize": 3.5, "markeredgewidth": 0, "linewidth": 0.5, "alpha": 0.35}
BOLD: dict[str, Any] = {"markersize": 6, "linewidth": 2.2, "markevery": 15}
GRID = 150  # points of a mean curve
RESOLUTIONS = (120, 96, 72)  # dots per inch, tried in turn
MAX_BYTES = 100_000
MIN_KL = 1e-4  # nats per token; the base's KL of 0 is drawn here on the log axis
PALETTE_SIZE = 128  # a palette image has a third of the size of a full-colour one


def frontier_picture(
    results: Iterable[Result], task: str, path: str | Path, methods: Sequence[str] | None = None
) -> None:
    """Write a PNG of kept score against task score, with one mean frontier per method.

    Args:
        results: Results of any tasks.
        task: Task to show.
        path: File to write; its folder is made.
        methods: Methods to show, in this order. By default all.

    Raises:
        DataError: There are no such results, or they cannot be compared with each other.
    """
    chosen = of_task(results, task, methods)
    scores, sets = scores_of(chosen), point_sets(chosen)
    figure = new_figure(8.0)
    axis = figure.subplots()
    titles = {r.method: r.title for r in chosen}
    for (method, seeds), style in zip(sets.items(), styles(len(sets)), strict=True):
        points = [*chain(*seeds.values())]
        kept = _shown([p.kept for p in points], scores)
        axis.plot([p.task for p in points], kept, **{**style, **THIN, "linestyle": "none"})
        levels, mean = mean_staircase(seeds)
        line = {**style, **BOLD, "drawstyle": "steps-pre", "label": titles[method]}
        axis.plot(levels, _shown(mean, scores), **line)
    if not scores.task_scored:  # exclude diverged arms from the axis range
        everyone = chain.from_iterable(chain(*seeds.values()) for seeds in sets.values())
        low, high = min(scores.point(r.base).task for r in chosen), task_at(everyone, -math.inf)
        margin = 0.03 * (high - low) or 0.1
        axis.set_xlim(low - margin, high + margin)
    axis.set_xlabel("task score" if scores.task_scored else "−task loss (nats per token)")
    _finish(figure, [axis], scores, task)
    save_picture(figure, path)


def norm_picture(
    results: Iterable[Result], task: str, path: str | Path, methods: Sequence[str] | None = None
) -> None:
    """Write a PNG of kept score against the norm of the update, for both norms; see `frontier_picture`."""
    chosen = of_task(results, task, methods)
    scores, arms = scores_of(chosen), grouped(chosen)
    figure = new_figure(10.0)
    axes = list(figure.subplots(1, 2, sharey=True))
    titles = {r.method: r.title for r in chosen}
    for (method, seeds), style in zip(arms.items(), styles(len(arms)), strict=True):
        paths = {seed: [arm.points(scores) for arm in group] for seed, group in seeds.items()}
        for axis, which in zip(axes, NORMS, strict=True):
            for arm in chain(*paths.values()):
                # The base has norm 0, which a log axis cannot show.
                norms = [getattr(p, which) or math.nan for p in arm]
                axis.plot(norms, _shown([p.kept for p in arm], scores), **{**style, **THIN})
            grid, mean = mean_at_norm(paths, which)
            axis.plot(grid, _shown(mean, scores), label=titles[method], **{**style, **BOLD})
    for axis, (_, label) in zip(axes, NORMS.items(), strict=True):
        axis.set_xscale("log")
        axis.set_xlabel(label)
    _finish(figure, axes, scores, task)
    save_picture(figure, path)


def mean_staircase(seeds: Mapping[int, Sequence[Point]]) -> tuple[np.ndarray, np.ndarray]:
    """Task levels (GRID,), and the mean over seeds of `kept_at`; NaN where a seed does not reach the level."""
    fronts = [pareto(points) for points in seeds.values()]
    scores = [p.task for front in fronts for p in front] or [0.0]
    levels = np.linspace(min(scores), max(scores), GRID)
    kept = [[kept_at(front, float(level)) for level in levels] for front in fronts]
    return levels, np.mean(kept, axis=0)


def mean_at_norm(
    paths: Mapping[int, Sequence[Sequence[Point]]], which: Norm
) -> tuple[np.ndarray, np.ndarray]:
    """Norms (GRID,), and the mean over seeds of `at_norm`; NaN where a seed has no arm with that norm."""
    sizes = [getattr(p, which) for arms in paths.values() for arm in arms for p in arm]
    sizes = [size for size in sizes if math.isfinite(size) and size > 0] or [1.0]
    norms = np.geomspace(min(sizes), max(sizes), GRID)
    kept = [[at_norm(arms, float(norm), which) for norm in norms] for arms in paths.values()]
    return norms, np.mean(kept, axis=0)


def new_figure(width: float, height: float = 4.5) -> Figure:
    """An empty figure with the given size in inches and constrained layout."""
    return Figure(figsize=(width, height), layout="constrained")


def styles(count: int) -> list[dict[str, Any]]:
    """Colour, marker and line style of `count` lines; dashed once the colours repeat."""
    return [
        {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": "--" if i >= len(COLORS) else "-",
        }
        for i in range(count)
    ]


def tidy(axis: Axes) -> None:
    """Set the common style of a panel: two spines and a faint grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2)


def _shown(kept: Sequence[float] | np.ndarray, scores: Scores) -> np.ndarray:
    """Kept scores as plotted: without scorers, the KL."""
    values = np.asarray(kept, dtype=float)
    return values if scores.kept_scored else np.maximum(-values, MIN_KL)


def _finish(figure: Figure, axes: Sequence[Axes], scores: Scores, title: str) -> None:
    for axis in axes:
        tidy(axis)
    if scores.kept_scored:
        axes[0].set_ylabel("retained score")
    else:  # panels share the axis; up is better, as with scores
        axes[0].set_ylabel(f"KL to the base (nats per token, ≥ {MIN_KL:g})")
        axes[0].set_yscale("log")
        axes[0].invert_yaxis()
    axes[0].set_title(title, fontsize=10, loc="left")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)


def save_picture(figure: Figure, path: str | Path) -> None:
    """Write the figure as a palette PNG; lower the resolution if it exceeds `MAX_BYTES`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for dpi in RESOLUTIONS:
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=dpi)
        image = Image.open(drawn).convert("RGB").quantize(PALETTE_SIZE)
        image.save(path, format="png", optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            return
