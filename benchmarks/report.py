"""From result files to the pages of docs that hold figures: ``python -m benchmarks.report``, or ``make results``.

The template is written by hand. A line ``{{ name argument ... }}`` in it stands for a block, tables
and pictures made by the function of that name in `BLOCKS`; what has no result yet is said there.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.aim import aim_table, kept_table, without_scores
from benchmarks.amounts import rows_table, text_table
from benchmarks.charts import (
    Matched,
    Panel,
    at_matched_task,
    calibration_picture,
    knob_picture,
    spectra_picture,
)
from benchmarks.reliability.fuzz import fuzz_table
from benchmarks.reliability.table import distributed_table, disturbance_table, soak_table
from benchmarks.scaling import bytes_table, time_table
from benchmarks.source import (
    MAIN,
    RATE,
    NoResultsError,
    Source,
    check_word,
    rate_of,
    settings,
)
from benchmarks.speed.table import sampling_table, scale_table, setup_table, solve_table, step_table
from folora.compare.frontier import at_norm
from folora.compare.methods import METHODS
from folora.compare.plots import NORMS, Norm, frontier_picture, norm_picture
from folora.compare.results import Result, by_method, grouped, scores_of
from folora.compare.tables import NONE, Column, Table, comparison_table
from folora.config import FoLoraConfig
from folora.errors import ConfigError, DataError, FoLoraError
from folora.runtime.storage import write_text

STRENGTH, KNOBS, CALIBRATION = "world_strength", "world_knobs", "world_calibration"
VARIANTS = ("world_ablation", "world_complements")
REFERENCE = "folora"
REFERENCES = (REFERENCE, "lora", "folora-null")
PICTURED = (
    "folora", "folora-null", "lora", "milora", "corda", "lora-null", "lora-null-v2", "oplora",
    "null-frozen",
)  # fmt: skip
NAMES = {
    "spectrum.tau": "tau",
    "spectrum.lam": "lambda",
    "spectrum.s_min": "s_min",
    "spectrum.directions": "directions",
    "spectrum.beyond": "beyond",
    "training.lr_b_ratio": "lr of B / lr of A",
    "adapter.r": "r",
}
DEMO = (
    ("learned: task loss (nats a token)", "task_loss", "{:.3f}"),
    ("learned: problems solved (of 40)", "task_accuracy", "{:.1%}"),
    ("kept: facts known (of 400; base is the mark)", "facts_accuracy", "{:.1%}"),
    ("kept: log-probability of a fact", "facts_log_probability", "{:.2f}"),
    ("forgot: KL to the base (nats a token)", "kl", "{:.4f}"),
)
SELF, COUNT = "self", 256  # calibration: the model's own text, and the number to compare sources at
DEFAULTS = "defaults"
WHOLE = "all directions"
KEPT, BEYOND = "spectrum.directions", "spectrum.beyond"
PAGES = {
    Path("benchmarks/results.template.md"): Path("docs/results.md"),
    Path("benchmarks/speed.template.md"): Path("docs/speed.md"),
    Path("benchmarks/reliability.template.md"): Path("docs/reliability.md"),
    Path("benchmarks/scaling.template.md"): Path("docs/scaling.md"),
}
PICTURES = "pictures"  # folder beside the page

CALL = re.compile(r"\s*\{\{(.*)\}\}\s*")
SEEDS = re.compile(r"\s+--seeds(?:[ =]\d+)+")

Drawing = Callable[[Path], None]


@dataclass(frozen=True)
class Block:
    """What stands for a line of the template: its text, and pictures by file name."""

    text: str
    pictures: Mapping[str, Drawing] = field(default_factory=dict)


# Blocks: each takes the source and the words that follow its name.


def runs(source: Source) -> Block:
    """What was run: how much of each plan, for how long, by which commands and versions."""
    rows, commands, versions = [], dict[str, None](), dict[str, None]()
    for plan in dict.fromkeys([*source.plans, *source.results]):
        results, expected = source.results.get(plan, []), source.expected(plan)
        arms = f"{len(results)} of {len(expected)}" if expected else str(len(results))
        tasks = ", ".join(dict.fromkeys(r.task for r in results)) or NONE
        seeds = ", ".join(map(str, sorted({r.seed for r in results}))) or NONE
        hours = sum(r.seconds or 0.0 for r in results) / 3600
        rows.append((plan, tasks, seeds, arms, f"{hours:.1f}"))
        commands |= dict.fromkeys(SEEDS.sub("", r.command) for r in results)
        versions |= dict.fromkeys(
            ", ".join(f"{name} {number}" for name, number in r.versions.items()) for r in results
        )
    caption = "Arms: those with a result, of those planned. Hours: of one core, for these arms."
    table = Table(("plan", "tasks", "seeds", "arms", "hours"), tuple(rows), caption)
    typed = "\n".join(["```", *commands, "```"]) if commands else ""
    made = f"Versions: {'; '.join(versions)}." if versions else ""
    return Block(_paragraphs(table.markdown(), typed, made))


def methods(source: Source, task: str) -> Block:
    """All methods on one task, with the frontier and the norm of some of them."""
    results = [*source.chosen(MAIN, task), *source.maybe(STRENGTH, task)]
    shown = _present(results, PICTURED)
    frontier, norm = f"methods_{task}.png", f"norms_{task}.png"
    text = _paragraphs(
        comparison_table(results, task, reference=REFERENCE).markdown(),
        source.missing(MAIN, task),
        source.missing(STRENGTH, task),
        _image(frontier, f"kept against task score, {task}"),
        _image(norm, f"kept against the size of the update, {task}"),
    )
    return Block(
        text,
        {
            frontier: partial(frontier_picture, results, task, methods=shown),
            norm: partial(norm_picture, results, task, methods=shown),
        },
    )


def norms(source: Source, task: str) -> Block:
    """What methods keep at an equal size of the update: one table a norm."""
    results = [*source.chosen(MAIN, task), *source.maybe(STRENGTH, task)]
    tables = [norm_table(results, which).markdown() for which in NORMS]
    return Block(_paragraphs(*tables, source.missing(MAIN, task)))


def variants(source: Source, plan: str, task: str) -> Block:
    """Variants of folora, beside methods of the main plan with the same learning rates and seeds."""
    check_word(plan, VARIANTS, "plan of variants")
    results = source.chosen(plan, task)
    rates = source.main_rates(plan)
    beside = source.beside([r for r in results if not rates or rate_of(r) in rates], REFERENCES)
    absent = [name for name in REFERENCES if name not in _present(beside, REFERENCES)]
    lacking = f"*No arms of {', '.join(absent)} to compare with yet.*" if absent else ""
    used = ", ".join(f"{rate:g}" for rate in sorted({rate_of(r) for r in beside}))
    there = ", ".join(_present(beside, REFERENCES))
    same = f"From `{MAIN}`, at the same seeds and learning rates {used}: {there}."
    table = comparison_table([*beside, *results], task, reference=REFERENCE)
    return Block(
        _paragraphs(table.markdown(), same if beside else "", lacking, source.missing(plan, task))
    )


def knobs(source: Source, method: str) -> Block:
    """Each value of a knob as a method of its own, beside the defaults; a panel for each knob."""
    results = source.chosen(KNOBS, method=method)
    task = _only_task(results)
    defaults = [_relabelled(r, DEFAULTS) for r in source.beside(results, [method])]
    if not defaults:
        raise NoResultsError(f"No results of `{MAIN}` `{method}` to compare the knobs with yet.")
    turned = sorted(results, key=lambda r: [(_place(k), r.changes[k]) for k in _knobs(r)])
    together = [*defaults, *(_relabelled(r, _setting(r)) for r in turned)]
    picture = f"knobs_{method}.png"
    text = _paragraphs(
        comparison_table(together, task, reference=DEFAULTS).markdown(),
        source.missing(KNOBS, method=method),
        _image(picture, f"knobs of {method}"),
    )
    panels = knob_panels(turned, defaults, at_matched_task(together, task)[1])
    return Block(text, {picture: partial(knob_picture, panels, f"{method}, {task}")})


def seeds(source: Source, plan: str, task: str) -> Block:
    """The arms of a plan at all seeds that there are, those of other plans included."""
    pooled = _pooled(source, plan, task, (MAIN, *VARIANTS))
    table = comparison_table(pooled, task, reference=REFERENCE)
    return Block(_paragraphs(table.markdown(), source.missing(plan, task)))


def real_seeds(source: Source, plan: str, task: str, baseline: str, *others: str) -> Block:
    """The same of a pretrained model: what each method forgot, and what part that is of a baseline's."""
    table = aim_table(_pooled(source, plan, task, others), baseline)
    return Block(_paragraphs(table.markdown(), source.missing(plan, task)))


