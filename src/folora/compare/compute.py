"""Tokens that a training processes, set-up included: the compute at which methods are compared.

What arms share is counted for every method that needs it; what only measures (the meter, scores) is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from folora.calibration.calibration_set import CalibrationSet
from folora.metrics.budget import BudgetFit

if TYPE_CHECKING:
    # Imported by then, and needs the extra `trl`, where a comparison should name `compare`.
    from folora.training.trainer import FoLoraTrainer

WITHOUT_MOMENTS = frozenset({"kaiming", "minor_singular"})  # initializations


def tokens_processed(
    trainer: FoLoraTrainer,
    samples: CalibrationSet,
    c_pre: int,
    c_task: int,
    fits: Sequence[BudgetFit] = (),
) -> dict[str, int]:
    """Tokens by purpose, without padding.

    Args:
        trainer: After the training, in which ``include_num_input_tokens_seen`` was ``"non_padding"``.
        samples: The calibration set.
        c_pre: Tokens in the mean of C_pre.
        c_task: Tokens in the mean of C_task.
        fits: Searches for the scale within a budget.

    Returns:
        ``task`` (replayed text included) and ``anchor``, trained on. Forward passes alone: ``base``, by the base on the
        task's rows during training; ``setup``, to generate the samples, measure second moments and store the
        anchor's log-probabilities, where the method needs them; ``scale``, to find the scale within a budget.
    """
    config, anchor = trainer.prepared.config, trainer.anchor
    method, task = config.method, trainer.state.num_input_tokens_seen
    spectral = method.optimizer == "sadam"
    moments = spectral or method.init not in WITHOUT_MOMENTS
    generated = method.replay > 0 and method.replay_text == "generated"
    setup = 0
    if moments or generated or anchor or config.budget:
        setup += _length(samples.calibration)
    if config.budget:
        setup += _length(samples.held_out)
    if moments:
        setup += c_pre
    if spectral or method.init == "eigen":
        setup += c_task
    if anchor:
        setup += _length(anchor.texts)
    # Of each sequence the first token has no KL.
    measured = max((fit.trained.tokens + fit.trained.sequences for fit in fits), default=0)
    further = max(0, measured - _length(samples.held_out))
    passes = (method.masked_kl_weight > 0) + (method.max_perplexity is not None)
    return {
        "task": task,
        "anchor": anchor.tokens if anchor else 0,
        "base": passes * task,
        "setup": setup,
        # Generated, if need be, and read by both the adapted model and the base.
        "scale": further + 2 * max((fit.readings for fit in fits), default=0) * measured,
    }


def _length(texts: Sequence[list[int]]) -> int:
    return sum(map(len, texts))
