"""Shapes and dtypes in annotations: ``Float[Tensor, "d_in r"]``.

They are checked by the tests, which need jaxtyping. Without it they are plain annotations.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING or find_spec("jaxtyping"):
    from jaxtyping import Float, Float64, Int
else:
    Float = Float64 = Int = Annotated

__all__ = ["Float", "Float64", "Int"]
