"""What the base updates share: how the updated weights are stored."""

import triton.language as tl

from .arithmetic import helper
from .memory import narrow, store, store_where
from .rounding import narrow_stochastically, random_bits


@helper
def as_weight(stored, T: tl.constexpr, B: tl.constexpr):
    """The weight in the dtype of the parameters: a copy as it is, a master rounded."""
    if B == T:
        return stored
    else:
        return narrow(stored, T)


@helper
def store_weights(
    applies, w, b, at, lanes, count, stored, new, key, T: tl.constexpr, B: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The updated weights where the update `applies`, else those that were `stored`."""
    if key is not None:
        low = narrow_stochastically(new, random_bits(at + lanes, key), T)
    else:
        low = narrow(new, T)
    if B != T:
        store_where(applies, b, lanes, count, new, B, WHOLE)
    store(w, lanes, count, tl.where(applies, low, as_weight(stored, T, B)), T, WHOLE)
