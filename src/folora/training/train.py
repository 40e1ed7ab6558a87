"""`train`: a training to its end, resumed from the latest checkpoint of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from folora.errors import ArtifactError, ConfigError, FoLoraError
from folora.runtime import distributed
from folora.runtime.checkpoints import latest_checkpoint, remedy
from folora.runtime.storage import sweep
from folora.training.arguments import sft_config
from folora.training.interruption import StopAfterStep, finishing_step
from folora.training.prepared import Prepared
from folora.training.trainer import FoLoraTrainer


def _load_if_finished(trainer: FoLoraTrainer, checkpoint: Path) -> bool:
    """Load the state of a checkpoint after which training ended; returns False if steps remain.

    The Trainer would take one more step, because it checks for the end after a step.
    """
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    trainer.load_resumable(checkpoint)
    if state.global_step < state.max_steps and trainer.ended_early is None:
        return False
    weights = load_file(checkpoint / SAFETENSORS_WEIGHTS_NAME)
    set_peft_model_state_dict(trainer.prepared.model, weights)
    trainer.state = state
    return True


def train(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, folder: Path, **kwargs: Any
) -> FoLoraTrainer:
    """Train to the end, resuming from the latest complete checkpoint in `folder`.

    Raises:
        ConfigError: TRL refuses a combination of options.
        ArtifactError: A checkpoint cannot be written, or the latest one is damaged or belongs to another
            basis or model.
        NumericsError: See `FoLoraTrainer`.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last step was written.
    """
    config = prepared.config
    on_cpu = prepared.model.device.type == "cpu"
    args = sft_config(config, folder, evaluates=bool(prepared.task.held_out), on_cpu=on_cpu)
    try:
        trainer = FoLoraTrainer(prepared, args, tokenizer, **kwargs)
    except ValueError as error:  # combinations that TRL checks only here
        raise ConfigError(f"training: {error}") from error

    def latest() -> Path | None:
        if folder.is_dir():
            sweep(folder)  # a partly deleted checkpoint
        return latest_checkpoint(folder)

    checkpoint = distributed.on_rank_zero(latest)
    trainer.add_callback(stop := StopAfterStep())
    try:
        if checkpoint and _load_if_finished(trainer, checkpoint):
            return trainer
        with finishing_step(stop), distributed.reporting_lost_processes():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except FoLoraError:
        raise
    except Exception as error:  # state loaders raise any type of error
        if checkpoint is None or stop.began:
            raise
        raise ArtifactError(
            f"training cannot go on from {checkpoint}: {error}. {remedy(checkpoint)}"
        ) from error
    return trainer
