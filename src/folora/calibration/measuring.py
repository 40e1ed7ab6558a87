"""Measure second moments on tokenized examples, with progress, in as many passes as fit the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from folora.calibration.moments import passes, room_for_moments, second_moments
from folora.calibration.stopping import EarlyStopping, watched
from folora.config import FoLoraConfig, StatisticsConfig
from folora.data.rows import Example, batches, text_examples
from folora.runtime.progress import progress
from folora.spectral.groups import InputGroup
from folora.spectral.moments import Moments


def measure(
    model: PreTrainedModel,
    groups: Sequence[InputGroup],
    examples: Sequence[Example],
    config: StatisticsConfig,
    what: str,
    store: bool = True,
) -> Moments:
    """`second_moments` over examples, with progress, in as many passes as fit the memory.

    Args:
        model: The base model.
        groups: From `find_groups`.
        examples: Tokenized texts or rows.
        config: Batch size and memory limit.
        what: Label of the progress bar.
        store: Whether this process needs the matrices. After several passes they are on the host.
    """
    parts = _in_passes(model, groups, config)
    matrices: dict[str, Tensor] = {}
    total = len(parts) * sum(len(e.input_ids) for e in examples)
    with progress(f"measuring {what} (tokens)", total) as tick:
        for part in parts:
            found = second_moments(
                model, part, batches(examples, config.batch_size), lambda n: tick(n, n)
            )
            if store:
                several = len(parts) > 1
                matrices |= {n: m.cpu() if several else m for n, m in found.matrices.items()}
    return Moments(matrices, found.tokens, tuple(groups))


def early_stopping(
    model: PreTrainedModel,
    groups: Sequence[InputGroup],
    c_task: Mapping[str, Tensor],
    config: FoLoraConfig,
) -> EarlyStopping | None:
    """The early-stopping criterion of sampling; None if it always runs to ``sampling.num_sequences``.

    Args:
        model: The base model.
        groups: From `find_groups`.
        c_task: C_task by group name, (d_in, d_in).
        config: Its tolerance and its options of the spectrum are used.
    """
    tolerance = config.sampling.tolerance
    if tolerance is None or not config.sampling.may_end_early:
        return None
    chosen = watched(groups)

    def measured(sequences: Sequence[list[int]], all_groups: bool) -> Moments:
        examples = text_examples(sequences)
        texts = batches(examples, config.statistics.batch_size)
        where = groups if all_groups else chosen
        with progress("checking (tokens)", sum(len(e.input_ids) for e in examples)) as tick:
            return second_moments(model, where, texts, lambda n: tick(n, n), apart=chosen)

    return EarlyStopping(
        measured,
        {group.name: c_task[group.name] for group in chosen},
        config.spectrum.tau,
        config.spectrum.lam,
        config.spectrum.s_min,
        config.directions or config.adapter.r,
        tolerance,
        fits_in_memory=len(_in_passes(model, groups, config.statistics)) == 1,
    )


def _in_passes(
    model: PreTrainedModel, groups: Sequence[InputGroup], config: StatisticsConfig
) -> list[list[InputGroup]]:
    """The groups that are measured in each pass over the text."""
    return passes(groups, room_for_moments(model.device, config.memory_gb))
