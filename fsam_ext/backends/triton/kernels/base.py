"""Where updates and the ascent take weights from, and how updated weights are stored."""

import triton.language as tl

from .arithmetic import helper
from .memory import load, narrow, store, store_where, widen
from .rounding import narrow_stochastically, random_bits


@helper
def as_weight(stored, T: tl.constexpr, B: tl.constexpr):
    """The weight in the dtype of the parameters: a copy as it is, a master rounded."""
    if B == T:
        return stored
    else:
        return narrow(stored, T)


# NOTE [masters adopt]
# A weight that is not the rounded copy of its master was written by others, through p.data perhaps, which no counter
# tells. Where weights are known not to be perturbed, such a weight becomes the master. NaN is the copy of NaN.


@helper
def others_wrote(master, written, T: tl.constexpr):
    """Where the weights as they are `written` in memory are not their masters' copies."""
    copy = widen(narrow(master, T), T)
    weight = widen(written, T)
    return (copy != weight) & ((copy == copy) | (weight == weight))


@helper
def load_source(
    w, b, lanes, count, T: tl.constexpr, B: tl.constexpr, ADOPTS: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """What an update starts from, as B is stored, and the weights as they are, where they are looked at."""
    stored = load(b, lanes, count, B, WHOLE)
    if ADOPTS:
        kept = load(w, lanes, count, T, WHOLE)
        stored = tl.where(others_wrote(stored, kept, T), widen(kept, T), stored)
        return stored, kept
    else:
        return stored, stored


@helper
def store_weights(
    applies, w, b, at, lanes, count, stored, kept, new, key, T: tl.constexpr, B: tl.constexpr,
    ADOPTS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The updated weights where the update `applies`, else those that `load_source` gave, as they were or restored."""
    if key is not None:
        low = narrow_stochastically(new, random_bits(at + lanes, key), T)
    else:
        low = narrow(new, T)
    if ADOPTS:
        store(b, lanes, count, tl.where(applies, new, stored), B, WHOLE)
    elif B != T:
        store_where(applies, b, lanes, count, new, B, WHOLE)
    if not ADOPTS:
        kept = as_weight(stored, T, B)
    store(w, lanes, count, tl.where(applies, low, kept), T, WHOLE)
