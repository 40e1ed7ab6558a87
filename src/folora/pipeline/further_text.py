"""Further held-out text, which the base generates once a budget is known to bind."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial

from folora.calibration.base_file import unlike_shares
from folora.calibration.calibration_set import CalibrationSet
from folora.calibration.sampling import sample_sequences
from folora.config import LEAST_SEQUENCES, SEEDS
from folora.errors import FoLoraError
from folora.metrics.budget import ENOUGH, More
from folora.pipeline.context import Context

logger = logging.getLogger(__name__)


def further_text(context: Context, samples: CalibrationSet) -> More | None:
    """What generates held-out text beyond that of `samples`, up to `ENOUGH` sequences; None if it is not needed."""
    if len(samples.held_out) >= ENOUGH:
        return None
    return partial(_generate, context, samples)


def generated(
    context: Context, count: int, seed: int | None = None
) -> Mapping[str, Sequence[list[int]]]:
    """So many sequences of the config's sources, by source; see `Context.engine` for `seed`. Raises FoLoraError."""
    sampling = context.config.sampling.replace(num_sequences=count)
    engine = context.engine(seed)
    found = sample_sequences(engine, context.mixture, context.eos_ids, sampling)
    return found.by_source(held_out_only=False)


def _generate(context: Context, samples: CalibrationSet) -> Mapping[str, Sequence[list[int]]]:
    """The text by source; empty, with a warning, if a source is a file, others made the base file, or the engine fails."""
    known, config = len(samples.held_out), context.config
    wanted = max(LEAST_SEQUENCES, ENOUGH - known)
    try:
        sources = context.mixture.sources
        shares = {source.name: source.share for source in sources}
        if config.base is not None and (unlike := unlike_shares(samples.shares, shares)):
            return _nothing(
                known, f"{config.base} has text of {unlike[0]}; name that in sampling.sources"
            )
        if given := [source.name for source in sources if not source.endless]:
            return _nothing(known, f"{given[0]} has no further text; raise sampling.held_out")
        logger.info("the budget may bind: KL is measured on %d further sequences", wanted)
        # The seed gives other text than the calibration set.
        return generated(context, wanted, SEEDS - 1 - config.seed)
    except FoLoraError as error:
        return _nothing(known, str(error))


def _nothing(known: int, reason: str) -> Mapping[str, Sequence[list[int]]]:
    logger.warning("the budget is kept on %d sequences, with a wide interval: %s", known, reason)
    return {}
