"""`Run`: the stages with a folder as their store, export and report.

The folder::

    config.yaml      the options
    folora.json      list of the files in this folder that folora wrote
    1-samples/       self-samples: shards, and the finished calibration set
    2-statistics/    pre/ (C_pre) depends on the base model, task/ (C_task) also on the dataset
    3-spectrum/      the eigenbasis of every shared input
    4-training/      checkpoints, and result/ with the trained factors
    5-adapter/       the result: an ordinary PEFT adapter
    report.json      task loss, KL to the base, norms of the update
    compare/         results of `folora compare`

A stage is skipped if its result was made from the same inputs, resumed if it was interrupted, and rerun if
its inputs have changed; the outdated result is moved to ``old/``.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from peft import LoraConfig

from folora.adapters.export import ExportReport, write_adapter, write_merged
from folora.calibration.base_file import (
    CONTENTS,
    base_contents,
    check_base_target,
    write_base_file,
)
from folora.calibration.calibration_set import CalibrationSet
from folora.config import FoLoraConfig
from folora.errors import ConfigError, FoLoraError, MismatchError
from folora.metrics.summary import budget_verdict
from folora.pipeline import stages
from folora.pipeline.checks import (
    STAGES,
    check_command,
    check_is_no_model,
    check_options,
    check_unchanged,
)
from folora.pipeline.context import Context
from folora.pipeline.further_text import further_text
from folora.pipeline.scaled_export import fit_adapter
from folora.pipeline.stages import KeepMoments, Samples, Shared, Solved, TaskMoments, base_file
from folora.pipeline.store import OLD, REQUEST, Folder
from folora.pipeline.training import ADAPTER, MERGED, REPORT, Trained, Training
from folora.runtime import distributed
from folora.runtime.checkpoints import check_checkpoints
from folora.runtime.fingerprints import config_fingerprint, weights_fingerprint
from folora.runtime.loading import load_model, required
from folora.runtime.ownership import check_own, check_owned_folder, write_own
from folora.runtime.storage import check_lock, check_writable, exclusive, obstacle

logger = logging.getLogger(__name__)

CONFIG, BASE, COMPARISON = "config.yaml", "base.safetensors", "compare"
KIND = "run"
"""Kind of folder in its list of files; see `ownership`."""

ExportKind = Literal["adapter", "merged"]


class Run:
    """A run folder and the stages that fill it.

    Args:
        config: Must have ``model`` and ``output``; from `measure` on also ``dataset``.

    Raises:
        FoLoraError: From every method, with what failed and the remedy.
    """

    def __init__(self, config: FoLoraConfig) -> None:
        self.config = config
        self.context = Context(config)
        self.name = self.context.name
        self.folder = Path(required(config.output, "output"))
        if os.path.isfile(self.folder):  # Path.is_file raises if the name is too long
            raise ConfigError(f"output {self.folder} is a file, but must be a folder")
        self.store = Folder(self.folder)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock of the folder; every stage does so while it runs.

        Raises:
            ArtifactError: Another folora process is running there.
        """
        with ExitStack() as held:
            distributed.on_rank_zero(lambda: held.enter_context(exclusive(self.folder)))
            distributed.raise_together(lambda: _check_shared(self.folder))
            yield

    def check(self, *, needs_data: bool, trains: bool = True) -> None:
        """All checks that do not need the model's weights; see `check_options`."""
        _check_folder(self.folder, self.config)
        training = (self.folder / Training.path).parent
        check_options(self.context, training, needs_data=needs_data, trains=trains)

    def check_command(self, command: str) -> None:
        """All other checks before a command's stages; see `checks.check_command`."""
        self.check_unchanged(command)
        check_command(self.context, self.store, command)

    def check_unchanged(self, command: str) -> None:
        """Refuse other options than those that earlier commands have used; see `checks.check_unchanged`."""
        if (file := self.folder / CONFIG).is_file():
            check_unchanged(self.store, FoLoraConfig.from_yaml(file), self.config, command)

    def run(self) -> dict[str, Any]:
        """All stages; returns the report."""
        self.check(needs_data=True)
        self.check_command("run")
        with self.alone():
            self.write_config()
            shared = self.share()
            spectrum = self.store.make(Solved(self.context, shared.keep, shared.task))
            self.store.make(Training(self.context, shared.samples, spectrum))
            self.export()
            return self.report()

    def share(self) -> Shared:
        """Stages 1 and 2, which all methods share."""
        with self.alone():
            return stages.share(self.context, self.store)

    def sample(self) -> CalibrationSet:
        """Stage 1: the calibration set."""
        with self.alone():
            return stages.sample(self.context, self.store)[0].load()

    def measure(self) -> None:
        """Stage 2: C_pre and C_task."""
        with self.alone():
            samples = self.store.read(Samples, self.context)
            self.store.make(TaskMoments(self.context))
            self.store.check_inputs(Samples)  # early stopping depends on C_task
            self.store.make(KeepMoments(self.context, samples, base=base_file(self.context)))

    def solve(self) -> None:
        """Stage 3: the eigenbases."""
        with self.alone():
            found = [self.store.read(stage, self.context) for stage in (KeepMoments, TaskMoments)]
            self.store.make(Solved(self.context, *found))

    def train(self, source: Run | None = None) -> None:
        """Stage 4: training, resumed from the latest checkpoint if there is one.

        Args:
            source: Another run of the same model and data whose samples and spectrum are used. Default is
                this run.
        """
        store = (source or self).store
        with self.alone():
            spectrum = store.read(Solved, self.context)
            samples = store.read(Samples, self.context)
            self.store.make(Training(self.context, samples, spectrum))

    def base(self, path: Path | None = None) -> Path:
        """Write samples and C_pre to a base file, for any task on this model; returns its path.

        Args:
            path: File to write or replace. Default is in the run's folder.
        """
        path = self.base_target(path)
        with self.alone():
            contents = base_contents(self.config)  # before they are read
            samples, keep = stages.sample(self.context, self.store)
            found, moments = samples.load(), self.store.make(keep).load()
            facts = self.context.facts | {CONTENTS: contents}
            distributed.on_rank_zero(lambda: write_base_file(path, found, moments, facts))
        return path

    def base_target(self, path: Path | None) -> Path:
        """The file that `base` writes. Raises ConfigError if another file is there."""
        path = path or self.folder / BASE
        if os.path.isdir(self.name) and os.path.realpath(path.parent) == os.path.realpath(
            self.name
        ):
            raise ConfigError(f"{path} is in the model's folder; give another folder")
        check_base_target(path, Path(self.config.base) if self.config.base else None)
        return path

    def samples(self) -> CalibrationSet:
        """The finished calibration set. Raises ArtifactError, MismatchError."""
        return self.store.read(Samples, self.context).load()

    def trained(self) -> Trained:
        """The result of the training. Raises ArtifactError."""
        self.store.manifest(Training)
        return Trained.load(self.folder / Training.path)

    def export(
        self, path: Path | None = None, rank: int | None = None, kind: ExportKind = "adapter"
    ) -> ExportReport:
        """Stage 5: an ordinary PEFT adapter, exact or truncated to `rank`, or merged weights.

        With a budget in the config that training has not kept already, the update is scaled to it.
        """
        if kind == "merged" and rank is not None:
            raise ConfigError("a merged export is exact; --rank is for adapters only")
        target = path or self.folder / (MERGED if kind == "merged" else ADAPTER)
        if path is None and (why := obstacle(target, folder=True)):
            raise ConfigError(f"{target} {why}, but must be a folder; move it away, or give --to")
        check_owned_folder(target, kind)
        trained = self.trained()
        self.store.check_inputs(Training)

        def write() -> ExportReport:
            config = LoraConfig(
                task_type="CAUSAL_LM",
                base_model_name_or_path=self.name,
                fan_in_fan_out=trained.facts["fan_in_fan_out"],
            )
            found = trained
            if self.config.budget is not None and (
                rank or not _within(trained, self.config.budget)
            ):
                found = _scaled(self, trained, config, rank)
            if kind == "merged":
                _write_merged(self, found, target)
                return ExportReport(0)
            return write_adapter(found.factors, target, config, rank=rank)

        with self.alone():
            return distributed.on_rank_zero(write)

    def report(self) -> dict[str, Any]:
        """Task loss, KL and norms; written to ``report.json`` and returned."""
        manifest = self.store.manifest(Training)
        self.store.check_inputs(Training)
        tokens = {
            part: self.store.manifest(stage)["tokens"]
            for part, stage in (("pre", KeepMoments), ("task", TaskMoments))
        }
        names = ("steps", "base", "adapted", "total_norm", "norms")
        report = {name: manifest[name] for name in names}
        report |= {name: manifest[name] for name in ("ended_early", "budget") if name in manifest}
        samples = self.store.manifest(Samples)
        report |= {"tokens_measured": tokens, "rejected_samples": samples["rejected"]}
        report |= {"sources": samples.get("sources", [])}
        report |= {"adapter": str(self.folder / ADAPTER)}
        text = json.dumps(report, indent=1) + "\n"
        file = self.folder / REPORT
        distributed.on_rank_zero(
            lambda: write_own(file, KIND, lambda path: path.write_text(text, "utf-8"))
        )
        return report

    def write_config(self) -> None:
        """Write the resolved config to ``config.yaml``."""
        text = self.config.to_yaml()

        def write() -> None:
            if not _config_exists(self.folder, self.config):
                write_own(self.folder / CONFIG, KIND, lambda file: file.write_text(text, "utf-8"))

        with self.alone():
            distributed.on_rank_zero(write)


