"""FoLoraTrainer: TRL's SFTTrainer with SAdam, the meter, the anchor and sealed checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from folora.adapters.low_rank import narrow_inputs
from folora.metrics.meter import LayerNorms, Reading, total_norm, update_norms
from folora.runtime import distributed
from folora.runtime.extras import needed_by
from folora.runtime.progress import progress
from folora.training.arguments import check_sharding
from folora.training.callbacks import AfterStep, OwnIntervals
from folora.training.follow_budget import FollowBudget
from folora.training.gradients import check_gradients
from folora.training.hyperparameters import check_optimizer, follow_arguments
from folora.training.prepared import Prepared, to_dataset
from folora.training.progress import training_progress
from folora.training.rows import first_rows, masked_kl, without_unlikely
from folora.training.sealed import SealedTrainer

with needed_by("training", "trl"):
    from trl.trainer.sft_config import SFTConfig

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
        self._follow: FollowBudget | None = None
        if self.anchor is not None:
            self._follow = FollowBudget(self.anchor, saves=self.args.save_strategy != "no")
            self.add_callback(AfterStep(self._follow.after_step))
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
        masked = map(self._masked, epoch_iterator)
        found: Any = super().get_batch_samples(masked, num_batches, device)
        return found

    def _masked(self, batch: dict[str, Any]) -> dict[str, Any]:
        if "labels" not in batch:
            return batch
        state, limit = self.accelerator.gradient_state, self.prepared.config.method.max_perplexity
        if state.end_of_dataloader and state.remainder > 0:
            real = state.remainder - self.args.process_index * self._train_batch_size
            packed = len(batch["labels"]) != self._train_batch_size
            if real <= 0 or not packed:
                batch = first_rows(batch, real)
        if limit is None:
            return batch
        with self.compute_loss_context_manager():
            return without_unlikely(self.prepared.model, batch, limit)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """SFTTrainer's loss plus the anchor's, and the KL penalty of the config."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        terms = list(self._kl_terms(model, inputs)) if model.training else []
        if not terms:
            return result
        # Given a token count, SFTTrainer does not average over micro-batches.
        steps, averages = self.current_gradient_accumulation_steps, num_items_in_batch is None
        if self._follow is not None:
            loss = result[0] if return_outputs else result
            self._follow.add(loss / steps if averages else loss)
        penalty = sum(terms) if averages else sum(terms) / steps
        return (result[0] + penalty, result[1]) if return_outputs else result + penalty

    def _kl_terms(self, model: Any, inputs: dict[str, Any]) -> Iterator[Tensor]:
        """The anchor's loss, and the weighted KL on the task's rows."""
        if self.anchor is not None:
            yield self.anchor.loss(model)
        if weight := self.prepared.config.method.masked_kl_weight:
            divergence = masked_kl(model, self.prepared.model, inputs)
            if divergence is not None:
                yield weight * divergence

    @property
    def ended_early(self) -> str | None:
        """After which step training ended early, and why; None if it did not."""
        return None if self._follow is None else self._follow.ended_early(self.state)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in SFTTrainer, without PEFT's input casts and with folora's progress bar."""
        with narrow_inputs(self.prepared.model), training_progress(self):
            return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """SFTTrainer's forward and backward pass, followed by a check of the gradients."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        # With several processes only the step's last backward pass gives all of them the same gradients. The
        # fp16 gradient scaler skips such steps itself and adjusts its scale by them.
        last = self.accelerator.sync_gradients or distributed.world_size() == 1
        if last and self.accelerator.scaler is None:
            check_gradients(
                self.prepared.model,
                inputs,
                self.compute_loss_context_manager,
                step=self.state.global_step + 1,
                learning_rate=self.prepared.config.training.learning_rate,
                sharded=self.is_fsdp_enabled,
            )
        return loss

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
        metrics = _metrics(*self.read(), metric_key_prefix)
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
        prepared, meter = self.prepared, self.prepared.meter
        with (
            self.compute_loss_context_manager(),
            progress("measuring KL and task loss (batches)", meter.num_batches) as tick,
        ):
            reading = meter.read(prepared.model, tick)
        return reading, update_norms(prepared.kind.factors(prepared.model), prepared.bases)


def _metrics(reading: Reading, norms: dict[str, LayerNorms], prefix: str) -> dict[str, float]:
    """A reading as the Trainer logs it."""
    total = total_norm(norms)
    found = {
        "loss": reading.task_loss,
        "kl": reading.kl,
        "ce_change": reading.ce_change,
        "frobenius": total.frobenius,
        "h_norm": total.h_norm,
        **{f"kl_{name}": kl for name, kl in reading.kl_by_source.items()},
    }
    return {f"{prefix}_{name}": value for name, value in found.items()}