def _pooled(source: Source, plan: str, task: str, others: Sequence[str]) -> list[Result]:
    wanted = {(arm[2], arm[3]) for arm in source.expected(plan)}
    pooled = [
        r
        for name in (*others, plan)
        for r in source.maybe(name, task)
        if (r.method, settings(r)) in wanted
    ]
    if not pooled:
        raise NoResultsError(f"No results of `{plan}` `{task}` yet.")
    return pooled


def real(source: Source, plan: str, task: str) -> Block:
    """What each method forgot of a pretrained model, by what it was asked, and the frontier."""
    results = source.chosen(plan, task)
    picture = f"{plan}_{task}.png"
    text = _paragraphs(
        aim_table(results).markdown(),
        kept_table(results).markdown(),
        source.missing(plan, task),
        _image(picture, f"KL against task loss, {task}"),
    )
    meter = [without_scores(r) for r in results]  # the KL tells more than few questions do
    return Block(text, {picture: partial(frontier_picture, meter, task)})


def ingredients(source: Source, plan: str, task: str, other: str) -> Block:
    """Methods and settings of a plan, beside another plan's references of the same seeds, by the KL alone."""
    results = source.chosen(plan, task)
    beside = _references(source, results, task, other)
    named = [_relabelled(r, f"folora, {_setting(r)}") if _knobs(r) else r for r in results]
    together = [without_scores(r) for r in (*beside, *named)]
    table = comparison_table(together, task, reference=REFERENCE)
    return Block(_paragraphs(table.markdown(), source.missing(plan, task)))


