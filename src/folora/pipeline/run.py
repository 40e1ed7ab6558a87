"""The stages of a run, each from what the one before left on disk.

A run is a folder::

    config.yaml      what was asked for
    folora.json      which of the files beside it folora wrote
    1-samples/       text that the model wrote itself, in shards, and the finished set
    2-statistics/    pre/ belongs to the base model, task/ to the data set
    3-spectrum/      the eigenbasis of every shared input
    4-training/      checkpoints, and result/ with the trained factors
    5-adapter/       an ordinary PEFT adapter: this is what you came for
    report.json      what was learned, what was kept, what it cost
    compare/         other methods on the same samples and statistics, if asked for

A stage is skipped if its result was made from the same inputs, goes on if it was interrupted, and is
done again if its inputs have changed; the former result is then kept under ``old/``.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cached_property, partial, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from folora.adapters.adapter import lora_factors
from folora.adapters.coverage import Coverage, cover_config, report
from folora.adapters.export import ExportReport, write_adapter, write_merged
from folora.calibration.base_file import (
    BaseFile,
    check_base_target,
    read_base_file,
    read_base_manifest,
    warn_of_dtype,
    write_base_file,
)
from folora.calibration.calibration_set import ProxySet, load_proxy_set, write_proxy_set
from folora.calibration.engine import Engine, HuggingFaceEngine, sized
from folora.calibration.moments import Moments
from folora.calibration.sampling import sample_to_folder
from folora.calibration.vllm import ENGINE, engine_of, served
from folora.config import FoLoraConfig, TrainingConfig
from folora.data.rows import (
    Example,
    TaskData,
    check_dataset,
    check_fits,
    load_rows,
    prepare_task,
    text_examples,
)
from folora.data.special_tokens import check_same_tokenizer, ending_ids, start_token_id
from folora.errors import ArtifactError, ConfigError, FoLoraError, MismatchError, NumericsError
from folora.metrics.meter import Reading, total_norm
from folora.pipeline.prepare import (
    convergence,
    coverage_of,
    limits_of,
    measure,
    null_rank,
    sampler_of,
    solved_directions,
)
from folora.runtime import distributed
from folora.runtime.artifacts import (
    Artifact,
    read_artifact,
    read_manifest,
    software_versions,
    write_artifact,
)
from folora.runtime.checkpoints import check_checkpoints
from folora.runtime.contexts import without_adapter
from folora.runtime.fingerprints import config_fingerprint, model_facts, weights_fingerprint
from folora.runtime.finiteness import check_finite_weights
from folora.runtime.loading import (
    check_quantizer,
    device_of,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    required,
)
from folora.runtime.ownership import check_own, check_own_folder, write_own
from folora.runtime.progress import progress
from folora.runtime.storage import (
    alone,
    check_lock,
    check_writable,
    fitting,
    json_fingerprint,
    lock_of,
    obstacle,
    read_sealed,
    write_sealed,
)
from folora.spectral.eigenproblem import BASES
from folora.spectral.groups import InputGroup
from folora.spectral.layers import GroupBasis, bases_from_tensors, bases_to_tensors, solve
from folora.training.prepared import Prepared, assemble
from folora.training.sft_options import effective

if TYPE_CHECKING:
    from folora.training.trainer import FoLoraTrainer

logger = logging.getLogger(__name__)

SAMPLES, STATISTICS, SPECTRUM = "1-samples", "2-statistics", "3-spectrum"
TRAINING, ADAPTER, REPORT = "4-training", "5-adapter", "report.json"
CONFIG, REQUEST = "config.yaml", "request.json"
COMPARISON, OLD, MERGED = "compare", "old", "merged"
BASE = "base.safetensors"
KIND = "run"
"""What the list of a run's folder says of it; see `ownership`."""

