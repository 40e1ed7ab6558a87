"""Further held-out text, which the base generates once a budget is known to bind."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial

from folora.calibration.calibration_set import CalibrationSet
from folora.calibration.sampling import sample_sequences
from folora.config import SEEDS
from folora.errors import FoLoraError
from folora.metrics.budget import ENOUGH, More
from folora.pipeline.context import Context

logger = logging.getLogger(__name__)


def further_text(context: Context, samples: CalibrationSet) -> More | None:
    """What generates held-out text beyond that of `samples`, up to `ENOUGH` sequences; None if it is not needed."""
    wanted = ENOUGH - len(samples.held_out)
    return partial(_generate, context, samples, wanted) if wanted > 0 else None


def _generate(
    context: Context, samples: CalibrationSet, wanted: int
) -> Mapping[str, Sequence[list[int]]]:
    """The text by source; empty, with a warning, if a source is a file or the engine fails."""
    files = [source.name for source in context.mixture.sources if not source.endless]
    try:
        if files:
            raise FoLoraError(f"{files[0]} has no further text; raise sampling.held_out")
        found = sample_sequences(
            context.engine(SEEDS - 1 - context.config.seed),  # other text than the calibration set
            context.mixture,
            context.eos_ids,
            context.config.sampling.replace(num_sequences=wanted),
        )
    except FoLoraError as error:
        logger.warning(
            "the budget is kept on %d held-out sequences, with a wide interval: %s",
            len(samples.held_out),
            error,
        )
        return {}
    return found.by_source(held_out_only=False)
