"""What a user gets at the end of training: every arm's scores, and the task loss that a budget for the KL allows.

A row is an arm as it was trained (under a budget: as it was scaled). The last column may scale any arm after
training, which costs nothing: the smallest task loss among an arm's readings, scaled ones included, within a KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report.blocks import Block, image, parts, setting
from benchmarks.report.source import Source, rate_of
from folora.compare.frontier import interval
from folora.compare.plots import MIN_KL, new_figure, save_picture, styles, tidy
from folora.compare.results import Result, mean_score
from folora.compare.tables import NONE, Cell, Column, Table, trained_tokens

Reading = Mapping[str, Any]
WITHIN = 0.02  # nats per token
CAPTION = (
    "At the end of training, under a budget after scaling. Mean over seeds ± half of the 95 % interval. Task loss in nats per "
    "response token, KL in nats per token. Tokens of LoRA's: with set-up and the search for a budget's scale; a token of a forward pass alone counts half. Last column: the smallest task loss of the arm with a KL within {within:g}, "
    "when it may be scaled after training by the plan's scales; {none}: none is."
)
METRICS: Mapping[str, tuple[int, Callable[[Reading], float]]] = {
    "task accuracy": (3, lambda r: mean_score(r["task"])),
    "task loss": (3, lambda r: r["task_loss"]),
    "retained": (3, lambda r: mean_score(r["kept"])),
    "KL": (4, lambda r: r["kl"]),
    "facts (log-probability)": (2, lambda r: _other(r, "known_facts.nats")),
    "LAMBADA (log-probability)": (2, lambda r: _other(r, "lambada_openai.nats")),
    "code (log-probability)": (2, lambda r: _other(r, "humaneval.nats")),
    "chat (log-probability)": (2, lambda r: _other(r, "dolly_chat.nats")),
    "calls of tools (log-probability)": (2, lambda r: _other(r, "tool_calls.nats")),
    "text (bits per byte)": (3, lambda r: _other(r, "wikitext2.bits_per_byte")),
    "answers lost (%)": (1, lambda r: _flipped(r, "lost")),
    "answers gained (%)": (1, lambda r: _flipped(r, "gained")),
    "KL on the task's prompts": (4, lambda r: _other(r, "kl.prompts")),
    "KL on WikiText": (4, lambda r: _other(r, "kl.wikitext")),
}


def outcomes(source: Source, plan: str, task: str, *others: str) -> Block:
    """Every arm of a plan at the end of training, and its task loss within a KL; with a picture.

    Arms of other plans at the same seeds come first.
    """
    own = source.chosen(plan, task)
    seeds = {r.seed for r in own}
    beside = [r for other in others for r in source.maybe(other, task) if r.seed in seeds]
    results = [*beside, *own]
    rows: dict[str, dict[int, Result]] = {}
    for r in results:
        rows.setdefault(named(r), {})[r.seed] = r
    readings = {name: {s: final(r) for s, r in seeds.items()} for name, seeds in rows.items()}
    readings = {"base": {r.seed: r.base for r in results}, **readings}
    columns = [
        Column(title, digits, {n: {s: value(r) for s, r in of.items()} for n, of in readings.items()})
        for title, (digits, value) in METRICS.items()
        if any(math.isfinite(value(r)) for of in readings.values() for r in of.values())
    ]  # fmt: skip
    if compute := relative_compute(rows):
        columns.append(Column("tokens of LoRA's", 2, {"base": {}, **compute}))
    within = {n: {s: loss_within(r) for s, r in seeds.items()} for n, seeds in rows.items()}
    columns.append(Column(f"task loss within a KL of {WITHIN:g}", 3, {"base": {}, **within}))
    cells: list[tuple[str, Cell]] = [(column.title, column.cell) for column in columns]
    cells.append(("seeds", lambda name: str(len(readings[name]))))
    caption = CAPTION.format(within=WITHIN, none=NONE)
    table = Table.by_method({name: name for name in readings}, cells, caption)
    picture = f"outcomes_{plan}_{task}.png"
    content = parts(
        table, source.missing(plan, task), image(picture, f"KL against task loss, {task}")
    )
    return Block(content, {picture: partial(scales_picture, rows, task)})


def relative_compute(
    rows: Mapping[str, Mapping[int, Result]],
) -> dict[str, dict[int, float]]:
    """Compute of each row and seed, set-up included, in multiples of the fewest task tokens of that seed.

    A row that was not counted has the count of the same arm at another learning rate.
    """
    results = [result for of in rows.values() for result in of.values()]
    counted = {_without_rate(r): r.tokens for r in results if r.tokens}
    least: dict[int, int] = {}
    for (*_, seed), tokens in counted.items():
        least[seed] = min(tokens["task"], least.get(seed, tokens["task"]))
    found = {
        name: {
            s: trained_tokens(tokens, setup=True) / least[s]
            for s, r in of.items()
            if (tokens := r.tokens or counted.get(_without_rate(r), {}))
        }
        for name, of in rows.items()
    }
    return found if counted else {}


def named(result: Result) -> str:
    """Title, learning rate and other settings of an arm."""
    return ", ".join(filter(None, [result.title, f"lr {rate_of(result):g}", setting(result)]))


def final(result: Result) -> Reading:
    """The reading at the end: as trained, or as scaled to the budget, which is read last."""
    if "budget" in result.changes:
        return result.readings[-1]
    return [r for r in result.readings if r.get("scale", 1.0) == 1.0][-1]


def loss_within(result: Result, kl: float = WITHIN) -> float:
    """The smallest task loss among all readings with so small a KL; NaN without one."""
    within = [r["task_loss"] for r in result.readings if (r["kl"] or math.inf) <= kl]
    return min(within, default=math.nan)


def scales_picture(rows: Mapping[str, Mapping[int, Result]], title: str, path: Path) -> None:
    """Write a PNG of KL against task loss, with a line through the scales of each arm; means over seeds."""
    figure = new_figure(8.0)
    axis = figure.subplots()
    for (name, seeds), style in zip(rows.items(), styles(len(rows)), strict=True):
        points = [scaled_readings(result) for result in seeds.values()]
        means = [
            tuple(interval(r[key] for r in at_scale).mean for key in ("task_loss", "kl"))
            for at_scale in zip(*points, strict=False)
        ]
        losses, divergences = zip(*means, strict=True)
        axis.plot(losses, [max(kl, MIN_KL) for kl in divergences], label=name, **style)
    axis.set_xlabel("task loss (nats per token)")
    axis.set_ylabel("KL to the base (nats per token)")
    axis.set_yscale("log")
    axis.set_title(f"{title}: as trained, and scaled after training", fontsize=10, loc="left")
    tidy(axis)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_picture(figure, path)


def scaled_readings(result: Result) -> Sequence[Reading]:
    """The final reading, and those of the plan's scales, largest first."""
    if "budget" in result.changes:
        return [final(result)]
    scaled = [r for r in result.readings if r.get("scale", 1.0) != 1.0 and r["kl"] is not None]
    return [final(result), *sorted(scaled, key=lambda r: -r["scale"])]


def _without_rate(result: Result) -> tuple[str, str, int]:
    return result.title, setting(result), result.seed


def _other(reading: Reading, name: str) -> float:
    return float(reading.get("other", {}).get(name, math.nan))


def _flipped(reading: Reading, way: str) -> float:
    """Percentage of the questions of all benchmarks whose answer flipped that way, adjusted for guesses."""
    flips = reading.get("flips", {})
    questions = {n: v for n, v in flips.items() if n.endswith(".questions")}
    if not questions:
        return math.nan
    flipped = sum(
        count * flips[f"{n.removesuffix('.questions')}.{way}_adjusted"]
        for n, count in questions.items()
    )
    return 100 * flipped / sum(questions.values())


BLOCKS: dict[str, Callable[..., Block]] = {"outcomes": outcomes}
