"""FoLoraTrainer: TRL's SFTTrainer with SAdam, the meter, the anchor and sealed checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import (
    PreTrainedTokenizerBase,
    TrainerControl,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME

from folora.adapters.low_rank import narrow_inputs
from folora.data.contents import IGNORE
from folora.errors import ArtifactError, ConfigError, FoLoraError, NumericsError
from folora.metrics.kl import labelled_logits, likely_labels, masked_target_kl
from folora.metrics.meter import LayerNorms, Reading, total_norm, update_norms
from folora.runtime import distributed
from folora.runtime.checkpoints import (
    latest_checkpoint,
    remedy,
)
from folora.runtime.contexts import evaluating, without_adapter
from folora.runtime.extras import needed_by
from folora.runtime.finiteness import first_non_finite_module, non_finite_gradients
from folora.runtime.progress import progress
from folora.runtime.storage import sweep
from folora.training.anchor import BudgetWeight
from folora.training.arguments import check_sharding, sft_config
from folora.training.callbacks import AfterStep, OwnIntervals
from folora.training.hyperparameters import check_optimizer, follow_arguments
from folora.training.interruption import StopAfterStep, finishing_step
from folora.training.prepared import Prepared, to_dataset
from folora.training.progress import training_progress
from folora.training.sealed import SealedTrainer

with needed_by("training", "trl"):
    from trl.trainer.sft_config import SFTConfig

logger = logging.getLogger(__name__)

ANCHOR = "anchor.json"  # in checkpoints


class FoLoraTrainer(SealedTrainer):
    """SFTTrainer on a `Prepared` model: `evaluate` reads the meter and logs its metrics.

    A gradient that is not finite never reaches the optimizer: training ends with a NumericsError.
    Checkpoints are those of `SealedTrainer`.

    Args:
        prepared: From `prepare`.
        args: Any SFTConfig; `sft_config` makes one from a config. Its learning rate, weight decay, betas
            and epsilon replace the prepared ones.
        processing_class: The tokenizer.
        kwargs: Passed on to SFTTrainer (callbacks, data_collator, ...).

    Raises:
        ConfigError: `args` selects another optimizer, or a sharding that flattens parameters.
    """

    def __init__(
        self,
        prepared: Prepared,
        args: SFTConfig,
        processing_class: PreTrainedTokenizerBase,
        **kwargs: Any,
    ) -> None:
        self.prepared = prepared
        check_sharding(args)
        check_optimizer(args)
        held_out = prepared.task.held_out
        super().__init__(
            model=prepared.model,
            args=args,
            train_dataset=prepared.train_dataset(),
            eval_dataset=to_dataset(held_out) if held_out else None,
            processing_class=processing_class,
            **kwargs,
        )
        self.add_callback(OwnIntervals())
        passes = self.args.max_steps * self.args.gradient_accumulation_steps
        self.anchor = prepared.anchor(
            passes if passes > 0 else None, args.per_device_train_batch_size
        )
        self._task_loss = torch.zeros(())  # of the step so far, without the anchor's
        if self.anchor is not None:
            self.add_callback(AfterStep(self._follow_budget))
            self.resumable[ANCHOR] = self.anchor

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """The prepared optimizer, over parameters that FSDP2 has not sharded yet."""
        if self.optimizer is None:
            self.optimizer = self.prepared.optimizer
            follow_arguments(self.optimizer, self.args, self.prepared.config.training)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of a step, without the rows with which Accelerate fills up the last batch of an epoch.

        Accelerate repeats rows so that all processes get equally many. Their labels are masked, so that
        the step equals that of one process, whose last batch is smaller. Tokens of a perplexity above
        ``method.max_perplexity`` are masked here, too, before the step's tokens are counted.
        """
        masked = map(self._mask_unlikely, map(self._mask_repeated, epoch_iterator))
        found: tuple[list[Any], Tensor | int | None] = super().get_batch_samples(
            masked, num_batches, device
        )
        return found

    def _mask_repeated(self, batch: dict[str, Any]) -> dict[str, Any]:
        state = self.accelerator.gradient_state
        if "labels" not in batch or not state.end_of_dataloader or state.remainder <= 0:
            return batch
        labels = batch["labels"]
        real = state.remainder - self.args.process_index * self._train_batch_size
        if len(labels) == self._train_batch_size or real <= 0:  # otherwise rows were packed
            labels = labels.clone()
            labels[max(0, real) :] = IGNORE
        return {**batch, "labels": labels}

    def _mask_unlikely(self, batch: dict[str, Any]) -> dict[str, Any]:
        limit = self.prepared.config.method.max_perplexity
        if limit is None or "labels" not in batch:
            return batch
        model = self.prepared.model
        with self.compute_loss_context_manager(), evaluating(model), without_adapter(model):
            return {**batch, "labels": likely_labels(model, batch, limit)}

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """SFTTrainer's loss plus the anchor's, and the KL penalty of the config."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        penalty = self._penalty(model, inputs) if model.training else None
        if penalty is None:
            return result
        loss = (result[0] if return_outputs else result).detach()
        # Given a token count, SFTTrainer does not average over micro-batches.
        if num_items_in_batch is not None:
            penalty = penalty / self.current_gradient_accumulation_steps
        else:
            loss = loss / self.current_gradient_accumulation_steps
        self._task_loss = self._task_loss.to(loss.device) + loss
        return (result[0] + penalty, result[1]) if return_outputs else result + penalty

    @property
    def ended_early(self) -> str | None:
        """After which step training ended early, and why; None if it did not."""
        weight = None if self.anchor is None else self.anchor.weight
        if not isinstance(weight, BudgetWeight) or weight.stop.reason is None:
            return None
        state = self.state
        return f"after step {state.global_step} of {state.max_steps}: {weight.stop.reason}"

    def _follow_budget(self, state: TrainerState, control: TrainerControl) -> None:
        """After each step: adjust the anchor's weight, and end training if the budget allows no more."""
        loss, self._task_loss = self._task_loss, torch.zeros(())
        if self.anchor is not None and self.anchor.step(loss):
            control.should_training_stop = True
            control.should_save |= self.args.save_strategy != "no"
            logger.info("training ends early, %s", self.ended_early)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in SFTTrainer, without PEFT's input casts and with folora's progress bar."""
        with narrow_inputs(self.prepared.model), training_progress(self):
            return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """SFTTrainer's forward and backward pass, followed by a check of the gradients."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        # The fp16 gradient scaler skips such steps itself and adjusts its scale by them.
        if self.accelerator.scaler is None:
            self._check_gradients(inputs)
        return loss

    def _check_gradients(self, inputs: dict[str, Any]) -> None:
        """Raise NumericsError if a gradient is not finite, before the optimizer step."""
        if not self.accelerator.sync_gradients and distributed.world_size() > 1:
            return  # after the step's last backward pass all processes see the same gradients
        if not (names := self._non_finite_gradients()):
            return
        with self.compute_loss_context_manager():
            where = first_non_finite_module(self.prepared.model, inputs)
        rate = self.prepared.config.training.learning_rate
        raise NumericsError(
            f"step {self.state.global_step + 1}: {len(names)} gradients are not finite, such as "
            f"{names[0]}'s; {where}. The optimizer was not updated, and checkpoints are valid. Inspect the "
            f"rows of this step; or, if the model overflows, lower training.learning_rate (now {rate:g}), or "
            "train in bf16 or fp32."
        )

    def _non_finite_gradients(self) -> list[str]:
        """Names of parameters whose gradient is not finite, the same in all processes."""
        own = non_finite_gradients(self.prepared.model)
        if not self.is_fsdp_enabled:
            return own  # all have the same gradients
        return (
            sorted({*chain(*distributed.all_gather(own))})
            if distributed.all_reduce_max(len(own))
            else []
        )

    def _penalty(self, model: Any, inputs: dict[str, Any]) -> Tensor | None:
        """The anchor's loss, and the weighted KL on the task's rows; None if there is neither."""
        terms = [] if self.anchor is None else [self.anchor.loss(model)]
        if weight := self.prepared.config.method.masked_kl_weight:
            adapted, base, targets = self._both(model, inputs)
            if len(targets):  # all labels of the batch may be masked
                terms.append(weight * masked_target_kl(base, adapted, targets).mean())
        return sum(terms[1:], terms[0]) if terms else None

    def _both(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the adapted and of the base model at labelled positions, and the labels."""
        adapted, labels = labelled_logits(model, batch)
        with torch.no_grad(), without_adapter(self.prepared.model):
            base, _ = labelled_logits(model, batch)
        return adapted, base, labels

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Read the meter; metrics are named ``{prefix}_loss``, ``_kl``, ``_kl_SOURCE``, ``_ce_change``, and norms.

        With an `eval_dataset` it is SFTTrainer's evaluation instead.
        """
        if eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        reading, norms = self.read()
        total = total_norm(norms)
        metrics = {
            f"{metric_key_prefix}_loss": reading.task_loss,
            f"{metric_key_prefix}_kl": reading.kl,
            f"{metric_key_prefix}_ce_change": reading.ce_change,
            f"{metric_key_prefix}_frobenius": total.frobenius,
            f"{metric_key_prefix}_h_norm": total.h_norm,
            **{f"{metric_key_prefix}_kl_{name}": kl for name, kl in reading.kl_by_source.items()},
        }
        model = self.prepared.model
        training = model.training
        model.eval()  # SFTTrainer.log distinguishes evaluation and training by the model's mode
        self.log(dict(metrics))
        model.train(training)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def read(self) -> tuple[Reading, dict[str, LayerNorms]]:
        """The meter's reading and every layer's norms, in the precision of training."""
        meter = self.prepared.meter
        with (
            self.compute_loss_context_manager(),
            progress("measuring KL and task loss (batches)", meter.num_batches) as tick,
        ):
            reading = meter.read(self.prepared.model, tick)
        return reading, update_norms(self.prepared.model, self.prepared.bases)


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
