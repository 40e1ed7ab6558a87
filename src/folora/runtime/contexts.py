"""Context managers that change a model's state temporarily: evaluation mode, base model, whole weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; every module's mode is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the weights over processes, so that all must run the model together."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def gathered(model: nn.Module, name: str) -> Iterator[None]:
    """Unshard a layer's weights while the block runs; all processes must enter it."""
    path = name.split(".")
    holders = (model.get_submodule(".".join(path[:n])) for n in range(len(path), -1, -1))
    holder = next((module for module in holders if isinstance(module, FSDPModule)), None)
    if holder is None:
        yield
        return
    holder.unshard()
    try:
        yield
    finally:
        holder.reshard()


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """Disable the adapter while the block runs.

    PEFT's `disable_adapter` makes frozen weights of the adapter trainable; this one restores
    ``requires_grad``.
    """
    with keeping_requires_grad(model), model.disable_adapter():
        yield


@contextmanager
def keeping_requires_grad(model: nn.Module) -> Iterator[None]:
    """Restore every parameter's ``requires_grad`` at exit."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for p, requires_grad in trained:
            p.requires_grad_(requires_grad)