def real_beside(source: Source, plan: str, task: str, other: str) -> Block:
    """What each method of a plan forgot, beside another plan's references of the same seeds."""
    return _beside(source, plan, task, other, lambda result: result)


def real_rates(source: Source, plan: str, task: str, other: str) -> Block:
    """The same with each learning rate as a row of its own."""
    return _beside(
        source, plan, task, other, lambda r: _relabelled(r, f"{r.title} at {rate_of(r):g}")
    )


def _beside(
    source: Source, plan: str, task: str, other: str, named: Callable[[Result], Result]
) -> Block:
    results = source.chosen(plan, task)
    table = aim_table([*_references(source, results, task, other), *map(named, results)])
    return Block(_paragraphs(table.markdown(), source.missing(plan, task)))


def _references(source: Source, results: Sequence[Result], task: str, other: str) -> list[Result]:
    """Another plan's references, of the seeds that there are results of."""
    there = {r.seed for r in results}
    return [r for r in source.maybe(other, task) if r.method in REFERENCES and r.seed in there]


def turned(source: Source, plan: str, task: str, *others: str) -> Block:
    """How many directions are kept, beside arms of other plans, by the kept score."""
    return _turned(source, plan, task, others, lambda result: result)


def turned_by_meter(source: Source, plan: str, task: str, *others: str) -> Block:
    """The same by the KL alone, which tells more than few questions do."""
    return _turned(source, plan, task, others, without_scores)


def _turned(
    source: Source,
    plan: str,
    task: str,
    others: Sequence[str],
    seen: Callable[[Result], Result],
) -> Block:
    """Values of folora's knobs, beside its arms in other plans with the same seeds and rates."""
    results = source.chosen(plan, task)
    wanted = {(r.seed, rate_of(r)) for r in results}
    whole = [
        _relabelled(r, WHOLE)
        for name in others
        for r in source.maybe(name, task)
        if r.method == REFERENCE and (r.seed, rate_of(r)) in wanted
    ]
    ordered = sorted(results, key=lambda r: [str(r.changes.get(k, "")) for k in (BEYOND, KEPT)])
    together = [*whole, *(_relabelled(r, _setting(r)) for r in ordered)]
    table = comparison_table([seen(r) for r in together], task, reference=WHOLE)
    return Block(_paragraphs(table.markdown(), source.missing(plan, task)))


def enough(source: Source, plan: str, count: str, task: str = "") -> Block:
    """Numbers of sequences for C_pre, beside one of them, by the kept score."""
    return _enough(source, plan, count, task, lambda result: result)


def enough_by_meter(source: Source, plan: str, count: str, task: str = "") -> Block:
    """The same by the KL alone, which tells more than few questions do."""
    return _enough(source, plan, count, task, without_scores)


