"""TRL's arguments from the section `training` of a config, checked before anything long starts."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from folora.config import FoLoraConfig, TrainingConfig
from folora.errors import ConfigError, nearest
from folora.runtime import distributed
from folora.runtime.compat import trainer_options
from folora.runtime.extras import needed_by
from folora.training.sft_options import refusal

with needed_by("training", "trl"):
    from trl.trainer.sft_config import SFTConfig

FLAT = (
    "{}, but folora's optimizer needs whole rows of the adapter's matrices. Use FSDP2 (accelerate launch "
    "--use_fsdp --fsdp_version 2), which keeps them, or neither: torchrun, or accelerate launch --multi_gpu. "
    "The base is frozen, so its weights need no optimizer state."
)


def sft_config(
    config: FoLoraConfig, output_dir: str | Path, *, evaluates: bool, on_cpu: bool
) -> SFTConfig:
    """TRL's arguments for a config: its section ``training``, and what other options say of training.

    Args:
        config: The whole config.
        output_dir: For checkpoints.
        evaluates: Whether there are held-out rows, so that the meter can run along.
        on_cpu: Train on the CPU even if there is an accelerator.

    Raises:
        ConfigError: ``training`` names something that SFTConfig does not have or an option of folora
            sets, or a value that SFTConfig refuses.
    """
    training = config.training
    extra = training.model_extra or {}
    _check_extra(extra)
    _refuse_deepspeed(extra.get("deepspeed"))  # before its package is looked for
    values: dict[str, Any] = {
        "max_length": None,  # rows are cut already
        "report_to": "none",
        "disable_tqdm": True,  # `training_progress` shows a bar
        "dataloader_pin_memory": not on_cpu,
        **training.model_dump(exclude={"gradient_checkpointing", "eval_steps"}),
        "activation_checkpointing": training.gradient_checkpointing,  # as transformers 5.23 calls it
        "seed": config.training_seed,
        "output_dir": str(output_dir),
        "use_cpu": on_cpu,
    }
    if training.eval_steps and evaluates:
        values |= {"eval_strategy": "steps", "eval_steps": training.eval_steps}
    try:
        found = SFTConfig(**trainer_options(values, get_type_hints(SFTConfig)))
    except Exception as error:  # also of packages that an option asks for
        raise ConfigError(f"training: {error}") from error
    _check_length(found)
    check_sharding(found)
    if extra.get("fsdp") and distributed.world_size() == 1:
        raise ConfigError(
            "training.fsdp needs several processes, which torchrun or accelerate launch starts"
        )
    return found


def _check_length(args: SFTConfig) -> None:
    length = args.max_length
    if length is None:
        if args.packing:
            raise ConfigError(
                "training.packing needs training.max_length, the tokens of a packed row"
            )
    elif not args.packing:
        raise ConfigError("training.max_length is for packing; rows are cut by data.max_length")
    elif length < 2:
        raise ConfigError(f"training.max_length is {length}, but must be >= 2")


def check_sharding(args: SFTConfig) -> None:
    """Refuse what makes flat vectors of parameters, in which rows are lost. Raises ConfigError."""
    _refuse_deepspeed(args.deepspeed)
    if not distributed.asks_for_fsdp(args.fsdp):
        return
    given = args.fsdp_plugin_args or {}
    if int(given.get("fsdp_version", os.environ.get("FSDP_VERSION", "1"))) != 2:
        raise ConfigError(FLAT.format("FSDP 1 makes flat vectors of the parameters"))
    if given.get("activation_checkpointing") or distributed.is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ConfigError(
            "FSDP's own activation checkpointing renames the layers, so that the adapter's are not found. "
            "Give --training.gradient_checkpointing true instead."
        )


def _refuse_deepspeed(given: Any) -> None:
    if given or distributed.is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            FLAT.format("DeepSpeed makes flat vectors of the parameters, at ZeRO-1 already")
        )


def _check_extra(extra: dict[str, Any]) -> None:
    """What a dataclass does not look at: names and types, before hours of sampling."""
    types = get_type_hints(SFTConfig)
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    for name, value in extra.items():
        if name not in known:
            near = nearest(name, {*known, *TrainingConfig.model_fields})
            raise ConfigError(f"training: trl.SFTConfig has no option {name!r}{near}")
        if (reason := refusal(name, value)) is not None:
            raise ConfigError(reason)
        try:
            TypeAdapter(types[name]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ConfigError(f"training.{name} is {value!r}: {reason}") from error
