"""Training shows the bar and the log lines of every other stage instead of the Trainer's own."""

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
"""What is shown of the Trainer's logs, as what, and in which format."""


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
        if distributed.rank() == 0 and (said := _in_words(logs or {})):
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, said)


@contextmanager
def training_progress(trainer: Trainer) -> Iterator[None]:
    """Show a bar of steps, and a line for what the Trainer logs, while the block trains.

    The bar ends with the block, also after an error. A Trainer that shows tqdm's bar
    (``disable_tqdm=False``) is left as it is.
    """
    with ExitStack() as bars:
        if trainer.args.disable_tqdm:
            trainer.remove_callback(PrinterCallback)  # which prints dicts on stdout
            trainer.add_callback(shown := _TrainingProgress(bars))
        yield
        if trainer.args.disable_tqdm:
            trainer.remove_callback(shown)


def _in_words(logs: Mapping[str, Any]) -> str:
    """The shown values of a Trainer's log entry; numbers may come as text."""
    return ", ".join(
        f"{title} {float(logs[name]):{style}}"
        for name, (title, style) in SHOWN.items()
        if name in logs
    )
