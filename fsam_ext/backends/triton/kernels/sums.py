"""Sums over all rows, in two stages: each chunk leaves its own in a slot, and the slots are added in fp64."""

import triton
import triton.language as tl

from .arithmetic import helper


@helper
def sum_tile(x):
    """Of a tile of one dimension or two."""
    if len(x.shape) == 2:
        return tl.sum(tl.sum(x, 1), 0)
    else:
        return tl.sum(x, 0)


@triton.jit(do_not_specialize=["chunks"])
def sum_partials(partials, chunks: tl.int64, sums, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Stage 2: program k adds the k-th of the WIDTH values of all chunks in fp64, in a fixed order."""
    k = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, chunks, BLOCK):
        chunk = start + lanes
        partial = tl.load(partials + chunk * WIDTH + k, mask=chunk < chunks, other=0.0)
        total += partial.to(tl.float64)
    tl.store(sums + k, tl.sum(total, 0))
