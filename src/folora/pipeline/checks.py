"""Checks before a run starts: options, data, output folder, model, and existing results."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from folora.adapters.coverage import report
from folora.calibration.base_file import check_base_sources, read_base_manifest, warn_of_dtype
from folora.calibration.engine import Engine
from folora.calibration.vllm import ENGINE, find_server
from folora.config import FoLoraConfig, TrainingConfig, option_names
from folora.config.options import short
from folora.data.files import check_dataset
from folora.data.rows import TaskData, check_fits
from folora.data.special_tokens import check_same_tokenizer
from folora.errors import ConfigError, MismatchError
from folora.pipeline.context import Context
from folora.pipeline.stages import KeepMoments, Samples, Solved, TaskMoments, solve_options
from folora.pipeline.store import Folder, Stage
from folora.pipeline.training import Training
from folora.runtime import distributed
from folora.runtime.architecture import check_model
from folora.runtime.artifacts import software_versions
from folora.runtime.loading import (
    check_quantizer,
    device_of,
    load_tokenizer,
    required,
    warn_if_slow,
)

logger = logging.getLogger(__name__)

STAGES: tuple[type[Stage[Any]], ...] = (Samples, KeepMoments, TaskMoments, Solved, Training)
WRITES: dict[str, tuple[type[Stage[Any]], ...]] = {
    "run": STAGES,
    "sample": (Samples,),
    "measure": (KeepMoments, TaskMoments),
    "solve": (Solved,),
    "train": (Training,),
    "base": (Samples, KeepMoments),
    "compare": (Samples, KeepMoments, TaskMoments),
}
"""The stages that a command makes, or skips if done."""
READS: dict[str, tuple[type[Stage[Any]], ...]] = {
    "measure": (Samples,),
    "solve": (KeepMoments, TaskMoments),
    "train": (Samples, Solved),
}
"""The stages whose results a command reads from the folder."""

SAMPLED = ("seed", "base", "sampling")
"""Options and sections with which the first stage is made. Commands that read it cannot change them."""
SOLVED = {
    "tau": "spectrum.tau",
    "basis": "method.basis",
    "null_rank": "method.init, or adapter.r",
    "directions": "spectrum.directions, or adapter.r",
}
"""The options of `stages.solve_options`, by their names in the config."""


def check_unchanged(store: Folder, made: FoLoraConfig, config: FoLoraConfig, command: str) -> None:
    """Refuse a change of options that made what a command only reads. Raises ConfigError.

    Args:
        store: The run's folder.
        made: The options in its config file.
        config: The options of the command.
        command: The subcommand; those that make all of their inputs are not concerned.
    """
    if command not in (*READS, "export"):
        return
    names = [n for n in option_names() if n in SAMPLED or n.partition(".")[0] in SAMPLED]
    pairs = [(n, "sample", attrgetter(n)(made), attrgetter(n)(config)) for n in names]
    if command == "train":
        # Not those of the config file: a solve that was interrupted has written its own there.
        old, new = store.manifest(Solved), solve_options(config)
        pairs += [(SOLVED[n], "solve", old[n], new[n]) for n in SOLVED]
    for name, maker, before, now in pairs:
        if now != before:
            own = "; the seed of training alone is training.seed" if name == "seed" else ""
            raise ConfigError(
                f"{name} is {short(now)}, but folora {command} reads results that were made with {short(before)}; "
                f"leave it out, or run folora {maker} with it and the commands after that{own}"
            )


def check_options(context: Context, training: Path, *, needs_data: bool, trains: bool) -> None:
    """All checks that do not need the model's weights. Raises FoLoraError.

    Args:
        context: Of the run.
        training: Folder for checkpoints.
        needs_data: Whether the task rows are read.
        trains: Whether training follows; if not, TRL need not be installed.
    """
    config = context.config
    _check_method(config)
    check_quantizer(config)
    if has_trl := trains or find_spec("trl") is not None:
        from folora.training.arguments import sft_config  # an extra

        on_cpu = device_of(config).type == "cpu"
        arguments = sft_config(config, training, evaluates=True, on_cpu=on_cpu)
    if config.shard and distributed.asks_for_fsdp((config.training.model_extra or {}).get("fsdp")):
        raise ConfigError("--shard shards the weights already; start the processes without FSDP")
    if needs_data:
        check_dataset(required(config.dataset, "dataset"))
    if config.base is not None:
        check_base_sources(read_base_manifest(Path(config.base)), config.sampling)
    limits, start_id = context.limits, context.start_id
    if name := config.sampling.sampler_model:
        other = load_tokenizer(config.replace(revision=None), name)
        check_same_tokenizer(context.tokenizer, other, name)
    task = context.task if needs_data else TaskData([], [])
    check_fits(task, context.tokenizer, start_id, **limits)
    default = TrainingConfig().lr_scheduler_type
    if has_trl and (config.training.model_extra or config.training.lr_scheduler_type != default):
        from folora.training.trainer_check import check_trainer

        check_trainer(arguments, context.tokenizer, task.train, context.model_config)
    if needs_data and trains and config.training.eval_steps and not task.held_out:
        raise ConfigError(
            f"training.eval_steps is {config.training.eval_steps}, but no rows are held out of "
            f"{len(task.train)}: give at least 10 rows and data.eval_rows > 0, or eval_steps 0"
        )
    report(context.outline)


def check_in_memory(context: Context) -> Engine | None:
    """Checks before `prepare` measures anything, the cheap ones first. Raises FoLoraError.

    Returns:
        What generates the calibration set; None if it is read from a base file.
    """
    config, dataset = context.config, context.dataset
    if dataset is None:
        raise ConfigError("prepare needs a dataset: rows, a datasets.Dataset, a file or a Hub name")
    _check_method(config)
    if isinstance(dataset, str):
        check_dataset(dataset)
    if context.given is not None:
        _check_given(context, context.given)
    if config.base is None:
        _check_sources(context)  # before the model is loaded
    check_model(context.model)
    warn_if_slow(context.model.dtype, context.model.device)
    check_fits(context.task, context.tokenizer, context.start_id, **context.limits)
    _check_processes(context)
    _ = context.groups
    if config.base is None:
        return context.engine()  # fails early if the model cannot generate
    found = read_base_manifest(Path(config.base), context.facts)
    check_base_sources(found, config.sampling)
    warn_of_dtype(found, context.facts["dtype"])
    return None


def check_command(context: Context, store: Folder, command: str) -> None:
    """All other checks before a command's stages start.

    Samples fit the context; results of earlier stages exist and belong to this model; weights are
    finite; the adapter fits the layers; the model can generate. Raises FoLoraError.
    """
    config = context.config
    samples = Samples in WRITES.get(command, ()) and config.base is None
    if samples:
        _check_sampling(context, store)
    for stage in READS.get(command, ()):
        store.check_inputs(stage)
    for stage in WRITES.get(command, ()):
        store.check(stage)
    _ = context.groups  # the rank must fit the layers before hours of sampling
    if samples:
        _ = context.own_engine  # fails early if the model cannot generate
    if config.base is not None:
        found = read_base_manifest(Path(config.base), context.facts)
        warn_of_dtype(found, context.facts["dtype"])
    for stage in READS.get(command, ()):
        store.manifest(stage, context.facts)
    if command in ("measure", "train"):
        _check_settings(context, store)
    if command in ("solve", "train"):
        _check_base(context, store)
    if command == "train":
        _check_rows(context, store)
    distributed.check_same("model", context.facts)
    distributed.check_same("set of versions", software_versions())
    _check_processes(context)


def _check_processes(context: Context) -> None:
    """Refuse processes with different options or rows; each may name a device of its own. Raises MismatchError."""
    distributed.check_same("set of options", context.config.replace(device="auto"))
    if context.task_is_read:
        distributed.check_same("data set", context.task.fingerprint)


def _check_sources(context: Context) -> None:
    """Sources can be used, and all processes have the same. Raises FoLoraError."""
    facts = distributed.raise_together(lambda: context.mixture.facts)
    distributed.check_same("set of calibration sources", facts)


def _check_settings(context: Context, store: Folder) -> None:
    """Refuse samples of other options or files, such as if folora sample was interrupted. Raises MismatchError."""
    if context.config.base is not None:
        return  # compared with C_pre
    made, stage = store.manifest(Samples), Samples(context)
    same = all(made.get(name) == value for name, value in stage.request().items())
    if not same or made["asked"][:2] != stage.facts()["asked"][:2]:
        raise MismatchError(
            f"{store.folder / Samples.path} was made with other options of sampling, or other source files; "
            "run folora sample and the commands after it"
        )


def _check_base(context: Context, store: Folder) -> None:
    """Refuse a C_pre that was not made with the base file, or with one. Raises MismatchError."""
    base = context.config.base
    if not (store.folder / KeepMoments.path).exists():
        return
    now = None if base is None else read_base_manifest(Path(base), context.facts)["sha256"]
    if store.manifest(KeepMoments)["base"] != now:
        raise MismatchError(
            f"{store.folder / KeepMoments.path} was not made {f'from the present {base}' if base else 'without a base file'}; "
            "run folora sample and the commands after it"
        )


def _check_rows(context: Context, store: Folder) -> None:
    """Refuse to train on other rows than those that C_task was measured on. Raises ConfigError."""
    if not (store.folder / TaskMoments.path).exists():
        return
    if store.manifest(TaskMoments)["data"] != TaskMoments(context).facts()["data"]:
        raise ConfigError(
            "the rows differ from those that C_task was measured on (dataset, data or statistics.task_examples was "
            "changed, or the file); run folora measure and folora solve with them first"
        )


def check_is_no_model(folder: Path, name: str) -> None:
    """Refuse the model's folder as output folder. Raises ConfigError."""
    if os.path.isdir(name) and os.path.realpath(name) == os.path.realpath(folder):
        raise ConfigError(f"output {folder} is the folder of the model; choose another output")


