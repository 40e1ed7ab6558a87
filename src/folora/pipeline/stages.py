"""The stages from a model and a data set to a trained adapter.

Samples and C_pre belong to the base model, C_task to the data set; the spectrum is solved from both, and
training runs in it. With ``config.base`` the first two are read from a base file instead.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folora.adapters.initialization import NEED_NULL_BASIS, NEED_WHOLE_BASIS
from folora.calibration.base_file import BaseFile, read_base_file, read_base_manifest
from folora.calibration.calibration_set import KIND as CALIBRATION_SET
from folora.calibration.calibration_set import CalibrationSet
from folora.calibration.engine import Engine, with_batch_size
from folora.calibration.measuring import early_stopping, measure
from folora.calibration.sampling import LazyEngine, sample_sequences, sampling_facts
from folora.calibration.stopping import EarlyStopping
from folora.calibration.vllm import ENGINE
from folora.config import FoLoraConfig
from folora.data.rows import Example, TaskData, text_examples
from folora.errors import ArtifactError, MismatchError
from folora.pipeline.context import Context
from folora.pipeline.store import Folder, Made, Memory, Stage
from folora.runtime import distributed
from folora.runtime.progress import progress
from folora.runtime.storage import json_fingerprint
from folora.spectral.eigenproblem import BASES
from folora.spectral.groups import InputGroup
from folora.spectral.layers import KIND as SPECTRUM
from folora.spectral.layers import Spectrum, solve
from folora.spectral.moments import KIND as MOMENTS
from folora.spectral.moments import Moments

logger = logging.getLogger(__name__)

Store = Folder | Memory


class Samples(Stage[CalibrationSet]):
    """Text that the base model generates.

    Args:
        context: Of the run.
        stopping: Ends the sampling early.
        task: C_task, on which `stopping` depends.
        engine: Generates the text; default is the context's, made if something is left to sample.
    """

    path, kind, command = "1-samples/set", CALIBRATION_SET, "sample"

    def __init__(
        self,
        context: Context,
        stopping: EarlyStopping | None = None,
        task: Made[Moments] | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(context)
        self.stopping, self.task = stopping, task
        self.engine = engine or LazyEngine(context.engine)
        self.config = with_batch_size(context.config.sampling, context.model)

    def request(self) -> dict[str, Any]:
        """What each sequence depends on."""
        found = dict(self.context.facts)
        if self.config.sampler_model:
            found["sampler_model"] = self.config.sampler_model
        if self.config.server:
            found["engine"] = ENGINE  # whose draws are others; where it runs changes nothing
        context = self.context
        seed = context.config.seed
        return found | sampling_facts(context.start_id, context.eos_ids, self.config, seed)

    def facts(self) -> dict[str, Any]:
        """The same, and how many sequences there are."""
        decision = None
        if self.stopping is not None and self.task is not None:
            decision = {**self.stopping.facts, "task": self.task.manifest["sha256"]}
        asked = [self.config.num_sequences, self.config.num_held_out, decision]
        return {**self.request(), "asked": asked}

    def compute(self, folder: Path | None) -> CalibrationSet:
        """Sample; batches that are in the folder already are not sampled again."""
        context = self.context
        return sample_sequences(
            self.engine,
            context.start_id,
            context.eos_ids,
            self.config,
            folder,
            self.stopping,
        )

    def save(self, value: CalibrationSet, path: Path, facts: Mapping[str, Any]) -> None:
        """Write the set."""
        value.save(path, facts)

    @classmethod
    def load(cls, context: Context, path: Path, expected: Mapping[str, Any]) -> CalibrationSet:
        """Read the set; the model must know each of its tokens."""
        return _known(CalibrationSet.load(path, expected), context)


class BaseSamples(Stage[CalibrationSet]):
    """The samples of a base file, instead of sampling."""

    path, kind, command = Samples.path, Samples.kind, Samples.command
    load = Samples.load

    def facts(self) -> dict[str, Any]:
        """Of the model and of the text."""
        manifest = read_base_manifest(_base_path(self.context), self.context.facts)
        return {**self.context.facts, "fingerprint": manifest["samples"]}

    def compute(self, folder: Path | None) -> CalibrationSet:
        """Read the file."""
        return _known(_base_file(self.context).samples, self.context)

    def save(self, value: CalibrationSet, path: Path, facts: Mapping[str, Any]) -> None:
        """Write the set."""
        value.save(path, facts)


class _Measured(Stage[Moments]):
    """Second moments of the inputs of the adapted layers."""

    kind, command = MOMENTS, "measure"

    def facts(self) -> dict[str, Any]:
        """Of the model and of the layers."""
        groups = json_fingerprint([[group.layers, group.d_in] for group in self.context.groups])
        return {**self.context.facts, "layers": groups}

    def save(self, value: Moments, path: Path, facts: Mapping[str, Any]) -> None:
        """Write the matrices."""
        value.save(path, facts)

    @classmethod
    def load(cls, context: Context, path: Path, expected: Mapping[str, Any]) -> Moments:
        """Read the matrices; they must be of the layers to adapt."""
        found = Moments.load(path, expected)
        _check_layers(context, found.groups, path, cls.command)
        return found

    def _measure(self, examples: list[Example], what: str) -> Moments:
        first = distributed.rank() == 0  # which writes them
        context = self.context
        return measure(
            context.model, context.groups, examples, context.config.statistics, what, kept=first
        )


class TaskMoments(_Measured):
    """C_task: moments on rows of the task."""

    path = "2-statistics/task"

    @property
    def rows(self) -> list[Example]:
        """The first ``statistics.task_examples`` rows."""
        return self.context.task.train[: self.context.config.statistics.task_examples]

    def facts(self) -> dict[str, Any]:
        """Of the model, of the layers and of the rows."""
        return {**super().facts(), "data": TaskData(self.rows, []).fingerprint}

    def compute(self, folder: Path | None) -> Moments:
        """Measure."""
        return self._measure(self.rows, "C_task")


class KeepMoments(_Measured):
    """C_pre: moments on what the model must keep.

    Args:
        context: Of the run.
        samples: The calibration set.
        stopping: What ended the sampling early; it may have measured C_pre.
    """

    path = "2-statistics/pre"

    def __init__(
        self,
        context: Context,
        samples: Made[CalibrationSet],
        stopping: EarlyStopping | None = None,
    ) -> None:
        super().__init__(context)
        self.samples, self.stopping = samples, stopping

    def facts(self) -> dict[str, Any]:
        """Of the model, of the layers and of the text, or of the base file."""
        path = self.context.config.base
        base = None if path is None else read_base_manifest(Path(path))["sha256"]
        text = self.samples.manifest["fingerprint"]
        return {**super().facts(), "samples": text, "base": base}

    def compute(self, folder: Path | None) -> Moments:
        """Read the base file, take what early stopping has measured, or measure."""
        if self.context.config.base is not None:
            return _base_file(self.context).moments(self.context.groups)
        sequences = self.samples.load().calibration
        found = self.stopping.moments_of(sequences) if self.stopping else None
        if found is None:
            return self._measure(text_examples(sequences), "C_pre")
        logger.info("C_pre: measured by the last check of early stopping")
        return found


class Solved(Stage[Spectrum]):
    """The eigenbasis of every shared input.

    Args:
        context: Of the run.
        keep: C_pre.
        task: C_task.
    """

    path, kind, command = "3-spectrum", SPECTRUM, "solve"

    def __init__(self, context: Context, keep: Made[Moments], task: Made[Moments]) -> None:
        super().__init__(context)
        self.keep, self.task = keep, task

    def facts(self) -> dict[str, Any]:
        """Of the model, of both moments and of the options."""
        moments = [self.keep.manifest["sha256"], self.task.manifest["sha256"]]
        options = solve_options(self.context.config)
        return {**self.context.facts, "statistics": moments, **options}

    def compute(self, folder: Path | None) -> Spectrum:
        """Solve."""
        options = solve_options(self.context.config)
        return solve_all(self.context, self.keep.load(), self.task.load(), **options)

    def save(self, value: Spectrum, path: Path, facts: Mapping[str, Any]) -> None:
        """Write the bases."""
        value.save(path, facts)

    @classmethod
    def load(cls, context: Context, path: Path, expected: Mapping[str, Any]) -> Spectrum:
        """Read the bases; they must be of the layers to adapt."""
        found = Spectrum.load(path, expected)
        _check_layers(context, found.groups, path, cls.command)
        return found


@dataclass(frozen=True)
class Shared:
    """What belongs to a model and a data set, whatever the method: the first stages."""

    samples: Made[CalibrationSet]
    keep: Made[Moments]
    task: Made[Moments]


def sample(
    context: Context,
    store: Store,
    task: Made[Moments] | None = None,
    engine: Engine | None = None,
) -> tuple[Made[CalibrationSet], EarlyStopping | None]:
    """The calibration set, and what ended its sampling early.

    Args:
        context: Of the run.
        store: Where the results go.
        task: C_task if it is there; otherwise it is made if early stopping needs it.
        engine: Generates the text; default is the context's.
    """
    if context.config.base is not None:
        return store.make(BaseSamples(context)), None
    stopping = None
    if context.ends_early:
        task = task or store.make(TaskMoments(context))
        c_task = task.load().matrices
        stopping = early_stopping(context.model, context.groups, c_task, context.config)
    return store.make(Samples(context, stopping, task, engine)), stopping


def sample_and_measure(
    context: Context,
    store: Store,
    task: Made[Moments] | None = None,
    engine: Engine | None = None,
) -> tuple[Made[CalibrationSet], Made[Moments]]:
    """The calibration set and C_pre, which belong to the base model; arguments as for `sample`."""
    samples, stopping = sample(context, store, task, engine)
    return samples, store.make(KeepMoments(context, samples, stopping))


def share(context: Context, store: Store, engine: Engine | None = None) -> Shared:
    """The first stages: calibration set, C_pre and C_task; arguments as for `sample`."""
    task = store.make(TaskMoments(context))
    samples, keep = sample_and_measure(context, store, task, engine)
    return Shared(samples, keep, task)


def solve_options(config: FoLoraConfig) -> dict[str, Any]:
    """The arguments of `solve_all` that a config stands for."""
    init = config.method.init
    return {
        "tau": config.spectrum.tau,
        "basis": config.method.basis,
        "null_rank": config.adapter.r if init in NEED_NULL_BASIS else 0,
        "directions": None if init in NEED_WHOLE_BASIS else config.directions,
    }


def solve_all(
    context: Context,
    keep: Moments,
    task: Moments,
    *,
    tau: float,
    basis: str,
    null_rank: int,
    directions: int | None,
) -> Spectrum:
    """`solve` on the model's device, with progress.

    Args:
        context: Of the run.
        keep: C_pre.
        task: C_task.
        tau: Relative ridge.
        basis: Which basis; one of `eigenproblem.BASES`.
        null_rank: Number of eigenvectors of C_pre with the smallest eigenvalues.
        directions: Number of leading columns of each basis; None for all.
    """
    with progress("solving", len(keep.groups)) as tick:
        return solve(
            keep, task, tau=tau, null_rank=null_rank, directions=directions,
            eigenbasis=BASES[basis], device=context.model.device, on_group=tick,
        )  # fmt: skip


def _known(samples: CalibrationSet, context: Context) -> CalibrationSet:
    """The set, if the model knows each of its tokens. Raises ArtifactError."""
    known = context.limits["vocabulary"]
    rows = [*samples.calibration, *samples.held_out]
    if known is not None and (token := max(map(max, rows))) >= known:
        raise ArtifactError(f"the samples hold token {token}, but the model knows {known}")
    return samples


def _base_path(context: Context) -> Path:
    assert context.config.base is not None
    return Path(context.config.base)


def _base_file(context: Context) -> BaseFile:
    return read_base_file(_base_path(context), context.facts)


def _check_layers(
    context: Context, groups: tuple[InputGroup, ...], path: Path, command: str
) -> None:
    if groups != tuple(context.groups):
        raise MismatchError(
            f"{path} is of other layers than adapter.target_modules "
            f"{context.config.adapter.target_modules!r}; make it again: folora {command}"
        )
