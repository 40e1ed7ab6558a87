"""The training stage: trained factors and meter readings from a spectrum and rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from folora.adapters.adapter import Factors, lora_factors
from folora.calibration.calibration_set import CalibrationSet
from folora.config import FoLoraConfig
from folora.errors import NumericsError
from folora.metrics.budget import apply_scale
from folora.metrics.meter import Reading, total_norm
from folora.pipeline.context import Context
from folora.pipeline.further_text import further_text
from folora.pipeline.stages import Samples, Solved
from folora.pipeline.store import Stage, StageResult
from folora.runtime import distributed
from folora.runtime.artifacts import Saveable
from folora.runtime.checkpoints import check_checkpoints
from folora.runtime.contexts import without_adapter
from folora.runtime.storage import json_fingerprint
from folora.spectral.layers import Spectrum
from folora.training.prepared import Prepared, assemble
from folora.training.sft_options import effective

ADAPTER, MERGED, REPORT = "5-adapter", "merged", "report.json"
"""Exports and report of a training, in the folder of its run."""


@dataclass(frozen=True)
class Trained(Saveable):
    """The result of training.

    Attributes:
        factors: A, B and kappa of every adapted layer.
        facts: Meter readings and step counts, for the report.
    """

    factors: Factors
    facts: Mapping[str, Any]

    kind = "training"

    def to_artifact(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `Saveable`."""
        tensors = {f"{name}/A": a for name, (a, _, _) in self.factors.items()}
        tensors |= {f"{name}/B": b for name, (_, b, _) in self.factors.items()}
        scaling = {name: scaling for name, (_, _, scaling) in self.factors.items()}
        return tensors, {**self.facts, "scaling": scaling}

    @classmethod
    def from_artifact(cls, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> Trained:
        """See `Saveable`."""
        factors = {
            name: (tensors[f"{name}/A"], tensors[f"{name}/B"], float(scaling))
            for name, scaling in manifest["scaling"].items()
        }
        return cls(factors, manifest)


class Training(Stage[Trained]):
    """Training with SAdam, from the latest checkpoint if there is one.

    The meter uses the held-out part of the samples.
    """

    path, command, result = "4-training/result", "train", Trained
    exports = (ADAPTER, MERGED, REPORT)

    def __init__(
        self,
        context: Context,
        samples: StageResult[CalibrationSet],
        spectrum: StageResult[Spectrum],
    ) -> None:
        super().__init__(context)
        self.samples, self.spectrum = samples, spectrum

    @classmethod
    def inputs(cls, facts: Mapping[str, Any]) -> dict[type[Stage[Any]], str]:
        """The spectrum, and the calibration set with the held-out text."""
        return {Solved: facts["spectrum"], Samples: facts["held_out"]}

    def request(self) -> dict[str, Any]:
        """Checkpoints depend on the same as the result."""
        return self.facts()

    def facts(self) -> dict[str, Any]:
        """Fingerprints of the model, the spectrum, the rows and the options."""
        config = self.context.config
        training = config.training
        sections = (config.adapter, config.spectrum, config.method)
        options = [effective(config), *(section.model_dump() for section in sections)]
        found = {
            **self.context.facts,
            "spectrum": self.spectrum.manifest["sha256"],
            "data": self.context.task.fingerprint,
            "held_out": self.samples.manifest["fingerprint"],
            "options": json_fingerprint(options),
            "rows_a_step": distributed.world_size()
            * training.per_device_train_batch_size
            * training.gradient_accumulation_steps,
        }
        if config.anchor_share or config.budget:
            found["anchor"] = [config.budget, config.anchor_share]
        if distributed.asks_for_fsdp((training.model_extra or {}).get("fsdp")):
            found["checkpoints"] = "FSDP"  # another checkpoint format
        return found

    def check_folder(self, folder: Path, request: str) -> None:
        """Refuse checkpoints that folora did not write."""
        check_checkpoints(folder, request)

    def compute(self, folder: Path | None) -> Trained:
        """Train to the end, or resume."""
        from folora.training.train import train

        assert folder is not None
        context = self.context
        samples, spectrum = self.samples.load(), self.spectrum.load()
        more = further_text(context, samples)
        prepared = assemble(
            context.model, spectrum, context.task, samples, context.config, more=more
        )
        trainer = train(prepared, context.tokenizer, folder)
        steps = trainer.state.global_step
        check_finite_factors(lora_factors(prepared.model), steps, context.config)
        if fits := prepared.budget_fits():
            apply_scale(prepared.model, fits[0].scale)
        factors = lora_factors(prepared.model)
        reading, norms = trainer.read()
        if fits:  # on more text, if the budget binds
            kept = fits[0].kept
            reading = replace(reading, kl=kept.mean, kl_by_source=kept.by_source)
        with without_adapter(prepared.model):
            before = Reading(0.0, 0.0, prepared.meter.task_loss(prepared.model))
        facts = {
            "fan_in_fan_out": _all_conv1d(prepared, factors),
            "steps": steps,
            "base": _without_nan(asdict(before)),
            "adapted": _without_nan(asdict(reading)),
            "total_norm": asdict(total_norm(norms)),
            "norms": {name: asdict(norm) for name, norm in norms.items()},
        }
        if trainer.ended_early:
            facts["ended_early"] = trainer.ended_early
        if fits:
            facts["budget"] = _without_nan([asdict(fit) for fit in fits])
        return Trained(factors, facts)


def check_finite_factors(factors: Factors, steps: int, config: FoLoraConfig) -> None:
    """Raise NumericsError, naming the layer, if training diverged."""
    for name, (a, b, _) in factors.items():
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise NumericsError(
                f"training diverged: after {steps} steps the adapter of {name} holds NaN or Inf. "
                f"Lower training.learning_rate (now {config.training.learning_rate:g})."
            )


def _all_conv1d(prepared: Prepared, factors: Mapping[str, Any]) -> bool:
    base: Any = prepared.model.get_base_model()
    return all(isinstance(base.get_submodule(n).get_base_layer(), Conv1D) for n in factors)


def _without_nan(value: Any) -> Any:
    """Replace NaN and Inf by None, since JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
