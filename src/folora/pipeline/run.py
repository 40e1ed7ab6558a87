"""A run: the stages with a folder as their store, and what leaves it.

A run is a folder::

    config.yaml      the options
    folora.json      which of the files beside it folora wrote
    1-samples/       text that the model generated, in shards, and the finished calibration set
    2-statistics/    pre/ (C_pre) belongs to the base model, task/ (C_task) to the data set
    3-spectrum/      the eigenbasis of every shared input
    4-training/      checkpoints, and result/ with the trained factors
    5-adapter/       an ordinary PEFT adapter: this is the result
    report.json      what was learned, what was kept, and the cost
    compare/         other methods on the same samples and moments, if asked for

A stage is skipped if its result was made from the same inputs, resumed if it was interrupted, and made
again if its inputs have changed; the former result is then kept under ``old/``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from peft import LoraConfig

from folora.adapters.export import ExportReport, write_adapter, write_merged
from folora.calibration.base_file import check_base_target, write_base_file
from folora.calibration.calibration_set import CalibrationSet
from folora.config import FoLoraConfig
from folora.errors import ConfigError, FoLoraError, MismatchError
from folora.pipeline import stages
from folora.pipeline.checks import STAGES, check_command, check_is_no_model, check_options
from folora.pipeline.context import Context
from folora.pipeline.stages import KeepMoments, Samples, Shared, Solved, TaskMoments
from folora.pipeline.store import OLD, REQUEST, Folder
from folora.pipeline.training import Trained, Training, load_trained
from folora.runtime import distributed
from folora.runtime.checkpoints import check_checkpoints
from folora.runtime.fingerprints import config_fingerprint, weights_fingerprint
from folora.runtime.loading import load_model, required
from folora.runtime.ownership import check_own, check_owned_folder, write_own
from folora.runtime.storage import check_lock, check_writable, exclusive, folder_lock, obstacle

CONFIG, REPORT, BASE = "config.yaml", "report.json", "base.safetensors"
ADAPTER, MERGED, COMPARISON = "5-adapter", "merged", "compare"
KIND = "run"
"""What the list of a run's folder says of it; see `ownership`."""

ExportKind = Literal["adapter", "merged"]

P = ParamSpec("P")
R = TypeVar("R")


