"""Shapes and dtypes in annotations: ``Float[Tensor, "d_in r"]``.

mypy, readers and the tests read them, and the tests alone need jaxtyping; without it they are what
they are to mypy: annotated tensors.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING or find_spec("jaxtyping"):
    from jaxtyping import Float, Float64, Int
else:
    Float = Float64 = Int = Annotated

__all__ = ["Float", "Float64", "Int"]
