"""`Prepared`: the PEFT model, its optimizer, tokenized rows and meter, ready for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import PreTrainedModel

from folora.adapters.adapter import Factors, attach, lora_factors
from folora.adapters.export import ExportReport, export_adapter
from folora.calibration.calibration_set import CalibrationSet
from folora.config import FoLoraConfig
from folora.data.contents import Example
from folora.data.rows import TaskData, text_examples
from folora.errors import ConfigError
from folora.metrics.budget import (
    BudgetFit,
    More,
    Scaled,
    check_sequences,
    fit_budget,
    kl_for_budget,
    largest_scale,
)
from folora.metrics.meter import Meter, warn_if_not_stepped
from folora.optim.sadam import SAdam
from folora.spectral.layers import GroupBasis
from folora.training.anchor import Anchor, BudgetWeight
from folora.training.hyperparameters import adam_options
from folora.training.optimizer import optimizer, param_groups


@dataclass(frozen=True)
class AdapterKind:
    """A kind of adapter: how it is made, read and scaled.

    Attributes:
        adapt: Attaches it to the layers of the bases, and makes its optimizer.
        factors: A, B and kappa of each layer's update kappa B A, for its norms.
        scaled: Scales the update while a block runs.
    """

    adapt: Callable[[PreTrainedModel, Sequence[GroupBasis], FoLoraConfig], tuple[PeftModel, SAdam]]
    factors: Callable[[PeftModel], Factors] = lora_factors
    scaled: Scaled = rescale_adapter_scale


def adapt_lora(
    model: PreTrainedModel, bases: Sequence[GroupBasis], config: FoLoraConfig
) -> tuple[PeftModel, SAdam]:
    """The LoRA adapter and the optimizer of a config."""
    peft_model = attach_configured(model, bases, config)
    options = group_options(config) | {"directions": config.directions or "all"}
    return peft_model, optimizer(peft_model, bases, **options, **adam_options(config.training))


LORA = AdapterKind(adapt_lora)


@dataclass(frozen=True)
class Prepared:
    """All that a training loop needs.

    Attributes:
        model: A PEFT model; its logits equal the base model's until the first step.
        optimizer: From `optimizer`: A is updated in the basis, B by AdamW.
        bases: The spectrum of every shared input.
        task: The tokenized rows: ``task.train`` and ``task.held_out``.
        samples: The calibration set: ``samples.calibration`` and ``samples.held_out``.
        meter: Measures task loss and KL to the base.
        config: The options that it was prepared with.
        replay: Texts of which `train_dataset` mixes in the share `method.replay`.
        more: Generates further held-out text, for a budget that binds; None: there is no more.
        kind: Of the adapter.
    """

    model: PeftModel
    optimizer: SAdam
    bases: Sequence[GroupBasis]
    task: TaskData
    samples: CalibrationSet
    meter: Meter
    config: FoLoraConfig
    replay: Sequence[list[int]] = ()
    more: More | None = None
    kind: AdapterKind = LORA

    def __repr__(self) -> str:
        parts = f"{self.task}, {self.samples}, {len(self.bases)} inputs"
        return f"Prepared({type(self.model.get_base_model()).__name__}, {parts})"

    def param_groups(self, **changes: Any) -> list[dict[str, Any]]:
        """Parameter groups for `SAdam`; `changes` override arguments of `param_groups`, such as ``lr=1e-3``."""
        return param_groups(self.model, self.bases, **(group_options(self.config) | changes))

    def train_dataset(self) -> Dataset:
        """Training rows with ``input_ids`` and ``labels``, as TRL and Transformers expect.

        ``method.replay`` is the fraction of them that are texts, repeated if they are few.
        """
        share = self.config.method.replay
        texts = text_examples(self.replay)
        replayed = round(share / (1 - share) * len(self.task.train))
        return to_dataset([*self.task.train, *islice(cycle(texts), replayed)])

    def anchor(self, steps: int | None = None, batch_size: int | None = None) -> Anchor | None:
        """The anchor that the config asks for; None if it asks for none.

        Args:
            steps: Backward passes of the training, if known.
            batch_size: Rows in one of them. Default is ``training.per_device_train_batch_size``.
        """
        config = self.config
        share, training = config.anchor_share, config.training
        if not share:
            return None
        rows = batch_size or training.per_device_train_batch_size
        length = sum(len(e.input_ids) for e in self.task.train) / len(self.task.train)
        if (training.model_extra or {}).get("packing"):
            length = (training.model_extra or {})["max_length"]
        return Anchor(
            self.model,
            self.samples.calibration,
            tokens=max(1, round(share / (1 - share) * rows * length)),
            weight=BudgetWeight(config.budget) if config.budget else config.method.kl_weight,
            seed=config.training_seed,
            uses=steps,
        )

    def budget_fits(self, factors: Sequence[float] = (1.0, 0.5, 2.0)) -> list[BudgetFit]:
        """The scale of the adapter at which its held-out KL is within ``config.budget``; nothing is changed.

        Returns:
            A fit with its task loss for each of `factors` times the budget; empty without a budget.
        """
        if (budget := self.config.budget) is None:
            return []
        texts, size = self.samples.by_source(), self.meter.batch_size
        kl = kl_for_budget(self.model, texts, budget, self.more, size, self.kind.scaled)
        found = []
        for factor in factors:
            fit = largest_scale(kl, factor * budget)
            with self.kind.scaled(self.model, fit.scale):
                found.append(replace(fit, task_loss=self.meter.task_loss(self.model)))
        return found

    def export(self, path: str | Path, rank: int | None = None) -> ExportReport:
        """Write an ordinary LoRA adapter, within the budget if there is one; see `export_adapter`.

        With a budget, `rank` is refused by a ConfigError. Warns if the adapter was trained by an optimizer other than the prepared one.
        """
        self.meter.check()
        if (budget := self.config.budget) is not None:
            if rank is not None:
                raise ConfigError(
                    f"the budget is kept by the exact adapter, not by one truncated to rank {rank}: export it "
                    "by folora.export_adapter(prepared.model, folder, rank=...), then scale that by folora export --adapter"
                )
            texts, size = self.samples.by_source(), self.meter.batch_size
            fit_budget(self.model, texts, budget, size, self.more)
        return export_adapter(self.model, path, rank=rank)


def assemble(
    model: PreTrainedModel,
    bases: Sequence[GroupBasis],
    task: TaskData,
    samples: CalibrationSet,
    config: FoLoraConfig,
    replay: Sequence[list[int]] | None = None,
    more: More | None = None,
    kind: AdapterKind = LORA,
) -> Prepared:
    """Adapter, optimizer and meter from the results of the first three stages.

    `replay` are texts for ``method.replay``; by default the samples. `more` and `kind` are those of `Prepared`.
    """
    if config.budget is not None:
        check_sequences(samples.held_out)
    peft_model, made = kind.adapt(model, bases, config)
    check = partial(warn_if_not_stepped, made, peft_model, bases)
    meter = Meter(samples.by_source(), task.held_out, config.statistics.batch_size, check)
    texts = samples.calibration if replay is None else replay
    return Prepared(peft_model, made, bases, task, samples, meter, config, texts, more, kind)


def attach_configured(
    model: PreTrainedModel, bases: Sequence[GroupBasis], config: FoLoraConfig
) -> PeftModel:
    """`attach` with the adapter section of a config."""
    adapter = config.adapter
    alpha: Any = adapter.r if adapter.alpha is None else adapter.alpha
    peft_model = attach(
        model,
        bases,
        LoraConfig(r=adapter.r, lora_alpha=alpha, task_type="CAUSAL_LM"),
        init=config.method.init,
        protect=config.protected,
        seed=config.training_seed,
    )
    if config.method.freeze_a:
        for b in bases:
            for name in b.group.layers:
                layer: Any = peft_model.get_base_model().get_submodule(name)
                layer.lora_A.requires_grad_(False)
    return peft_model


def to_dataset(examples: Sequence[Example]) -> Dataset:
    """Tokenized examples as a `datasets.Dataset` of ``input_ids`` and ``labels``."""
    return Dataset.from_dict(
        {"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]}
    )


def group_options(config: FoLoraConfig) -> dict[str, Any]:
    """The keyword arguments of `optimizer` and `param_groups` for a config."""
    spectrum, training = config.spectrum, config.training
    return {
        "lr": training.learning_rate,
        "weight_decay": training.weight_decay,
        "lam": spectrum.lam,
        "s_min": spectrum.s_min,
        "directions": config.directions,
        "step_scale": config.method.step_scale,
        "spectral": config.method.optimizer == "sadam",
    }
