"""`torch.testing.assert_close` with a tolerance that follows dtype and scale.

The order of summation depends on the CPU and the number of threads. The rounding error of a sum scales with
its terms, not with its value: an element near zero may have the error of the largest element.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_near(
    found: Tensor,
    expected: Tensor,
    *,
    roundings: float = 100,
    rtol: float = 0.0,
    dtype: torch.dtype | None = None,
) -> None:
    """Every element is within `roundings` units in the last place of the largest expected one.

    Args:
        found, expected: Tensors of the same shape; dtypes may differ.
        roundings: 100 suit a product or a small model; longer computations need more.
        rtol: Additional tolerance, relative to each element.
        dtype: Dtype of the computation; by default the less precise of the two.
    """
    expected = expected.detach()
    given = dtype or max(found.dtype, expected.dtype, key=lambda d: torch.finfo(d).eps)
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        found,
        expected,
        rtol=rtol,
        atol=roundings * torch.finfo(given).eps * largest,
        check_dtype=False,
    )
