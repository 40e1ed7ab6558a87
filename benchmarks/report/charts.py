"""Pictures of docs/results.md beyond those that compare methods: one knob, calibration, spectrum.

Every point is a mean over seeds; its bar is the 95 % interval, which needs two seeds. Colours and
files are made as in `folora.compare.plots`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from folora.compare.frontier import Interval, interval, kept_at, kl_at
from folora.compare.plots import COLORS, new_figure, save_picture, styles, tidy
from folora.compare.results import Result, of_task, point_sets, scores_of
from folora.compare.tables import matched_levels
from folora.spectral.eigenproblem import spectral_gate

KEPT = "retained at matched task"
BARS: dict[str, Any] = {"capsize": 3, "linewidth": 1.4, "markersize": 6}
SCORES = (-0.03, 1.03)  # limits of an axis of scores
LINEAR = ("s_min",)  # knobs that may be zero
LEAST_GAMMA = 1e-6  # on a log axis a direction of no use needs a place
OFFSET = 0.12  # between methods that share a place on an axis of names


@dataclass(frozen=True)
class Matched:
    """One arm or method at the matched task score, over seeds."""

    kept: Interval
    kl: Interval


@dataclass(frozen=True)
class Panel:
    """One knob: its values with what came out, and the default.

    Attributes:
        knob: Name of the knob.
        values: Outcome by value; the default's is among them if it is a number.
        default: The default value; None for a default that is no number.
        at_default: Outcome of the defaults.
    """

    knob: str
    values: Mapping[float, Matched]
    default: float | None
    at_default: Matched


def at_matched_task(results: Iterable[Result], task: str) -> tuple[float, dict[str, Matched]]:
    """The matched task score as `comparison_table` finds it, and what each method does there."""
    chosen = of_task(results, task)
    scores, sets = scores_of(chosen), point_sets(chosen)
    level = matched_levels(sets, {r.seed: scores.point(r.base) for r in chosen}, scores).task
    return level, {
        method: Matched(
            interval(kept_at(points, level) for points in seeds.values()),
            interval(kl_at(points, level) for points in seeds.values()),
        )
        for method, seeds in sets.items()
    }


def knob_picture(panels: Sequence[Panel], title: str, path: Path) -> None:
    """Write a PNG with a column a knob: kept above, KL below, the default marked (figures 2b, 2c).

    Bars of few seeds can be long; they are cut at what scores can be, and at twice the largest KL.
    """
    figure = new_figure(2.6 * len(panels) + 1.6, 5.0)
    rows = figure.subplots(2, len(panels), sharex="col", sharey="row", squeeze=False)
    for name, row in zip(("kept", "kl"), rows, strict=True):
        for panel, axis in zip(panels, row, strict=True):
            values = {value: getattr(found, name) for value, found in panel.values.items()}
            _error_bars(axis, values, {"color": COLORS[0], "marker": "o"})
            at_default = getattr(panel.at_default, name).mean
            axis.axhline(at_default, color=COLORS[1], linewidth=0.8, linestyle=":")
            if panel.default is not None:
                mark = {"marker": "*", "markersize": 13, "color": COLORS[1], "linestyle": "none"}
                axis.plot([panel.default], [at_default], zorder=3, label="default", **mark)
            tidy(axis)
    for panel, upper, lower in zip(panels, *rows, strict=True):
        upper.set_title(panel.knob, fontsize=10)
        lower.set_xlabel(panel.knob)
        if panel.knob not in LINEAR:
            _log_axis(lower, panel.values)
    largest = max((m.kl.mean for p in panels for m in p.values.values() if m.kl.n), default=0.5)
    rows[1, 0].set_ylim(0, 2 * largest)
    rows[0, 0].set_ylim(*SCORES)
    rows[0, 0].set_ylabel(KEPT)
    rows[1, 0].set_ylabel("KL at matched task (nats per token)")
    figure.suptitle(f"{title}; star and dotted line: the default", fontsize=10)
    save_picture(figure, path)


def calibration_picture(
    kept: Mapping[tuple[str, str, int], Interval], count: int, path: Path
) -> None:
    """Write a PNG of retained at matched task, by source and by number of sequences (figure 3).

    Args:
        kept: By title of the method, source and number of sequences.
        count: The number at which sources are compared; the other panel has the first source.
        path: File to write.
    """
    figure = new_figure(9.0, 4.0)
    left, right = figure.subplots(1, 2, sharey=True)
    titles, sources = (list(dict.fromkeys(key[i] for key in kept)) for i in (0, 1))
    for i, (title, style) in enumerate(zip(titles, styles(len(titles)), strict=True)):
        own = {key[1:]: value for key, value in kept.items() if key[0] == title}
        shift = OFFSET * (i - (len(titles) - 1) / 2)
        by_source = {sources.index(s) + shift: value for (s, n), value in own.items() if n == count}
        by_count = {float(n): value for (s, n), value in own.items() if s == sources[0]}
        _error_bars(left, by_source, {**style, "linestyle": "none"})
        _error_bars(right, by_count, {**style, "label": title})
    left.set_xticks(range(len(sources)), sources)
    left.set_xlim(-0.5, len(sources) - 0.5)
    left.set_xlabel(f"source of {count} sequences")
    left.set_ylabel(KEPT)
    _log_axis(right, [n for _, source, n in kept if source == sources[0]])
    left.set_ylim(*SCORES)
    right.set_xlabel(f"sequences, source: {sources[0]}")
    right.legend(frameon=False)
    for axis in (left, right):
        tidy(axis)
    save_picture(figure, path)


def spectra_picture(spectra: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of off-diagonal masses, and of gamma and its gate by direction (figures 1a, 2a).

    Args:
        spectra: What `benchmarks.spectra` wrote.
        path: File to write.
    """
    figure = new_figure(10.0, 4.0)
    left, right = figure.subplots(1, 2)
    gates = right.twinx()
    for found, style in zip(spectra, styles(len(spectra)), strict=True):
        label, color = f"{found['model']}, {found['task']}", style["color"]
        masses = sorted(group["off_diagonal"] for group in found["groups"])
        left.plot(_shares(len(masses)), masses, label=label, **{**style, "markersize": 4})
        gamma = np.array([group["gamma"] for group in found["groups"]])
        shares = _shares(gamma.shape[1])
        low, middle, high = np.maximum(np.quantile(gamma, (0.25, 0.5, 0.75), axis=0), LEAST_GAMMA)
        right.fill_between(shares, low, high, color=color, alpha=0.2, linewidth=0)
        right.plot(shares, middle, color=color, linewidth=1.8)
        gate = spectral_gate(torch.from_numpy(middle), found["lambda"], found["s_min"])
        gates.plot(shares, gate.numpy(), color=color, linewidth=1.4, linestyle="--")
    left.set_xlabel("share of the shared inputs, sorted")
    left.set_ylabel("off-diagonal mass of C_task in C_pre's basis")
    left.set_ylim(0, 1)
    left.legend(frameon=False)
    right.set_yscale("log")
    right.set_xlabel("share of the directions, most useful first")
    right.set_ylabel("gamma (solid: median, band: quartiles)")
    gates.set_ylim(0, 1)
    gates.set_ylabel("gate of the median (dashed)")
    for axis in (left, right):
        tidy(axis)
    save_picture(figure, path)


def _error_bars(axis: Axes, points: Mapping[float, Interval], style: Mapping[str, Any]) -> None:
    """Means with their intervals, by x; a mean without an interval has no bar."""
    places = sorted(points)
    means = [points[x].mean for x in places]
    halves = np.nan_to_num([points[x].half_width for x in places])
    axis.errorbar(places, means, yerr=halves, **{**BARS, **style})


def _log_axis(axis: Axes, values: Iterable[float]) -> None:
    """A logarithmic axis with ticks at the values alone."""
    places = sorted(set(values))
    axis.set_xscale("log")
    axis.set_xticks(places, [f"{value:g}" for value in places])
    axis.minorticks_off()


def _shares(count: int) -> np.ndarray:
    return np.linspace(0, 1, count) if count > 1 else np.array([0.5])