def _within(trained: Trained, budget: float) -> bool:
    """Whether training has kept the budget."""
    fits = trained.facts.get("budget") or [{"budget": math.inf}]
    return fits[0]["budget"] <= budget


def _scaled(run: Run, trained: Trained, config: LoraConfig, rank: int | None) -> Trained:
    """The factors scaled to the budget, as it is kept at this rank; the model is loaded for it."""
    context, samples = Context(run.config.replace(shard=False)), run.samples()
    more = further_text(context, samples)
    with TemporaryDirectory() as folder:
        path = Path(folder) / ADAPTER
        write_adapter(trained.factors, path, config, rank=rank)
        fit = fit_adapter(context, path, samples.by_source(), more)
    logger.info("%s", budget_verdict(asdict(fit)))
    factors = {name: (a, b, s * fit.scale) for name, (a, b, s) in trained.factors.items()}
    return replace(trained, factors=factors)


def _write_merged(run: Run, trained: Trained, target: Path) -> None:
    """Write merged weights, from a freshly loaded, unsharded model, since training wraps its layers."""
    config, facts = run.config.replace(shard=False), trained.facts
    base = load_model(config, run.name, as_stored=True)
    same = weights_fingerprint(base) == facts["model"]
    if not same and str(base.dtype) != f"torch.{facts['dtype']}":  # it was cast for training
        same = weights_fingerprint(load_model(config, run.name)) == facts["model"]
    if not same or config_fingerprint(base.config) != facts["model_config"]:
        raise MismatchError(f"{run.name} is not the model that was trained in {run.folder}")
    write_merged(base, base.state_dict(), trained.factors, target, run.context.tokenizer)