def _check_method(config: FoLoraConfig) -> None:
    """Refuse a method that needs what only a comparison has. Raises ConfigError."""
    if config.method.adapter == "own":
        raise ConfigError(
            f"method {config.method.name} has an adapter that only the benchmarks have; choose one of folora's methods"
        )
    if config.method.replay_text == "real":
        raise ConfigError(
            f"method {config.method.name} replays real text, which only the benchmarks have; choose "
            "lora-replay, or method.replay_text 'generated'"
        )


def _check_sampling(context: Context, store: Folder) -> None:
    """Sources can be used, samples fit the context, and the generation server, if it is needed, responds."""
    sampling = context.config.sampling
    _check_sources(context)

    def reach_server() -> None:
        done = (store.folder / Samples.path).exists()
        if sampling.server and not (done and store.manifest(Samples).get("engine") == ENGINE):
            find_server(sampling.server, sampling, context.mixture.given)

    distributed.raise_together(reach_server)
    longest = context.limits["context"]
    asked = sampling.max_new_tokens
    if longest is not None and asked >= longest:  # the start token is one more
        raise ConfigError(
            f"sampling.max_new_tokens is {asked}, but the context of {context.name} is {longest} "
            f"tokens; it must be < {longest}"
        )


def _check_given(context: Context, model: PreTrainedModel) -> None:
    """Refuse loading options that a model in memory contradicts; warn of unused ones. Raises ConfigError."""
    if context.given_tokenizer is None:
        raise ConfigError("prepare needs the tokenizer of a model that is given in memory")
    check_model(model)  # before it is frozen
    config = context.config
    quantized = getattr(model, "quantization_method", None) is not None
    dtype = str(model.dtype).removeprefix("torch.")
    for name, asked, is_there in (
        ("device", config.device != "auto" and device_of(config).type, model.device.type),
        ("dtype", config.dtype != "auto" and not quantized and config.dtype, dtype),
        ("quantize", not quantized and config.quantize != "none" and config.quantize, "none"),
    ):
        if asked and asked != is_there:
            raise ConfigError(
                f"{name} is {asked!r}, but the model in memory has {is_there!r}; leave the option out, or "
                "give the model by name"
            )
    unused = sorted({"model", "output", "revision", "shard"} & {*config.differences()})
    if unused:
        logger.warning("prepare with a model in memory does not use %s", ", ".join(unused))