def _enough(
    source: Source, plan: str, count: str, task: str, seen: Callable[[Result], Result]
) -> Block:
    results = sorted(map(seen, source.chosen(plan, task)), key=_count)
    rows = [_relabelled(r, _calibrated(r)) for r in results]
    reference = next((row.title for row in rows if str(_count(row)) == count), rows[-1].title)
    table = comparison_table(rows, _only_task(results), reference=reference)
    return Block(_paragraphs(table.markdown(), source.missing(plan, task)))


def amounts_of_text(source: Source, model: str) -> Block:
    """What directions are worth elsewhere, by length and number of the sequences."""
    return Block(text_table(source.judged(model)).markdown())


def amounts_of_rows(source: Source, model: str) -> Block:
    """The same by number of the task's rows."""
    return Block(rows_table(source.judged(model)).markdown())


def steps(source: Source, device: str, shape: str) -> Block:
    """Time and memory of a step by mode on one shape."""
    return Block(step_table(source.measured(device, shape)[0]).markdown())


def preparation(source: Source, device: str) -> Block:
    """What comes before training: sampling, statistics and solve."""
    found = [result for result in source.measured(device) if "setup" in result]
    tables = (sampling_table(found), setup_table(found), solve_table(found))
    return Block(_paragraphs(*(table.markdown() for table in tables)))


def scale(source: Source, device: str) -> Block:
    """Bytes and seconds by model, carried over from what was measured."""
    return Block(scale_table(source.measured(device)).markdown())


def disturbed(source: Source) -> Block:
    """Runs that were killed, interrupted, starved and damaged, and what was lost."""
    return Block(disturbance_table(source.tormented("chaos")).markdown())


def soaked(source: Source) -> Block:
    """What grew in a long training, and what many stops changed."""
    return Block(soak_table(source.tormented("soak")).markdown())


def fuzzed(source: Source) -> Block:
    """Mutated files by parser, and what was found."""
    return Block(fuzz_table(source.tormented("fuzz")).markdown())


def distributed(source: Source) -> Block:
    """Several processes against one."""
    return Block(distributed_table(source.tormented("distributed")).markdown())


def scaling(source: Source) -> Block:
    """Seconds, bytes and traffic on more GPUs, by counts of operations."""
    return Block(_paragraphs(time_table().markdown(), bytes_table().markdown()))


def calibration(source: Source) -> Block:
    """What C_pre was measured on: its source, and how many sequences; a table for each method."""
    results = source.chosen(CALIBRATION)
    task = _only_task(results)
    ordered = sorted(results, key=lambda r: (_source(r) != SELF, _source(r), _count(r)))
    level, matched = at_matched_task([_relabelled(r, _calibrated(r)) for r in ordered], task)
    tables = []
    for title in dict.fromkeys(r.title for r in ordered):
        rows = [_relabelled(r, _calibrated(r)) for r in ordered if r.title == title]
        reference = f"{title}, {SELF} {COUNT}"
        tables.append(comparison_table(rows, task, level, reference=reference).markdown())
    shared = "The tables share their level: 90 % of the way from the base to the best row of all."
    kept = {(r.title, _source(r), _count(r)): matched[_calibrated(r)].kept for r in ordered}
    image = _image("calibration.png", "kept by source and number of sequences")
    text = _paragraphs(*tables, shared, source.missing(CALIBRATION), image)
    return Block(text, {"calibration.png": partial(calibration_picture, kept, COUNT)})


def catalogue(source: Source) -> Block:
    """All methods: what each changes, and what it is."""
    del source
    rows = [
        (name, m.title, ", ".join(f"{k} = {v}" for k, v in m.changes.items()) or "nothing", m.about)
        for name, m in METHODS.items()
    ]
    caption = "Names are those of `folora compare --methods`; options those of `folora run`."
    return Block(
        Table(("name", "method", "changes", "what it is"), tuple(rows), caption).markdown()
    )


def compared(source: Source, plan: str, task: str) -> Block:
    """What one ``folora compare`` found, by the meter alone."""
    results = source.chosen(plan, task)
    picture = f"{plan}_{task}.png"
    text = _paragraphs(
        comparison_table(results, task, reference=REFERENCE).markdown(),
        _image(picture, f"KL against task loss, {plan}"),
    )
    return Block(text, {picture: partial(frontier_picture, results, task)})