def _check_shared(folder: Path) -> None:
    """Refuse a folder that this process cannot see. Raises ConfigError."""
    if not folder.is_dir():
        raise ConfigError(
            f"process {distributed.rank()} does not see the output folder {folder}; it must be on a file "
            "system that all machines share"
        )


def _check_folder(folder: Path, config: FoLoraConfig) -> None:
    """Refuse an output folder in which files of others would be overwritten. Raises ConfigError."""
    check_writable(folder, "output")
    check_is_no_model(folder, required(config.model, "model"))
    parts = {part for stage in STAGES for part in (stage.path, stage.path.partition("/")[0])}
    for part in sorted({*parts, ADAPTER, OLD}):
        if why := obstacle(folder / part, folder=True):
            raise ConfigError(
                f"{folder / part} {why}, but must be a folder of this run; move it away, or choose another "
                "output"
            )
    check_lock(folder)
    check_own(folder, KIND, [REPORT])
    _config_exists(folder, config)
    check_owned_folder(folder / ADAPTER, "adapter")
    check_checkpoints((folder / Training.path).parent, REQUEST)


def _config_exists(folder: Path, config: FoLoraConfig) -> bool:
    """Whether the folder has a config file equal to this config, possibly the user's. Raises ConfigError."""
    file = folder / CONFIG
    try:
        check_own(folder, KIND, [CONFIG])
    except ConfigError:
        with suppress(FoLoraError):  # it cannot be read
            if not obstacle(file) and FoLoraConfig.from_yaml(file) == config:
                return True
        raise
    return False
