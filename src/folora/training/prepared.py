"""What a training needs, put together: the PEFT model, its optimizer, rows and meter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from folora.adapters.adapter import attach
from folora.adapters.constraint import keep_off
from folora.adapters.export import ExportReport, export_adapter
from folora.calibration.calibration_set import ProxySet
from folora.config import FoLoraConfig
from folora.data.rows import Example, TaskData, text_examples
from folora.metrics.meter import Meter, warn_if_not_stepped
from folora.optim.fused import FusedSAdam
from folora.optim.sadam import SAdam
from folora.spectral.eigenproblem import spectral_gate, step_scale
from folora.spectral.layers import GroupBasis
from folora.training.hyperparameters import adam_options


@dataclass(frozen=True)
class Prepared:
    """A model ready to be trained without forgetting.

    Attributes:
        model: A PEFT model; its logits are the base model's until the first step.
        optimizer: `SAdam` over A (in the basis) and B (plain AdamW).
        bases: The solved spectrum of every shared input.
        task: The tokenized rows: ``task.train`` and ``task.held_out``.
        samples: What the base model wrote: ``samples.calibration`` and ``samples.held_out``.
        meter: Reads what is learned and kept.
        config: What it was prepared with.
    """

    model: PeftModel
    optimizer: SAdam
    bases: list[GroupBasis]
    task: TaskData
    samples: ProxySet
    meter: Meter
    config: FoLoraConfig

    def param_groups(self, **changes: Any) -> list[dict[str, Any]]:
        """Groups for `SAdam`; `changes` as in `param_groups`, for example ``lr=1e-3``."""
        return param_groups(self.model, self.bases, **(group_options(self.config) | changes))

    def train_dataset(self) -> Dataset:
        """Rows to train on, ``input_ids`` and ``labels``, as TRL and Transformers take them.

        With ``training.replay`` that share of them are self-samples, taken in turn.
        """
        share = self.config.training.replay
        texts = text_examples(self.samples.calibration)
        replayed = round(share / (1 - share) * len(self.task.train))
        return to_dataset([*self.task.train, *islice(cycle(texts), replayed)])

    def export(self, path: str | Path, rank: int | None = None) -> ExportReport:
        """Write an ordinary LoRA adapter; see `export_adapter`.

        Warns of an adapter that another optimizer than `SAdam` has trained.
        """
        self.meter.check()
        return export_adapter(self.model, path, rank=rank)


def assemble(
    model: PreTrainedModel,
    bases: list[GroupBasis],
    task: TaskData,
    samples: ProxySet,
    config: FoLoraConfig,
) -> Prepared:
    """Adapter, optimizer and meter from what the first three stages found."""
    peft_model = attach_configured(model, bases, config)
    groups = param_groups(peft_model, bases, **group_options(config))
    optimizer = FusedSAdam(groups, **adam_options(config.training))
    keep_off(optimizer, peft_model)
    check = partial(warn_if_not_stepped, optimizer, peft_model, bases)
    meter = Meter(samples.held_out, task.held_out, config.statistics.batch_size, check)
    return Prepared(peft_model, optimizer, bases, task, samples, meter, config)


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
        init=adapter.init,
        protect=adapter.protected,
        seed=config.training.seed,
    )
    if adapter.freeze_a:
        for b in bases:
            for name in b.group.layers:
                layer: Any = peft_model.get_base_model().get_submodule(name)
                layer.lora_A.requires_grad_(False)
    return peft_model


def param_groups(
    model: PeftModel,
    bases: Iterable[GroupBasis],
    *,
    lr: float,
    lr_b_ratio: float = 1.0,
    weight_decay: float = 0.0,
    lam: float = 1.0,
    s_min: float = 0.3,
    directions: int | None = None,
    step_scale: str = "task",
    spectral: bool = True,
    adapter_name: str = "default",
) -> list[dict[str, Any]]:
    """Parameter groups for `SAdam`: one a shared input for A, one for all B.

    Args:
        model: From `attach`.
        bases: From `solve`.
        lr: Learning rate of A.
        lr_b_ratio: Learning rate of B over that of A.
        weight_decay: For both.
        lam: Gate's lambda.
        s_min: Gate's floor.
        directions: Number of leading directions that A moves along; None for all.
        step_scale: ``"task"`` or ``"paper"``.
        spectral: False leaves bases out, which makes it plain AdamW on LoRA.
        adapter_name: Which adapter.
    """
    base = model.get_base_model()
    groups: list[dict[str, Any]] = []
    b_params = []
    for b in bases:
        layers = [base.get_submodule(name) for name in b.group.layers]
        assert all(isinstance(layer, LoraLayer) for layer in layers)
        a_params = [layer.lora_A[adapter_name].weight for layer in layers]  # type: ignore[union-attr,index]
        b_params += [layer.lora_B[adapter_name].weight for layer in layers]  # type: ignore[union-attr,index]
        if not a_params[0].requires_grad:
            continue
        group: dict[str, Any] = {"params": a_params, "lr": lr, "weight_decay": weight_decay}
        if spectral:
            group |= gated_basis(b, lam, s_min, directions, step_scale)
        groups.append(group)
    groups.append({"params": b_params, "lr": lr * lr_b_ratio, "weight_decay": weight_decay})
    return groups


def gated_basis(
    b: GroupBasis, lam: float, s_min: float, directions: int | None, step_scaling: str
) -> dict[str, Any]:
    """What a group of `SAdam` holds of a basis: its leading columns, their gate and the scale.

    Args:
        b: The solved basis.
        lam: Gate's lambda.
        s_min: Gate's floor.
        directions: Number of columns; None for all.
        step_scaling: ``"task"`` or ``"paper"``.
    """
    gamma = b.gamma[:directions]
    gate = spectral_gate(gamma, lam, s_min)
    scale = 1.0 if step_scaling == "paper" else step_scale(gamma, gate, b.task_trace)
    return {"basis": b.basis[:, :directions].contiguous(), "gate": gate, "scale": scale}


def to_dataset(examples: Sequence[Example]) -> Dataset:
    """Tokenized examples as a `datasets.Dataset` of ``input_ids`` and ``labels``."""
    return Dataset.from_dict(
        {"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]}
    )


def group_options(config: FoLoraConfig) -> dict[str, Any]:
    """The keyword arguments of `param_groups` that a config stands for."""
    spectrum, training = config.spectrum, config.training
    return {
        "lr": training.learning_rate,
        "lr_b_ratio": training.lr_b_ratio,
        "weight_decay": training.weight_decay,
        "lam": spectrum.lam,
        "s_min": spectrum.s_min,
        "directions": config.directions,
        "step_scale": spectrum.step_scale,
        "spectral": training.optimizer == "sadam",
    }