def demo(source: Source) -> Block:
    """What ``make demo`` wrote: one seed of LoRA and folora at the same rate and steps."""
    if not source.demo:
        raise NoResultsError("No result of `make demo` yet.")
    kinds = " and ".join(run["cpu"] for run in source.demo)
    caption = f"One seed; `make demo` on CPUs with {kinds}; a range where they differ."
    return Block(Table(*demo_cells(source.demo), caption).markdown())


def demo_cells(
    runs: Sequence[Mapping[str, Any]],
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and rows of the demo's table, from the results of ``make demo`` on several CPUs."""
    arms = tuple(runs[0]["scores"])

    def cell(arm: str, key: str, style: str) -> str:
        values = sorted(run["scores"][arm][key] for run in runs)
        return " to ".join(dict.fromkeys(style.format(v) for v in (values[0], values[-1])))

    rows = tuple((title, *(cell(arm, key, style) for arm in arms)) for title, key, style in DEMO)
    return ("", *arms), rows


def spectra(source: Source) -> Block:
    """How far C_task is from C_pre's eigenbasis, and how few directions carry the task."""
    if not source.spectra:
        raise NoResultsError("No results of `benchmarks.spectra` yet.")
    header = (
        "model", "task", "groups", "off-diagonal mass", "gate above its floor", "half of gamma",
    )  # fmt: skip
    rows = []
    for found in source.spectra:
        groups = found["groups"]
        mass, gate, half = ([g[name] for g in groups] for name in ("off_diagonal", "open", "half"))
        rows.append(
            (
                found["model"], found["task"], str(len(groups)), _range(mass, ".3f"),
                _range(gate, ".0%"), _range(half, "g"),
            )
        )  # fmt: skip
    caption = (
        "Median (range) over the groups, that is the shared inputs. Off-diagonal mass: share of "
        "||C_task||_F^2 off the diagonal in the eigenbasis of C_pre. Gate above its floor: share of "
        "the directions. Half of gamma: directions that carry half of the sum. At the default tau, "
        "lambda and s_min."
    )
    table = Table(header, tuple(rows), caption)
    image = _image("spectra.png", "off-diagonal mass, gamma and gate")
    text = _paragraphs(table.markdown(), image)
    return Block(text, {"spectra.png": partial(spectra_picture, source.spectra)})


BLOCKS: dict[str, Callable[..., Block]] = {
    "runs": runs,
    "catalogue": catalogue,
    "methods": methods,
    "norms": norms,
    "variants": variants,
    "knobs": knobs,
    "seeds": seeds,
    "real": real,
    "real_seeds": real_seeds,
    "real_beside": real_beside,
    "real_rates": real_rates,
    "calibration": calibration,
    "spectra": spectra,
    "compared": compared,
    "demo": demo,
    "turned": turned,
    "turned_by_meter": turned_by_meter,
    "ingredients": ingredients,
    "enough": enough,
    "enough_by_meter": enough_by_meter,
    "amounts_of_text": amounts_of_text,
    "amounts_of_rows": amounts_of_rows,
    "steps": steps,
    "preparation": preparation,
    "scale": scale,
    "disturbed": disturbed,
    "soaked": soaked,
    "fuzzed": fuzzed,
    "distributed": distributed,
    "scaling": scaling,
}


def norm_table(results: Sequence[Result], which: Norm) -> Table:
    """Kept at three sizes of the update in one norm, and the difference from folora."""
    scores, arms = scores_of(results), by_method(grouped(results))
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
    header, rows = ["method"], {method: [titles[method]] for method in arms}
    for size in dict.fromkeys(quartiles):
        values = {
            method: {seed: at_norm(found, size, which) for seed, found in seeds.items()}
            for method, seeds in paths.items()
        }
        column = Column(f"{which[0].upper()} = {size:g}", 3, values)
        header.append(column.title)
        for method, row in rows.items():
            row.append(column.cell(method))
        if REFERENCE in arms:
            header.append(f"minus {titles[REFERENCE]}")
            for method, row in rows.items():
                row.append(column.difference(method, REFERENCE))
    caption = (
        f"{results[0].task}: kept score at equal {which[0].upper()} = {NORMS[which]}, interpolated along each arm, mean over the "
        "arms of a method that get there, then mean ± half-width of the 95 % interval over seeds. "
        f"Sizes: rounded quartiles among those readings of {titles[mine]} that have learned at least "
        f"half of the best. *: the interval of the differences by seed excludes zero. {NONE}: no arm gets "
        "there."
    )
    return Table(tuple(header), tuple(map(tuple, rows.values())), caption)


def knob_panels(
    turned: Sequence[Result], defaults: Sequence[Result], matched: Mapping[str, Matched]
) -> list[Panel]:
    """One panel for each knob that was turned alone."""
    panels = []
    for knob in dict.fromkeys(knob for r in turned for knob in _knobs(r)):
        alone = [r for r in turned if _knobs(r) == [knob]]
        values = {float(r.changes[knob]): matched[_setting(r)] for r in alone}
        default = defaults[0].config.get(knob, attrgetter(knob)(FoLoraConfig()))
        default = default if isinstance(default, int | float) else None  # "all" has no place
        if default is not None:
            values[float(default)] = matched[DEFAULTS]
        panels.append(Panel(_name(knob), values, default, matched[DEFAULTS]))
    return panels


def render(template: str, source: Source, name: str = "the template") -> Block:
    """The whole page: the template with its blocks filled in, and all pictures.

    Raises:
        ConfigError: A block is unknown, or its arguments or results are wrong; the line is named.
    """
    lines: list[str] = []
    pictures: dict[str, Drawing] = {}
    for number, line in enumerate(template.splitlines(), 1):
        if "{{" not in line:
            lines.append(line)
            continue
        try:
            block = _called(line, source)
        except NoResultsError as nothing:
            block = Block(f"*{nothing}*")
        except FoLoraError as error:
            raise ConfigError(f"{name}, line {number}, {line.strip()!r}: {error}") from error
        lines.append(block.text.strip())
        pictures |= block.pictures
    return Block("\n".join([*lines, ""]), pictures)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the pages of docs from the result files.")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--plans", type=Path, default=Path("benchmarks/plans"))
    parser.add_argument("--demo", type=Path, default=Path("docs/demo.json"))
    parser.add_argument("--template", type=Path, help="default: those of all pages")
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"), help="its page")
    options = parser.parse_args(arguments)
    source = Source.load(options.results, options.plans, options.demo)
    for template, output in (
        {options.template: options.output} if options.template else PAGES
    ).items():
        page = render(template.read_text(encoding="utf-8"), source, str(template))
        for name, draw in page.pictures.items():
            draw(output.parent / PICTURES / name)
        write_text(output, page.text)
        print(f"{output} and {len(page.pictures)} pictures")