def _alone(method: Callable[Concatenate[Run, P], R]) -> Callable[Concatenate[Run, P], R]:
    """A method of `Run` during which no other process works in its folder."""

    @wraps(method)
    def held(self: Run, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.alone():
            return method(self, *args, **kwargs)

    return held


class Run:
    """One run folder and the stages that fill it.

    Args:
        config: ``model`` and ``output`` must be given; ``dataset`` from `measure` on.

    Raises:
        FoLoraError: From every method, with what failed and the remedy.
    """

    def __init__(self, config: FoLoraConfig) -> None:
        self.config = config
        self.context = Context(config)
        self.name = self.context.name
        self.folder = Path(required(config.output, "output"))
        if os.path.isfile(self.folder):  # False for a name too long, at which Path raises
            raise ConfigError(f"output {self.folder} is a file, but must be a folder")
        self.store = Folder(self.folder)
        self._lock = folder_lock(self.folder)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder against other runs; every stage does, for its own time.

        Raises:
            ArtifactError: Another process of folora works there.
        """
        with ExitStack() as held:
            distributed.on_rank_zero(lambda: held.enter_context(exclusive(self._lock)))
            distributed.raise_together(self._check_shared)
            yield

    def check(self, *, needs_data: bool, trains: bool = True) -> None:
        """Everything that can be found out without loading the model; see `check_options`."""
        self._check_folder()
        training = (self.folder / Training.path).parent
        check_options(self.context, training, needs_data=needs_data, trains=trains)

    def check_command(self, command: str) -> None:
        """Everything else that can be found out before a command's stages; see `check_command`."""
        check_command(self.context, self.store, command)

    # The stages.

    def run(self) -> dict[str, Any]:
        """All stages; returns the report."""
        self.check(needs_data=True)
        self.check_command("run")
        with self.alone():
            self.write_config()
            self._train(self.share())
            self.export()
            return self.report()

    @_alone
    def share(self) -> Shared:
        """Stages 1 and 2: what all methods share."""
        return stages.share(self.context, self.store)

    @_alone
    def sample(self) -> CalibrationSet:
        """Stage 1: the calibration set."""
        return stages.sample(self.context, self.store)[0].load()

    @_alone
    def measure(self) -> None:
        """Stage 2: C_pre, which belongs to the base model, and C_task."""
        samples = self.store.read(Samples, self.context)
        self.store.make(KeepMoments(self.context, samples))
        self.store.make(TaskMoments(self.context))

    @_alone
    def solve(self) -> None:
        """Stage 3: the eigenbases."""
        found = [self.store.read(stage, self.context) for stage in (KeepMoments, TaskMoments)]
        self.store.make(Solved(self.context, *found))

    @_alone
    def train(self, source: Run | None = None) -> None:
        """Stage 4: training, from the latest checkpoint if there is one.

        Args:
            source: Another run of the same model and data whose samples and spectrum are used, to compare
                methods. Default: this one.
        """
        store = (source or self).store
        spectrum = store.read(Solved, self.context)
        samples = store.read(Samples, self.context)
        self.store.make(Training(self.context, samples, spectrum))

    def _train(self, shared: Shared) -> None:
        spectrum = self.store.make(Solved(self.context, shared.keep, shared.task))
        self.store.make(Training(self.context, shared.samples, spectrum))

    @_alone
    def base(self, path: Path | None = None) -> Path:
        """Samples and C_pre in one file, for any task on this model; returns its path.

        Args:
            path: The file to make, or a base file to replace. Default is in the run's folder.
        """
        path = self.base_target(path)
        samples, keep = stages.sample_and_measure(self.context, self.store)
        found, moments = samples.load(), keep.load()
        facts = self.context.facts
        distributed.on_rank_zero(lambda: write_base_file(path, found, moments, facts))
        return path

    def base_target(self, path: Path | None) -> Path:
        """Where `base` writes. Raises ConfigError if something else is there."""
        path = path or self.folder / BASE
        if os.path.isdir(self.name) and os.path.realpath(path.parent) == os.path.realpath(
            self.name
        ):
            raise ConfigError(f"{path} would lie among the files of the model; give another folder")
        check_base_target(path, Path(self.config.base) if self.config.base else None)
        return path

    def samples(self) -> CalibrationSet:
        """The finished calibration set. Raises ArtifactError, MismatchError."""
        return self.store.read(Samples, self.context).load()

    def trained(self) -> Trained:
        """The result of the training. Raises ArtifactError."""
        self.store.manifest(Training)
        return load_trained(self.folder / Training.path)

    def export(
        self, path: Path | None = None, rank: int | None = None, kind: ExportKind = "adapter"
    ) -> ExportReport:
        """Stage 5: an ordinary PEFT adapter, exact or truncated to `rank`, or merged weights."""
        if kind == "merged" and rank is not None:
            raise ConfigError("a merged export is exact; --rank goes with the adapter alone")
        target = path or self.folder / (MERGED if kind == "merged" else ADAPTER)
        if path is None and (why := obstacle(target, folder=True)):
            raise ConfigError(f"{target} {why}, but must be a folder; move it away, or give --to")
        check_owned_folder(target, kind, "the export folder")
        trained = self.trained()

        def write() -> ExportReport:
            if kind == "merged":
                return self._write_merged(trained, target)
            config = LoraConfig(
                task_type="CAUSAL_LM",
                base_model_name_or_path=self.name,
                fan_in_fan_out=trained.facts["fan_in_fan_out"],
            )
            return write_adapter(trained.factors, target, config, rank=rank)

        with self.alone():
            return distributed.on_rank_zero(write)

    def _write_merged(self, trained: Trained, target: Path) -> ExportReport:
        """Loads the model afresh, since training wraps the layers, and whole: one process writes."""
        whole, facts = self.config.replace(shard=False), trained.facts
        base = load_model(whole, self.name, as_stored=True)
        same = weights_fingerprint(base) == facts["model"]
        if not same and str(base.dtype) != f"torch.{facts['dtype']}":  # rounded when it was trained
            same = weights_fingerprint(load_model(whole, self.name)) == facts["model"]
        if not same or config_fingerprint(base.config) != facts["model_config"]:
            raise MismatchError(f"{self.name} is not the model that was trained in {self.folder}")
        write_merged(base, base.state_dict(), trained.factors, target, self.context.tokenizer)
        return ExportReport(0, 0.0, "", 0.0)

    def report(self) -> dict[str, Any]:
        """What was learned, kept and paid; written to ``report.json`` and returned."""
        manifest = self.store.manifest(Training)
        tokens = {
            part: self.store.manifest(stage)["tokens"]
            for part, stage in (("pre", KeepMoments), ("task", TaskMoments))
        }
        names = ("steps", "base", "adapted", "total_norm", "norms")
        report = {name: manifest[name] for name in names}
        rejected = self.store.manifest(Samples)["rejected"]
        report |= {"tokens_measured": tokens, "rejected_samples": rejected}
        report |= {"adapter": str(self.folder / ADAPTER)}
        text = json.dumps(report, indent=1) + "\n"
        file = self.folder / REPORT
        distributed.on_rank_zero(
            lambda: write_own(file, KIND, lambda path: path.write_text(text, "utf-8"))
        )
        return report

    @_alone
    def write_config(self) -> None:
        """Leave the resolved config where a reader looks for it."""
        text = self.config.to_yaml()

        def write() -> None:
            if not self._config_is_there():
                write_own(self.folder / CONFIG, KIND, lambda file: file.write_text(text, "utf-8"))

        distributed.on_rank_zero(write)

    # The folder.

    def _check_shared(self) -> None:
        if not self.folder.is_dir():
            raise ConfigError(
                f"process {distributed.rank()} does not see the output folder {self.folder}; it must "
                "be on a file system that all machines share"
            )

    def _check_folder(self) -> None:
        """Refuse a folder in which something would be lost. Raises ConfigError."""
        check_writable(self.folder, "output")
        check_is_no_model(self.folder, self.name)
        parts = {part for stage in STAGES for part in (stage.path, stage.path.partition("/")[0])}
        for part in sorted({*parts, ADAPTER, OLD}):
            if why := obstacle(self.folder / part, folder=True):
                raise ConfigError(
                    f"{self.folder / part} {why}, but must be a folder of this run; move it away, or "
                    "choose another output"
                )
        check_lock(self.folder)
        check_own(self.folder, KIND, [REPORT])
        self._config_is_there()
        check_owned_folder(self.folder / ADAPTER, "adapter", "the export folder")
        check_checkpoints((self.folder / Training.path).parent, REQUEST)

    def _config_is_there(self) -> bool:
        """Whether there is a config file of this very config, be it the user's; see `check_own`."""
        file = self.folder / CONFIG
        try:
            check_own(self.folder, KIND, [CONFIG])
        except ConfigError:
            if obstacle(file) or not _says(file, self.config):
                raise
            return True
        return False


def _says(file: Path, config: FoLoraConfig) -> bool:
    """Whether a YAML file is of this very config."""
    try:
        return FoLoraConfig.from_yaml(file) == config
    except FoLoraError:
        return False
