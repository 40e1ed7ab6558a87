"""The stages before training: samples, C_pre, C_task and the spectrum.

Samples and C_pre depend on the base model only, C_task also on the dataset; the spectrum is solved from both
moments. With ``config.base``, samples and C_pre are read from a base file instead.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from folora.adapters.initialization import NEED_NULL_BASIS, NEED_WHOLE_BASIS
from folora.calibration.base_file import BaseFile, read_base_file, read_base_manifest
from folora.calibration.calibration_set import CalibrationSet
from folora.calibration.engine import Engine, with_batch_size
from folora.calibration.moments import measure
from folora.calibration.sampling import lazy_engine, sample_sequences, sampling_facts
from folora.calibration.stopping import EarlyStopping, early_stopping
from folora.calibration.vllm import ENGINE
from folora.config import FoLoraConfig
from folora.data.contents import Example
from folora.data.rows import TaskData, text_examples
from folora.errors import ArtifactError, MismatchError
from folora.pipeline.context import Context
from folora.pipeline.store import Folder, Memory, Stage, StageResult
from folora.runtime import distributed
from folora.runtime.progress import progress
from folora.runtime.storage import json_fingerprint
from folora.spectral.eigenproblem import BASES
from folora.spectral.layers import Spectrum, solve
from folora.spectral.moments import Moments

logger = logging.getLogger(__name__)

Store = Folder | Memory
OfLayers = TypeVar("OfLayers", Moments, Spectrum)


class _CalibrationSetStage(Stage[CalibrationSet]):
    path, command, result = "1-samples/set", "sample", CalibrationSet
    identity = "fingerprint"

    @classmethod
    def inputs(cls, facts: Mapping[str, Any]) -> dict[type[Stage[Any]], str]:
        """C_task if early stopping depends on it; a base file is not in the folder."""
        _, _, decision = facts.get("asked") or (0, 0, None)
        return {TaskMoments: decision["task"]} if decision else {}

    @classmethod
    def check_result(cls, value: CalibrationSet, context: Context, path: Path) -> None:
        """Refuse tokens that are not in the model's vocabulary. Raises ArtifactError."""
        known = context.limits["vocabulary"]
        rows = [*value.calibration, *value.held_out]
        if known is not None and (token := max(map(max, rows))) >= known:
            raise ArtifactError(
                f"{path} contains token {token}, but the model's vocabulary has {known} tokens; sample again"
            )