def _called(line: str, source: Source) -> Block:
    """The block that a line of the template calls for."""
    call = CALL.fullmatch(line)
    if not call:
        raise ConfigError("a block {{ name argument ... }} needs a line of its own")
    name, *arguments = call[1].split() or [""]
    check_word(name, BLOCKS, "block")
    try:
        inspect.signature(BLOCKS[name]).bind(source, *arguments)
    except TypeError as error:
        raise ConfigError(f"wrong arguments, {error}") from error
    return BLOCKS[name](source, *arguments)


def _present(results: Iterable[Result], wanted: Iterable[str]) -> list[str]:
    there = {r.method for r in results}
    return [method for method in wanted if method in there]


def _only_task(results: Iterable[Result]) -> str:
    task, *others = dict.fromkeys(r.task for r in results)
    if others:
        raise DataError(
            f"results of one task are needed, but there are {task}, {', '.join(others)}"
        )
    return task


def _relabelled(result: Result, name: str) -> Result:
    return replace(result, method=name, title=name)


def _knobs(result: Result) -> list[str]:
    return [name for name in result.changes if name != RATE]


def _name(knob: str) -> str:
    return NAMES.get(knob, knob.rsplit(".", 1)[-1])


def _place(knob: str) -> tuple[int, str]:
    """Order of knobs: as in NAMES, then all others."""
    return (list(NAMES).index(knob) if knob in NAMES else len(NAMES), knob)


def _setting(result: Result) -> str:
    def text(value: Any) -> str:
        return value if isinstance(value, str) else f"{value:g}"

    return ", ".join(f"{_name(knob)} = {text(result.changes[knob])}" for knob in _knobs(result))


def _source(result: Result) -> str:
    return str(result.calibration["source"])


def _count(result: Result) -> int:
    return int(result.calibration["count"])


def _calibrated(result: Result) -> str:
    return f"{result.title}, {_source(result)} {_count(result)}"


def _range(values: Sequence[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _image(name: str, about: str) -> str:
    return f"![{about}]({PICTURES}/{name})"


def _paragraphs(*parts: str) -> str:
    return "\n\n".join(part.strip() for part in parts if part)


if __name__ == "__main__":
    main()
