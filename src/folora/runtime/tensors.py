"""Full-precision fp32 products, and local and full tensors of FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@contextmanager
def full_fp32_matmul() -> Iterator[None]:
    """Run fp32 matrix products in full fp32, whatever TF32 or bf16 setting is active."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def to_local(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor, gathered from all processes; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
