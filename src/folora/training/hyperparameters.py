"""The numbers that the optimizer steps by, from a config or from a Trainer's own arguments."""

from __future__ import annotations

import logging
import math
from typing import Any

from transformers import TrainingArguments

from folora.config import TrainingConfig
from folora.errors import ConfigError
from folora.optim.sadam import SAdam
from folora.training.optimizer import BETAS, EPSILON

logger = logging.getLogger(__name__)

OWN_OPTIMIZER = ("optim", "optim_args", "optim_target_modules")


def adam_options(training: TrainingConfig) -> dict[str, Any]:
    """The betas and epsilon of `SAdam` by ``training.extra``; they are AdamW's by default.

    Raises:
        ConfigError: One is outside of its interval.
    """
    given = training.extra
    names = ("adam_beta1", "adam_beta2", "adam_epsilon")
    beta1, beta2, eps = (
        given.get(name, default) for name, default in zip(names, (*BETAS, EPSILON), strict=True)
    )
    for name, beta in zip(names, (beta1, beta2), strict=False):
        if not 0 <= beta < 1:
            raise ConfigError(f"training.extra: {name} is {beta!r}, but must lie in [0, 1)")
    if not 0 <= eps < math.inf:
        raise ConfigError(f"training.extra: adam_epsilon is {eps!r}, but must be finite and >= 0")
    return {"betas": (beta1, beta2), "eps": eps}


def follow_arguments(optimizer: SAdam, args: TrainingArguments, training: TrainingConfig) -> None:
    """Step by a Trainer's learning rate, decay, betas and epsilon, and say which of them are others.

    Args:
        optimizer: From `optimizer`; its last group is that of all B.
        args: The Trainer's; B keeps its ratio to A.
        training: What the optimizer was prepared with.
    """
    wanted = {
        "learning_rate": (args.learning_rate, training.learning_rate),
        "weight_decay": (args.weight_decay, training.weight_decay),
        "betas": ((args.adam_beta1, args.adam_beta2), adam_options(training)["betas"]),
        "epsilon": (args.adam_epsilon, adam_options(training)["eps"]),
    }
    for name, (given, prepared) in wanted.items():
        if given != prepared:
            logger.warning(
                "%s is %s by the Trainer's arguments, not %s as prepared", name, given, prepared
            )
    for group in optimizer.param_groups:
        ratio = training.lr_b_ratio if group is optimizer.param_groups[-1] else 1.0
        group.pop("initial_lr", None)  # of an earlier schedule
        group |= {
            "lr": args.learning_rate * ratio,
            "weight_decay": args.weight_decay,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }


def check_optimizer(args: TrainingArguments) -> None:
    """Refuse arguments of a Trainer that name another optimizer. Raises ConfigError."""
    defaults = type(args).__dataclass_fields__
    for name in OWN_OPTIMIZER:
        given = getattr(args, name, None)
        if given not in (None, defaults[name].default):
            raise ConfigError(
                f"{name} is {given!r}, but this Trainer steps by the prepared optimizer; leave it out, or "
                "prepare with training.optimizer 'adamw' for plain LoRA"
            )