class Samples(_CalibrationSetStage):
    """Self-samples: text that the base model generates.

    Early stopping depends on C_task, `task`. The default engine is the context's, created if needed.
    """

    def __init__(
        self,
        context: Context,
        stopping: EarlyStopping | None = None,
        task: StageResult[Moments] | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(context)
        self.stopping, self.task = stopping, task
        self.engine = engine or lazy_engine(context.engine)
        given = context.mixture.given
        self.config = with_batch_size(context.config.sampling, context.model, given)

    def request(self) -> dict[str, Any]:
        """Fingerprints of what each sequence depends on."""
        found = dict(self.context.facts)
        if self.config.sampler_model:
            found["sampler_model"] = self.config.sampler_model
        if self.config.server:
            found["engine"] = ENGINE  # its random numbers differ; its address does not matter
        context = self.context
        seed = context.config.seed
        return found | sampling_facts(context.mixture, context.eos_ids, self.config, seed)

    def facts(self) -> dict[str, Any]:
        """The same, with the number of sequences and early stopping."""
        decision = None
        if self.stopping is not None and self.task is not None:
            decision = {**self.stopping.facts, "task": self.task.manifest["sha256"]}
        asked = [self.config.num_sequences, self.config.num_held_out, decision]
        return {**self.request(), "asked": asked}

    def compute(self, folder: Path | None) -> CalibrationSet:
        """Sample; batches already in the folder are reused."""
        context = self.context
        mixture, eos_ids = context.mixture, context.eos_ids
        return sample_sequences(self.engine, mixture, eos_ids, self.config, folder, self.stopping)


class BaseSamples(_CalibrationSetStage):
    """Self-samples read from a base file."""

    def __init__(self, context: Context, base: StageResult[BaseFile]) -> None:
        super().__init__(context)
        self.base = base

    def facts(self) -> dict[str, Any]:
        """Fingerprints of the model and of the text."""
        return {**self.context.facts, "fingerprint": self.base.manifest["samples"]}

    def compute(self, folder: Path | None) -> CalibrationSet:
        """Read the file."""
        base = self.base.load()
        self.check_result(base.samples, self.context, base.path)
        return base.samples


class _LayersStage(Stage[OfLayers]):
    @classmethod
    def check_result(cls, value: OfLayers, context: Context, path: Path) -> None:
        """Refuse a result of other layers than those to adapt. Raises MismatchError."""
        if value.groups != tuple(context.groups):
            raise MismatchError(
                f"{path} was made for other layers than adapter.target_modules "
                f"{context.config.adapter.target_modules!r} selects; rerun folora {cls.command}"
            )


class _Measured(_LayersStage[Moments]):
    command, result = "measure", Moments

    def facts(self) -> dict[str, Any]:
        """Fingerprints of the model and of the layers."""
        groups = json_fingerprint([[group.layers, group.d_in] for group in self.context.groups])
        return {**self.context.facts, "layers": groups}

    def _measure(self, examples: list[Example], what: str, folder: Path | None) -> Moments:
        context = self.context
        store = folder is None or distributed.rank() == 0
        return measure(
            context.model, context.groups, examples, context.config.statistics, what, store=store
        )


class TaskMoments(_Measured):
    """C_task: second moments on task rows."""

    path = "2-statistics/task"

    @property
    def rows(self) -> list[Example]:
        """The first ``statistics.task_examples`` rows."""
        return self.context.task.train[: self.context.config.statistics.task_examples]

    def facts(self) -> dict[str, Any]:
        """Fingerprints of the model, the layers and the rows."""
        return {**super().facts(), "data": TaskData(self.rows, []).fingerprint}

    def compute(self, folder: Path | None) -> Moments:
        """Measure."""
        return self._measure(self.rows, "C_task", folder)


class KeepMoments(_Measured):
    """C_pre: second moments on the calibration set.

    A base file (`base`) holds them, and the last check of early stopping (`stopping`) may have measured them.
    """

    path = "2-statistics/pre"

    def __init__(
        self,
        context: Context,
        samples: StageResult[CalibrationSet],
        stopping: EarlyStopping | None = None,
        base: StageResult[BaseFile] | None = None,
    ) -> None:
        super().__init__(context)
        self.samples, self.stopping, self.base = samples, stopping, base

    @classmethod
    def inputs(cls, facts: Mapping[str, Any]) -> dict[type[Stage[Any]], str]:
        """The calibration set."""
        return {Samples: facts["samples"]}

    def facts(self) -> dict[str, Any]:
        """Fingerprints of the model, the layers, the text and the base file, if any.

        Raises:
            MismatchError: The base file has other text.
        """
        base = self.base and self.base.manifest["sha256"]
        text = self.samples.manifest["fingerprint"]
        if self.base and self.base.manifest["samples"] != text:
            raise MismatchError(
                f"{Samples.path} is not the text of {self.context.config.base}; run folora sample first"
            )
        return {**super().facts(), "samples": text, "base": base}

    def compute(self, folder: Path | None) -> Moments:
        """Read the base file, reuse the matrices of early stopping, or measure."""
        if self.base is not None:
            return self.base.load().moments(self.context.groups)
        sequences = self.samples.load().calibration
        found = self.stopping.moments_of(sequences) if self.stopping else None
        if found is None:
            return self._measure(text_examples(sequences), "C_pre", folder)
        logger.info("C_pre: measured by the last check of early stopping")
        return found


class Solved(_LayersStage[Spectrum]):
    """The eigenbasis of every shared input, from C_pre (`keep`) and C_task (`task`)."""

    path, command, result = "3-spectrum", "solve", Spectrum

    def __init__(
        self, context: Context, keep: StageResult[Moments], task: StageResult[Moments]
    ) -> None:
        super().__init__(context)
        self.keep, self.task = keep, task

    @classmethod
    def inputs(cls, facts: Mapping[str, Any]) -> dict[type[Stage[Any]], str]:
        """Both moments."""
        return dict(zip((KeepMoments, TaskMoments), facts["statistics"], strict=True))

    def facts(self) -> dict[str, Any]:
        """Fingerprints of the model and of both moments, and the options."""
        moments = [self.keep.manifest["sha256"], self.task.manifest["sha256"]]
        options = solve_options(self.context.config)
        return {**self.context.facts, "statistics": moments, **options}

    def compute(self, folder: Path | None) -> Spectrum:
        """Solve, and warn if the eigenvectors are no good choice."""
        config, task = self.context.config, self.task.load()
        found = solve_all(self.context, self.keep.load(), task, **solve_options(config))
        if config.method.init == "eigen":
            _check_directions(found.concentration(task, config.adapter.r), config.adapter.r)
        return found


@dataclass(frozen=True)
class Shared:
    """Results of the first stages, which all methods share."""

    samples: StageResult[CalibrationSet]
    keep: StageResult[Moments]
    task: StageResult[Moments]


def sample(
    context: Context,
    store: Store,
    task: StageResult[Moments] | None = None,
    engine: Engine | None = None,
) -> tuple[StageResult[CalibrationSet], KeepMoments]:
    """The calibration set, and the stage that makes C_pre from it; see `Samples`.

    Without `task`, C_task is measured if early stopping needs it.
    """
    if base := base_file(context):
        samples = store.make(BaseSamples(context, base))
        return samples, KeepMoments(context, samples, base=base)
    stopping = None
    if context.ends_early:
        task = task or store.make(TaskMoments(context))
        c_task = task.load().matrices
        stopping = early_stopping(context.model, context.groups, c_task, context.config)
    samples = store.make(Samples(context, stopping, task, engine))
    return samples, KeepMoments(context, samples, stopping)


def base_file(context: Context) -> StageResult[BaseFile] | None:
    """The base file that the config names, if any; its contents are read once, when first needed."""
    if context.config.base is None:
        return None
    path, facts = Path(context.config.base), context.facts
    return StageResult(cache(lambda: read_base_file(path, facts)), read_base_manifest(path, facts))


def share(context: Context, store: Store, engine: Engine | None = None) -> Shared:
    """The first stages: calibration set, C_pre and C_task."""
    task = store.make(TaskMoments(context))
    samples, keep = sample(context, store, task, engine)
    return Shared(samples, store.make(keep), task)


def solve_options(config: FoLoraConfig) -> dict[str, Any]:
    """The arguments of `solve_all` for a config."""
    init = config.method.init
    return {
        "tau": config.spectrum.tau,
        "basis": config.method.basis,
        "null_rank": config.adapter.r if init in NEED_NULL_BASIS else 0,
        "directions": None if init in NEED_WHOLE_BASIS else config.directions,
    }


def _check_directions(concentration: float, r: int) -> None:
    logger.info(
        "the %d leading eigenvectors hold %.2f times as much of the task's energy, trace(C_task), as %d random directions",
        r, concentration, r,
    )  # fmt: skip
    if concentration < 1:
        logger.warning(
            "the task has no directions of its own: the leading eigenvectors hold %.2f times as much of its energy as "
            "random ones. On small models where that was so, A frozen in the null space of text kept more of the base, with "
            "an anchor and 16 times the learning rate: --method null-frozen --method.kl_weight 10 --lr 1.6e-2 (docs/results.md)",
            concentration,
        )


def solve_all(
    context: Context, keep: Moments, task: Moments, *, basis: str, **options: Any
) -> Spectrum:
    """`solve` on the model's device, with a progress bar; see `solve_options`."""
    with progress("solving", len(keep.groups)) as tick:
        options |= {"eigenbasis": BASES[basis], "device": context.model.device, "on_group": tick}
        return solve(keep, task, **options)
