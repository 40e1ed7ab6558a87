"""Progress bar and log lines of training, in the same form as those of the other stages."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from folora.runtime import distributed
from folora.runtime.progress import Tick, progress

logger = logging.getLogger(__name__)

SHOWN = {
    "loss": ("training loss", ".4f"),
    "learning_rate": ("learning rate", ".2e"),
    "eval_loss": ("task loss", ".4f"),
    "eval_kl": ("KL to the base", ".4f"),
}
"""Entries of the Trainer's logs that are shown, with title and format."""


class _TrainingProgress(TrainerCallback):
    def __init__(self, bars: ExitStack) -> None:
        self.bars = bars
        self.tick: Tick | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        bar = progress("training (steps)", state.max_steps, already=state.global_step)
        self.tick = self.bars.enter_context(bar)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.tick is not None:
            self.tick()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if distributed.rank() == 0 and (text := _formatted(logs or {})):
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, text)


@contextmanager
def training_progress(trainer: Trainer) -> Iterator[None]:
    """Show a progress bar of steps, and log the Trainer's metrics, during the block.

    The bar is closed at the end of the block, also after an error. With ``disable_tqdm=False`` the
    Trainer's own progress bar is used instead.
    """
    with ExitStack() as bars:
        if trainer.args.disable_tqdm:
            trainer.remove_callback(PrinterCallback)  # which prints dicts on stdout
            trainer.add_callback(shown := _TrainingProgress(bars))
        yield
        if trainer.args.disable_tqdm:
            trainer.remove_callback(shown)


def _formatted(logs: Mapping[str, Any]) -> str:
    """The shown values of a Trainer's log entry; numbers may be strings."""
    return ", ".join(
        f"{title} {float(logs[name]):{style}}"
        for name, (title, style) in SHOWN.items()
        if name in logs
    )
