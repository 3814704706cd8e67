"""Pass C without a base."""

import triton
import triton.language as tl

from .arithmetic import helper
from .base import as_weight
from .memory import load, store
from .rows import address_in, chunk_of_program, is_whole


@helper
def _copy_chunk(
    w, b, count, T: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    for start in range(0, count, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        store(w, lanes, count, as_weight(load(b, lanes, count, B, WHOLE), T, B), T, WHOLE)


@triton.jit(do_not_specialize=["numel", "offset"])
def restore(
    weights, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    backup, T: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass C without a base: w = backup, bit for bit, or the rounded masters."""
    row, w, g, at, count = chunk_of_program(weights, grads, numel, offset, table, rows_of_chunks, T)
    b = address_in(backup, at, w)
    if is_whole(w | b, count):
        _copy_chunk(w, b, count, T, B, BLOCK, True)
    else:
        _copy_chunk(w, b, count, T, B, BLOCK, False)
