"""The optimizer's hyperparameters, from a config or from a Trainer's arguments."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainingArguments

from folora.config import TrainingConfig
from folora.errors import ConfigError
from folora.optim.sadam import SAdam

logger = logging.getLogger(__name__)

OPTIMIZER_FIELDS = ("optim", "optim_args", "optim_target_modules")


def adam_options(training: TrainingConfig) -> dict[str, Any]:
    """The betas and epsilon of `SAdam`."""
    return {"betas": (training.adam_beta1, training.adam_beta2), "eps": training.adam_epsilon}


def follow_arguments(optimizer: SAdam, args: TrainingArguments, training: TrainingConfig) -> None:
    """Set the optimizer's learning rate, weight decay, betas and epsilon to a Trainer's; log what changes.

    Args:
        optimizer: From `optimizer`.
        args: The Trainer's.
        training: The section that the optimizer was prepared with.
    """
    wanted = {
        "learning_rate": (args.learning_rate, training.learning_rate),
        "weight_decay": (args.weight_decay, training.weight_decay),
        "betas": ((args.adam_beta1, args.adam_beta2), adam_options(training)["betas"]),
        "epsilon": (args.adam_epsilon, adam_options(training)["eps"]),
    }
    for name, (given, prepared) in wanted.items():
        if given != prepared:
            logger.warning("%s: the Trainer's %s replaces the prepared %s", name, given, prepared)
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)  # of an earlier schedule
        group |= {
            "lr": args.learning_rate,
            "weight_decay": args.weight_decay,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }


def check_optimizer(args: TrainingArguments) -> None:
    """Refuse Trainer arguments that select another optimizer. Raises ConfigError."""
    defaults = type(args).__dataclass_fields__
    for name in OPTIMIZER_FIELDS:
        given = getattr(args, name, None)
        if given not in (None, defaults[name].default):
            raise ConfigError(
                f"{name} is {given!r}, but this Trainer uses the prepared optimizer; leave it out, or "
                "prepare with method 'lora' for plain LoRA"
            )
