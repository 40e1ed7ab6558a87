"""`torch.testing.assert_close` with a tolerance that follows dtype and scale.

Another CPU, or another number of threads, adds up in another order. A sum is then off by roundings
of its terms, not of itself: an element near zero may be off as far as the largest beside it.
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
        found, expected: Of one shape; dtypes may differ.
        roundings: How many. 100 suit a product or a small model; longer computations have more.
        rtol: Allowed on top, relative to each element.
        dtype: In which it was computed; by default the less precise of the two.
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
