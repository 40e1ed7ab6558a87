"""Evaluation mode, or the base model alone, for a while; afterwards everything is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode while the block runs, whatever happens in it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """The base model while the block runs.

    PEFT's own context leaves every weight of the adapter trainable, also those that were frozen.
    """
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for p, requires_grad in trained:
            p.requires_grad_(requires_grad)
