"""Refuse gradients that are not finite before the optimizer uses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

from torch import nn

from folora.errors import NumericsError
from folora.runtime import distributed
from folora.runtime.finiteness import first_non_finite_module, non_finite_gradients


def check_gradients(
    model: nn.Module,
    inputs: Mapping[str, Any],
    precision: Callable[[], AbstractContextManager[Any]],
    *,
    step: int,
    learning_rate: float,
    sharded: bool,
) -> None:
    """Raise NumericsError, in all processes, if a gradient is not finite.

    Args:
        model: After the backward pass.
        inputs: Of its last forward pass, which is repeated to find the module that overflows.
        precision: Makes the context of that pass.
        step: Number of the step, for the message.
        learning_rate: For the message.
        sharded: Whether each process has its own part of the gradients.
    """
    names = non_finite_gradients(model)
    if sharded:
        found = distributed.all_reduce_max(len(names))
        names = sorted({*chain(*distributed.all_gather(names))}) if found else []
    if not names:
        return
    with precision():
        where = first_non_finite_module(model, inputs)
    raise NumericsError(
        f"step {step}: {len(names)} gradients are not finite, such as {names[0]}'s; {where}. The optimizer was "
        "not updated, and checkpoints are valid. Inspect the rows of this step; or, if the model overflows, lower "
        f"training.learning_rate (now {learning_rate:g}), or train in bf16 or fp32."
    )
