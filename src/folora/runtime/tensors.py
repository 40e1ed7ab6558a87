"""Tensors across precisions and processes: full fp32 products, local parts, gathered wholes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@contextmanager
def full_fp32_matmul() -> Iterator[None]:
    """Run fp32 matrix products in full fp32, whatever TF32 or bf16 switch the user has set."""
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
    """The part of a tensor that this process has; all of it, unless it is shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from all processes if it is shared out."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
