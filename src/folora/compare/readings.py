"""When and how a training is read: the meter, update norms and scores, during training and for scaled updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import TrainerControl, TrainerState

from folora.metrics.budget import BudgetFit
from folora.metrics.meter import total_norm
from folora.training.callbacks import AfterStep

if TYPE_CHECKING:
    from folora.training.trainer import FoLoraTrainer  # as in `compute`

READ_AT = (1 / 4, 1 / 2, 3 / 4, 1.0)

Scores = dict[str, dict[str, float]]
"""``{"task": {name: score}, "kept": {name: score}}``, every score in [0, 1].

``"other"`` may hold further metrics on any scale, ``"flips"`` numbers of questions whose answer changed."""

Score = Callable[[PeftModel], Scores]

Readings = list[dict[str, Any]]


def no_scores(model: PeftModel) -> Scores:
    """The meter alone."""
    return {"task": {}, "kept": {}}


class Reader:
    """Takes the readings of trainings on one model and task; the arguments are those of `Comparison`."""

    def __init__(
        self,
        score: Score,
        read_at: Sequence[float],
        score_at: Sequence[float] | None,
        scales: Sequence[float],
    ) -> None:
        self.score, self.read_at, self.scales = score, tuple(read_at), tuple(scales)
        self.score_at = self.read_at if score_at is None else tuple(score_at)
        self._base: dict[str, Any] = {}

    def base(self, trainer: FoLoraTrainer) -> dict[str, Any]:
        """The reading before the first step, when every update is zero: the first trainer's."""
        if not self._base:
            self._base = {**self._read(trainer, 0), "frobenius": 0.0, "h_norm": 0.0}
        return self._base

    def train(self, trainer: FoLoraTrainer) -> tuple[Readings, bool]:
        """Train; returns readings at fractions of training, and whether it diverged, which ends it."""
        readings: Readings = []
        # A uniform distribution has at most this KL to the base.
        uniform = math.log(trainer.prepared.model.get_input_embeddings().num_embeddings)

        def diverged() -> bool:
            kl = readings[-1]["kl"]
            return kl is None or kl > uniform

        def after_step(state: TrainerState, control: TrainerControl) -> None:
            if state.global_step in steps_at(self.read_at, state.max_steps):
                readings.append(self._read(trainer, state.global_step))
                control.should_training_stop |= diverged()

        trainer.add_callback(AfterStep(after_step))
        trainer.train()
        if (step := trainer.state.global_step) not in {reading["step"] for reading in readings}:
            readings.append(self._read(trainer, step))  # training ended early
        return readings, diverged()

    def scaled(self, trainer: FoLoraTrainer, fits: Sequence[BudgetFit] = ()) -> Readings:
        """Readings of the trained update scaled by each of `scales`, and within budgets."""
        found = [self._at(trainer, scale) for scale in self.scales]
        for fit in fits:  # whose KL is measured on more text than the meter's
            kl = {"kl": fit.kept.mean, "kl_by_source": fit.kept.by_source}
            found.append(self._at(trainer, fit.scale) | rounded(kl))
        return found

    def _at(self, trainer: FoLoraTrainer, scale: float) -> dict[str, Any]:
        with trainer.prepared.kind.scaled(trainer.prepared.model, scale):
            reading = self._read(trainer, trainer.state.global_step)
        return {**reading, "scale": rounded(scale)}

    def _read(self, trainer: FoLoraTrainer, step: int) -> dict[str, Any]:
        """A reading of the meter, with scores if they are due and the model has not diverged."""
        reading, norms = trainer.read()
        due = step in {0, *steps_at(self.score_at, trainer.state.max_steps)}
        scored = (due or trainer.ended_early is not None) and math.isfinite(reading.kl)
        scores = (self.score if scored else no_scores)(trainer.prepared.model)
        return rounded({"step": step, **asdict(reading), **asdict(total_norm(norms)), **scores})  # type: ignore[no-any-return]


def steps_at(shares: Sequence[float], steps: int) -> set[int]:
    """The steps at which the given fractions of `steps` are complete."""
    return {max(1, round(share * steps)) for share in shares}


def rounded(value: Any) -> Any:
    """All floats in a value to six significant digits; those that are not finite become None."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
