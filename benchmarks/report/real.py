"""Blocks on pretrained models: KL and scores relative to LoRA's at matched task loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.report.blocks import (
    REFERENCE,
    REFERENCES,
    Block,
    image,
    knobs_of,
    parts,
    relabelled,
    setting,
)
from benchmarks.report.forgetting import answers_table, forgetting_table, without_scores
from benchmarks.report.source import NoResultsError, Source, rate_of
from folora.compare.plots import frontier_picture
from folora.compare.results import Result
from folora.compare.tables import Table, comparison_table


def real(source: Source, plan: str, task: str) -> Block:
    """Forgetting of each method on a pretrained model, scores by benchmark, and the frontier."""
    results = source.chosen(plan, task)
    picture = f"{plan}_{task}.png"
    content = parts(
        forgetting_table(results),
        answers_table(results),
        source.missing(plan, task),
        image(picture, f"KL against task loss, {task}"),
    )
    meter = [without_scores(r) for r in results]  # KL resolves more than a few questions
    return Block(content, {picture: partial(frontier_picture, meter, task)})


def real_seeds(source: Source, plan: str, task: str, baseline: str, *others: str) -> Block:
    """Forgetting of each method relative to a baseline's, at all seeds of several plans."""
    table = forgetting_table(source.pooled(plan, task, others), baseline)
    return Block(parts(table, source.missing(plan, task)))


def ingredients(source: Source, plan: str, task: str, other: str) -> Block:
    """Methods and settings of a plan, with another plan's references at the same seeds, by KL alone."""

    def named(result: Result) -> Result:
        return relabelled(result, f"folora, {setting(result)}") if knobs_of(result) else result

    together = map(without_scores, with_references(source, plan, task, other, named))
    table = comparison_table(together, task, reference=REFERENCE)
    return Block(parts(table, source.missing(plan, task)))


def real_beside(source: Source, plan: str, task: str, other: str) -> Block:
    """Forgetting of each method of a plan, with another plan's references at the same seeds."""
    return _beside(source, plan, task, other, lambda result: result)


def real_rates(source: Source, plan: str, task: str, other: str) -> Block:
    """The same with one row per learning rate."""
    return _beside(
        source, plan, task, other, lambda r: relabelled(r, f"{r.title} at {rate_of(r):g}")
    )


def compared(source: Source, plan: str, task: str) -> Block:
    """The result of one ``folora compare``, by KL alone."""
    results = source.chosen(plan, task)
    picture = f"{plan}_{task}.png"
    content = parts(
        comparison_table(results, task, reference=REFERENCE),
        image(picture, f"KL against task loss, {plan}"),
    )
    return Block(content, {picture: partial(frontier_picture, results, task)})


def demo(source: Source) -> Block:
    """The table of ``make demo``."""
    if not source.demo:
        raise NoResultsError("No result of `make demo` yet.")
    return Block([Table(**source.demo["table"])])


def _beside(
    source: Source, plan: str, task: str, other: str, named: Callable[[Result], Result]
) -> Block:
    table = forgetting_table(with_references(source, plan, task, other, named))
    return Block(parts(table, source.missing(plan, task)))


def with_references(
    source: Source,
    plan: str,
    task: str,
    other: str,
    named: Callable[[Result], Result] = lambda result: result,
) -> list[Result]:
    """A plan's results, after LoRA's and folora's of another plan at the same seeds."""
    results = source.chosen(plan, task)
    seeds = {r.seed for r in results}
    references = [
        r for r in source.maybe(other, task) if r.method in REFERENCES and r.seed in seeds
    ]
    return [*references, *map(named, results)]


BLOCKS: dict[str, Callable[..., Block]] = {
    "real": real,
    "real_seeds": real_seeds,
    "ingredients": ingredients,
    "real_beside": real_beside,
    "real_rates": real_rates,
    "compared": compared,
    "demo": demo,
}