SET, RESULT = f"{SAMPLES}/set", f"{TRAINING}/result"
PRE, TASK = f"{STATISTICS}/pre", f"{STATISTICS}/task"
MADE = {
    SET: ("samples", "sample"),
    PRE: ("statistics_pre", "measure"),
    TASK: ("statistics_task", "measure"),
    SPECTRUM: ("spectrum", "solve"),
    RESULT: ("training", "train"),
}
"""The kind of each part of the folder, and the command that makes it."""
STAGE_WRITES = {
    "run": tuple(MADE),
    "sample": (SET,),
    "measure": (PRE, TASK),
    "solve": (SPECTRUM,),
    "train": (RESULT,),
    "base": (SET, PRE),
    "compare": (SET, PRE, TASK),
}
"""What a command makes, or finds done already."""
STAGE_READS = {"measure": (SET,), "solve": (PRE, TASK), "train": (SET, SPECTRUM)}
"""What a stage finds in the folder."""

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
        FoLoraError: From every method, with what failed and what to do.
    """

    def __init__(self, config: FoLoraConfig) -> None:
        self.config = config
        self.name = required(config.model, "model")
        self.folder = Path(required(config.output, "output"))
        if os.path.isfile(self.folder):  # False for a name too long, at which Path raises
            raise ConfigError(f"output {self.folder} is a file, but must be a folder")
        self._lock = lock_of(self.folder)
        self._looked: tuple[str, Moments] | None = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder against other runs; every stage does, for its own time.

        Raises:
            ArtifactError: Another process of folora works there.
        """
        with ExitStack() as held:
            distributed.first(lambda: held.enter_context(alone(self._lock)))
            distributed.agree(self._check_shared)
            yield

    def _check_shared(self) -> None:
        if not self.folder.is_dir():
            raise ConfigError(
                f"process {distributed.rank()} does not see the output folder {self.folder}; it must be on a "
                "file system that all machines share"
            )

    # What the stages are about; loaded when first needed.

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model."""
        return load_tokenizer(self.config, self.name)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base model; its weights are checked once."""
        model = load_model(self.config, self.name)
        distributed.agree(lambda: check_finite_weights(model))
        return model

    @cached_property
    def model_facts(self) -> dict[str, Any]:
        """Fingerprints of model and tokenizer, for manifests."""
        return model_facts(self.model, self.tokenizer)

    @cached_property
    def limits(self) -> dict[str, int | None]:
        """How many tokens the model knows and reads, by its config alone."""
        return limits_of(load_config(self.config, self.name))

    @cached_property
    def groups(self) -> list[InputGroup]:
        """The shared inputs of the layers to adapt."""
        found = coverage_of(self.model, self.config.adapter, self.start_id)
        if found.groups != self.coverage.groups:  # quantized layers may differ from the outline's
            report(found)
        return found.groups

    @cached_property
    def coverage(self) -> Coverage:
        """Which layers are adapted, by the model's config alone."""
        return cover_config(self.config, load_config(self.config, self.name))[1]

    @cached_property
    def task(self) -> TaskData:
        """The tokenized rows."""
        dataset = required(self.config.dataset, "dataset")
        rows = load_rows(dataset, self.config.data.split)
        return prepare_task(rows, self.tokenizer, self.config.data)

    @cached_property
    def start_id(self) -> int:
        """The token that sampling starts from."""
        configs = (
            load_config(self.config, self.name),
            load_generation_config(self.config, self.name),
        )
        return start_token_id(self.tokenizer, self.config.sampling.start_token, *configs)

    def check(self, *, needs_data: bool, trains: bool = True) -> None:
        """Everything that can be found out without loading the model.

        Args:
            needs_data: Whether the rows of the task are read.
            trains: Whether training follows; if not, TRL may be missing.
        """
        self._check_folder()
        check_quantizer(self.config)
        device = device_of(self.config)
        arguments = (
            self._training_arguments(device) if trains or find_spec("trl") is not None else None
        )
        if self._by_fsdp and self.config.shard:
            raise ConfigError(
                "--shard shares the weights out already; start the processes without FSDP"
            )
        if needs_data:
            check_dataset(required(self.config.dataset, "dataset"))
        if self.config.base is not None:
            read_base_manifest(Path(self.config.base))
        limits, start_id = self.limits, self.start_id
        if self.config.sampling.sampler_model:
            self._check_sampler(self.config.sampling.sampler_model)
        task = self.task if needs_data else TaskData([], [])
        check_fits(task, self.tokenizer, start_id, **limits)
        if arguments is not None:
            self._check_trainer(arguments, task)
        if needs_data and trains and self.config.training.eval_steps and not task.held_out:
            raise ConfigError(
                f"training.eval_steps is {self.config.training.eval_steps}, but no rows are held out of "
                f"{len(task.train)}: give at least 10 rows and data.eval_rows > 0, or eval_steps 0"
            )
        report(self.coverage)

    def _training_arguments(self, device: torch.device) -> Any:
        """What TRL is told. Raises ConfigError for what it refuses, also if TRL is missing."""
        from folora.training.trainer import sft_config

        folder = self.folder / TRAINING
        on_cpu = device.type == "cpu"
        return sft_config(self.config.training, folder, evaluates=True, on_cpu=on_cpu)

    def _check_trainer(self, arguments: Any, task: TaskData) -> None:
        """What TRL refuses only with rows and a tokenizer. Raises ConfigError."""
        from folora.training.trainer_check import check_trainer

        training = self.config.training
        if training.extra or training.lr_scheduler_type != TrainingConfig().lr_scheduler_type:
            model_config = load_config(self.config, self.name)
            check_trainer(arguments, self.tokenizer, task.train, model_config)

    def _check_folder(self) -> None:
        """Refuse a folder in which something would be lost. Raises ConfigError."""
        check_writable(self.folder, "output")
        if os.path.isdir(self.name) and os.path.realpath(self.name) == os.path.realpath(
            self.folder
        ):
            raise ConfigError(f"output {self.folder} is the folder of the model; give another one")
        for part in (SAMPLES, STATISTICS, *MADE, TRAINING, ADAPTER, OLD):
            if why := obstacle(self.folder / part, folder=True):
                raise ConfigError(
                    f"{self.folder / part} {why}, but must be a folder of this run; move it away, or "
                    "choose another output"
                )
        check_lock(self.folder)
        check_own(self.folder, KIND, [REPORT])
        self._config_is_there()
        check_own_folder(self.folder / ADAPTER, "adapter", "the export folder")
        check_checkpoints(self.folder / TRAINING, REQUEST)

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

    @property
    def _by_fsdp(self) -> bool:
        """Whether training is asked to share parameters out."""
        return distributed.asks_for_fsdp(self.config.training.extra.get("fsdp"))

    def check_stage(self, command: str) -> None:
        """Everything else that can be found out before a stage begins.

        Samples fit the context; what it reads of the stages before it is there, and of this model;
        the weights are sound; the adapter fits the layers.
        """
        samples = command in ("run", "sample", "base", "compare") and self.config.base is None
        if samples:
            self._check_sampling()
        for part in STAGE_READS.get(command, ()):
            self._manifest(part)
        for part in STAGE_WRITES.get(command, ()):
            self._check_made(part)
        _ = self.groups  # the rank must fit the layers before hours of sampling
        eos_ids = ending_ids(self.model, self.tokenizer, self.config.sampling)
        sampling = self.config.sampling
        if samples and sampling.server is None and sampling.sampler_model is None:
            HuggingFaceEngine(self.model, self.start_id, eos_ids, sampling).check_decodes()
        if self.config.base is not None:
            found = read_base_manifest(Path(self.config.base), self.model_facts)
            warn_of_dtype(found, self.model_facts["dtype"])
        for part in STAGE_READS.get(command, ()):
            self._manifest(part, self.model_facts)
        distributed.check_same("set of options", self.config)
        distributed.check_same("model", self.model_facts)
        distributed.check_same("set of versions", software_versions())
        if "task" in vars(self):
            distributed.check_same("data set", self.task.fingerprint)

    # The stages.

    def run(self) -> dict[str, Any]:
        """All stages; returns the report."""
        self.check(needs_data=True)
        self.check_stage("run")
        with self.alone():
            self.write_config()
            self.sample()
            self.measure()
            self.solve()
            self.train()
            self.export()
            return self.report()

    @_alone
    def write_config(self) -> None:
        """Leave the resolved config where a reader looks for it."""
        text = self.config.to_yaml()

        def write() -> None:
            if not self._config_is_there():
                write_own(self.folder / CONFIG, KIND, lambda file: file.write_text(text, "utf-8"))

        distributed.first(write)

    @_alone
    def sample(self) -> ProxySet:
        """Stage 1: the proxy set."""
        if self.config.base is not None:
            return distributed.first(self._take_samples)
        config = sized(self.config.sampling, self.model)
        facts = dict(self.model_facts)
        if config.sampler_model:
            facts["sampler_model"] = config.sampler_model
        if config.server:
            facts["engine"] = ENGINE  # whose draws are others; where it runs changes nothing
        eos_ids = ending_ids(self.model, self.tokenizer, config)
        folder = self.folder / SAMPLES
        enough, decision = None, None
        if self.config.ends_early:
            self._measure_task()
            task = self.statistics("task")
            enough = convergence(self.model, self.groups, task.tensors, self.config)
            decision = {**enough.facts, "task": task.manifest["sha256"]} if enough else None
        arguments = (
            self._engine, self.start_id, eos_ids, config, facts, folder, enough, decision
        )  # fmt: skip
        try:
            proxies = sample_to_folder(*arguments)
        except MismatchError:
            distributed.first(lambda: self._set_aside(folder))
            proxies = sample_to_folder(*arguments)
        if enough and enough.pre:
            self._looked = (proxies.fingerprint, enough.pre)
        return proxies

    @_alone
    def measure(self) -> None:
        """Stage 2: C_pre, which belongs to the base model, and C_task."""
        self._measure_pre()
        self._measure_task()

    @_alone
    def share(self, path: Path | None = None) -> Path:
        """Samples and C_pre in one file, for any task on this model; returns its path.

        Args:
            path: The file to make, or a base file to replace. Default is in the run's folder.
        """
        path = self.base_target(path)
        proxies = self.sample()
        self._measure_pre()
        pre = self.statistics("pre")
        facts = {**self.model_facts, "tokens": pre.manifest["tokens"]}
        distributed.first(lambda: write_base_file(path, proxies, self.groups, pre.tensors, facts))
        return path

    def base_target(self, path: Path | None) -> Path:
        """Where `share` writes. Raises ConfigError if something else is there."""
        path = path or self.folder / BASE
        if os.path.isdir(self.name) and os.path.realpath(path.parent) == os.path.realpath(
            self.name
        ):
            raise ConfigError(f"{path} would lie among the files of the model; give another folder")
        check_base_target(path, Path(self.config.base) if self.config.base else None)
        return path

    def _measure_task(self) -> None:
        chosen = self.task.train[: self.config.statistics.task_examples]
        self._statistics_unless_done(
            "task",
            {"data": TaskData(chosen, []).fingerprint},
            lambda: self._measured("task", chosen),
        )

    def _measure_pre(self) -> None:
        proxies = self.proxies()
        looked, self._looked = self._looked, None  # let go of even if there is nothing to make

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            if self.config.base is not None:
                found = self._base_file()
                return found.moments(self.groups), {"tokens": found.manifest["tokens"]}
            if looked is None or looked[0] != proxies.fingerprint:
                return self._measured("pre", text_examples(proxies.calibration))
            logger.info("C_pre: measured when it was asked whether the text is enough")
            return looked[1].matrices, {"tokens": looked[1].tokens}

        facts = {"samples": proxies.fingerprint, "base": self._base_checksum}
        self._statistics_unless_done("pre", facts, make)

    def _statistics_unless_done(
        self,
        part: str,
        facts: dict[str, Any],
        make: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]],
    ) -> None:
        layers = [[group.layers, group.d_in] for group in self.groups]
        shared = {**self.model_facts, "groups": json_fingerprint(layers)}
        path = self.folder / STATISTICS / part
        self._unless_done(path, f"statistics_{part}", {**shared, **facts}, make)

    @property
    def _base_checksum(self) -> str | None:
        path = self.config.base
        return None if path is None else str(read_base_manifest(Path(path))["sha256"])

    def _base_file(self) -> BaseFile:
        return read_base_file(Path(required(self.config.base, "base")), self.model_facts)

    def _take_samples(self) -> ProxySet:
        """The samples of the base file, instead of sampling."""
        folder = self.folder / SAMPLES
        if (folder / "set").exists():
            wanted = read_base_manifest(Path(required(self.config.base, "base")), self.model_facts)
            if read_manifest(folder / "set", "samples").get("fingerprint") == wanted["samples"]:
                return load_proxy_set(folder, self.model_facts)
            self._set_aside(folder)
        found = self._base_file()
        self._known(found.proxies)
        write_proxy_set(
            folder, found.proxies, {**self.model_facts, "base": found.manifest["sha256"]}
        )
        return found.proxies

    @_alone
    def solve(self) -> None:
        """Stage 3: the eigenbases."""
        pre, task = self.statistics("pre"), self.statistics("task")
        facts = {
            **self.model_facts,
            "statistics": [pre.manifest["sha256"], task.manifest["sha256"]],
            "tau": self.config.spectrum.tau,
            "basis": self.config.spectrum.basis,
            "null_rank": null_rank(self.config),
            "directions": solved_directions(self.config),
        }

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            with progress("solving", len(self.groups)) as tick:
                bases = solve(
                    self.groups,
                    pre.tensors,
                    task.tensors,
                    tau=self.config.spectrum.tau,
                    null_rank=null_rank(self.config),
                    directions=solved_directions(self.config),
                    eigenbasis=BASES[self.config.spectrum.basis],
                    device=self.model.device,
                    on_group=tick,
                )
            tensors, group_facts = bases_to_tensors(bases)
            return tensors, {"groups": group_facts}

        self._unless_done(self.folder / SPECTRUM, "spectrum", facts, make)

    @_alone
    def train(self, source: Run | None = None) -> None:
        """Stage 4: training, from the latest checkpoint if there is one.

        Args:
            source: Another run of the same model and data whose samples and spectrum are used, for
                comparing methods without doing the first stages again. Default: this one.
        """
        from folora.training.trainer import train

        source = source or self
        folder = self.folder / TRAINING
        spectrum = source._read(SPECTRUM, self.model_facts)
        proxies = source.proxies()
        config = self.config
        request = {
            **self.model_facts,
            "spectrum": spectrum.manifest["sha256"],
            "data": self.task.fingerprint,
            "held_out": proxies.fingerprint,
            "options": json_fingerprint(
                [
                    effective(asdict(config.training)),
                    asdict(config.adapter),
                    asdict(config.spectrum),
                ]
            ),
            "rows_a_step": distributed.count()
            * config.training.batch_size
            * config.training.gradient_accumulation_steps,
        }
        if self._by_fsdp:
            request["checkpoints"] = "FSDP"  # of another form
        if distributed.first(lambda: self._is_trained(folder, request)):
            return
        bases = self._bases(source, spectrum)
        prepared = assemble(self.model, bases, self.task, proxies, config)
        trainer = train(prepared, self.tokenizer, folder)
        self._write_result(prepared, trainer, request)

    def _is_trained(self, folder: Path, request: dict[str, Any]) -> bool:
        """Whether training is done; if not, its folder is made ready."""
        check_checkpoints(folder, REQUEST)
        request_file = folder / REQUEST
        if request_file.exists() and read_sealed(request_file) != request:
            self._set_aside(folder)
        if (folder / "result").exists():
            read_manifest(folder / "result", "training", request)
            logger.info("training: done already")
            return True
        write_sealed(request_file, request)
        return False

    def _write_result(
        self, prepared: Prepared, trainer: FoLoraTrainer, request: dict[str, Any]
    ) -> None:
        """Leave the trained factors and the last reading where export and report look."""
        factors = lora_factors(prepared.model)
        steps = trainer.state.global_step
        for name, (a, b, _) in factors.items():
            if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise NumericsError(
                    f"training diverged: after {steps} steps the adapter of {name} holds NaN or Inf. "
                    f"Lower training.learning_rate (now {self.config.training.learning_rate:g})."
                )
        reading, norms = trainer.read()
        with without_adapter(prepared.model):
            before = Reading(0.0, 0.0, prepared.meter.task_loss(prepared.model))
        tensors = {f"{name}/A": a for name, (a, _, _) in factors.items()}
        tensors |= {f"{name}/B": b for name, (_, b, _) in factors.items()}
        facts = {
            **request,
            "scaling": {name: scaling for name, (_, _, scaling) in factors.items()},
            "fan_in_fan_out": _all_conv1d(prepared, factors),
            "steps": steps,
            "base": _without_nan(asdict(before)),
            "adapted": _without_nan(asdict(reading)),
            "total_norm": asdict(total_norm(norms)),
            "norms": {name: asdict(norm) for name, norm in norms.items()},
        }
        path = self.folder / TRAINING / "result"
        distributed.first(lambda: write_artifact(path, "training", tensors, facts))

    def export(
        self, path: Path | None = None, rank: int | None = None, kind: ExportKind = "adapter"
    ) -> ExportReport:
        """Stage 5: an ordinary PEFT adapter, exact or cut back to `rank`, or merged weights."""
        if kind == "merged" and rank is not None:
            raise ConfigError("a merged export is exact; --rank goes with the adapter alone")
        target = path or self.folder / (MERGED if kind == "merged" else ADAPTER)
        if path is None and (why := obstacle(target, folder=True)):
            raise ConfigError(f"{target} {why}, but must be a folder; move it away, or give --to")
        check_own_folder(target, kind, "the export folder")
        result = self._read(RESULT)
        with fitting(self.folder / RESULT):
            factors = {
                name: (result.tensors[f"{name}/A"], result.tensors[f"{name}/B"], float(scaling))
                for name, scaling in result.manifest["scaling"].items()
            }

        def write() -> ExportReport:
            if kind == "adapter":
                config = LoraConfig(
                    task_type="CAUSAL_LM",
                    base_model_name_or_path=self.name,
                    fan_in_fan_out=result.manifest["fan_in_fan_out"],
                )
                return write_adapter(factors, target, config, rank=rank)
            # Afresh, since training wraps the layers, and whole: the others do not take part.
            whole = replace(self.config, shard=False)
            base = load_model(whole, self.name, as_stored=True)
            dtype, trained = result.manifest["dtype"], result.manifest["model"]
            same = weights_fingerprint(base) == trained
            if not same and str(base.dtype) != f"torch.{dtype}":  # rounded when it was trained
                same = weights_fingerprint(load_model(whole, self.name)) == trained
            if not same or config_fingerprint(base.config) != result.manifest["model_config"]:
                raise MismatchError(
                    f"{self.name} is not the model that was trained in {self.folder}"
                )
            write_merged(base, base.state_dict(), factors, target, self.tokenizer)
            return ExportReport(0, 0.0, "", 0.0)

        with self.alone():
            return distributed.first(write)

    def report(self) -> dict[str, Any]:
        """What was learned, kept and paid; written to ``report.json`` and returned."""
        manifest = read_manifest(self.folder / TRAINING / "result", "training")
        samples = read_manifest(self.folder / SAMPLES / "set", "samples")
        statistics = {
            part: read_manifest(self.folder / STATISTICS / part, f"statistics_{part}")["tokens"]
            for part in ("pre", "task")
        }
        names = ("steps", "base", "adapted", "total_norm", "norms")
        report = {name: manifest[name] for name in names}
        report |= {"tokens_measured": statistics, "rejected_samples": samples["rejected"]}
        report |= {"adapter": str(self.folder / ADAPTER)}
        text = json.dumps(report, indent=1) + "\n"
        file = self.folder / REPORT
        distributed.first(
            lambda: write_own(file, KIND, lambda path: path.write_text(text, "utf-8"))
        )
        return report

    # What stages read.

    def made_from(self) -> dict[str, Any]:
        """Fingerprints of all that a training reads: model, data, samples and statistics."""
        return {
            **self.model_facts,
            "data": self.task.fingerprint,
            "samples": self._manifest(SET)["fingerprint"],
            "statistics": [self._manifest(part)["sha256"] for part in (PRE, TASK)],
        }

    def proxies(self) -> ProxySet:
        """The finished proxy set of this model."""
        self._require(SET)
        return self._known(load_proxy_set(self.folder / SAMPLES, self.model_facts))

    def _known(self, proxies: ProxySet) -> ProxySet:
        """The set, if the model knows each of its tokens. Raises ArtifactError."""
        known = self.limits["vocabulary"]
        rows = [*proxies.calibration, *proxies.held_out]
        if known is not None and (token := max(map(max, rows))) >= known:
            raise ArtifactError(f"the samples hold token {token}, but the model knows {known}")
        return proxies

    def statistics(self, part: str) -> Artifact:
        """C_pre (``"pre"``) or C_task (``"task"``) of this model."""
        path = f"{STATISTICS}/{part}"
        found = self._read(path, self.model_facts)
        shapes = {name: tuple(t.shape) for name, t in found.tensors.items()}
        wanted = {g.name: (g.d_in, g.d_in) for g in self.groups}
        self._check_layers(self.folder, path, shapes == wanted)
        return found

    def _bases(self, source: Run, spectrum: Artifact) -> list[GroupBasis]:
        bases = bases_from_tensors(spectrum.tensors, spectrum.manifest["groups"])
        same = [b.group for b in bases] == self.groups
        self._check_layers(source.folder, SPECTRUM, same)
        return bases

    def _check_layers(self, folder: Path, part: str, same: bool) -> None:
        if not same:
            raise MismatchError(
                f"{folder / part} is of other layers than adapter.target_modules "
                f"{self.config.adapter.target_modules!r}; make it again: folora {MADE[part][1]}"
            )

    def _read(self, part: str, expected: dict[str, Any] | None = None) -> Artifact:
        self._require(part)
        return read_artifact(self.folder / part, MADE[part][0], expected)

    def _manifest(self, part: str, expected: dict[str, Any] | None = None) -> dict[str, Any]:
        self._require(part)
        return read_manifest(self.folder / part, MADE[part][0], expected)

    def _check_made(self, part: str) -> None:
        """Refuse what is in a part's place and is none of it, before hours. Raises FoLoraError."""
        request = self.folder / part.partition("/")[0] / REQUEST
        if part in (SET, RESULT) and request.exists():
            read_sealed(request)
        if os.path.lexists(self.folder / part):
            self._manifest(part)

    def _require(self, part: str) -> None:
        if not (self.folder / part).exists():
            raise ArtifactError(
                f"{self.folder / part} is missing; give the command: folora {MADE[part][1]}"
            )

    # How stages are done.

    def _engine(self) -> Engine:
        config = self.config.sampling
        sampler = sampler_of(self.model, self.tokenizer, self.config)
        eos_ids = ending_ids(self.model, self.tokenizer, config)
        return engine_of(sampler, self.start_id, eos_ids, config)

    def _check_sampling(self) -> None:
        """Samples fit the context, and a server that is to write them is there."""
        if self.config.sampling.server is not None:
            distributed.agree(partial(self._check_server, self.config.sampling.server))
        context = self.limits["context"]
        asked = self.config.sampling.max_new_tokens
        if context is not None and asked >= context:  # the start token comes in front
            raise ConfigError(
                f"sampling.max_new_tokens is {asked}, but {self.name} reads at most {context} tokens; "
                f"it must be < {context}"
            )

    def _check_server(self, url: str) -> None:
        written = (self.folder / SET).exists() and self._manifest(SET).get("engine") == ENGINE
        if not written:  # after that it may be stopped
            served(url, self.config.sampling)

    def _check_sampler(self, name: str) -> None:
        other = load_tokenizer(replace(self.config, revision=None), name)
        check_same_tokenizer(self.tokenizer, other, name)

    def _measured(
        self, part: str, examples: Sequence[Example]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        first = distributed.rank() == 0  # which writes them
        config = self.config.statistics
        moments = measure(self.model, self.groups, examples, config, f"C_{part}", kept=first)
        return moments.matrices, {"tokens": moments.tokens}

    def _unless_done(
        self,
        path: Path,
        kind: str,
        facts: dict[str, Any],
        make: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]],
    ) -> None:
        """Write an artifact unless it is there with the same facts; changed ones go to old/."""
        if not distributed.first(lambda: self._is_done(path, kind, facts)):
            tensors, more = make()
            distributed.first(lambda: write_artifact(path, kind, tensors, {**more, **facts}))

    def _is_done(self, path: Path, kind: str, facts: dict[str, Any]) -> bool:
        if not path.exists():
            return False
        manifest = read_manifest(path, kind)
        if all(manifest.get(name) == value for name, value in facts.items()):
            logger.info("%s: done already", path.relative_to(self.folder))
            return True
        self._set_aside(path)
        return False

    def _set_aside(self, path: Path) -> None:
        """Keep a result whose inputs have changed under ``old/``."""
        stem = str(path.relative_to(self.folder)).replace("/", "-")
        taken = {p.name for p in (self.folder / OLD).glob(f"{stem}-*")}
        number = next(n for n in range(1, 10**6) if f"{stem}-{n}" not in taken)
        target = self.folder / OLD / f"{stem}-{number}"
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        logger.warning("%s was made from other inputs; it is kept as %s", path, target)


def _says(file: Path, config: FoLoraConfig) -> bool:
    """Whether a YAML file is of this very config."""
    try:
        return FoLoraConfig.from_yaml(file) == config
    except FoLoraError:
        return False


def _all_conv1d(prepared: Prepared, factors: Mapping[str, Any]) -> bool:
    base: Any = prepared.model.get_base_model()
    return all(isinstance(base.get_submodule(n).get_base_layer(), Conv1D) for n in factors)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN; a reading that could not be taken is null."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
