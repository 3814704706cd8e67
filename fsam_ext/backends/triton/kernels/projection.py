"""From the kept first gradient to the direction that is reused: NOTE [reuse of the second gradient] in formulas.h."""

import triton
import triton.language as tl

from .arithmetic import applies_to_step, helper, is_finite, number
from .memory import load, narrow, store_where, widen
from .rows import CHUNK, address_in, chunk_of_program, is_whole
from .sums import sum_tile

DOTS = tl.constexpr(2)


@helper
def _dot_chunk(
    slot, g, k, count, inverse_scale, T: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    lanes = tl.arange(0, CHUNK)
    gradient = widen(load(g, lanes, count, T, WHOLE), T) * inverse_scale
    first = widen(load(k, lanes, count, K, WHOLE), K)
    tl.store(slot, sum_tile(gradient * first))
    tl.store(slot + 1, sum_tile(first * first))


@triton.jit(do_not_specialize=["numel", "offset"])
def dots(
    weights, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    kept, grad_scale, partials, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A chunk's sums of g k and k^2, into a slot of its own."""
    row, w, g, at, count = chunk_of_program(weights, grads, numel, offset, table, rows_of_chunks, T)
    k = address_in(kept, at, g)
    inverse_scale = (1.0 / number(grad_scale, 1.0)).to(S)
    slot = partials + tl.program_id(0).to(tl.int64) * DOTS
    if is_whole(g | k, count):
        _dot_chunk(slot, g, k, count, inverse_scale, T, K, True)
    else:
        _dot_chunk(slot, g, k, count, inverse_scale, T, K, False)


@helper
def _project_chunk(
    g, k, count, inverse_scale, part, applies, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    kept_sq = tl.zeros((BLOCK,), S)
    for start in range(0, count, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        gradient = widen(load(g, lanes, count, T, WHOLE), T) * inverse_scale
        first = widen(load(k, lanes, count, K, WHOLE), K)
        stored = narrow(gradient - part * first, K)
        store_where(applies, k, lanes, count, stored, K, WHOLE)
        direction = widen(stored, K)
        kept_sq += direction * direction
    return sum_tile(kept_sq)


@triton.jit(do_not_specialize=["numel", "offset"])
def project(
    weights, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    kept, sums, stats, grad_scale, found_inf, partials,
    T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """k = g - (<g, k> / <k, k>) k, and a chunk's sum of k^2 into its slot: NaN after no ascent, 0 where there is no k.

    Liu et al., CVPR 2022 (LookSAM): the part of the second gradient that is orthogonal to the first.
    """
    row, w, g, at, count = chunk_of_program(weights, grads, numel, offset, table, rows_of_chunks, T)
    k = address_in(kept, at, g)
    inverse_scale = (1.0 / number(grad_scale, 1.0)).to(S)
    dot = tl.load(sums)
    first_sq = tl.load(sums + 1)
    part = tl.where(first_sq > 0, dot / first_sq, 0.0).to(S)
    applies = applies_to_step(stats, found_inf) & is_finite(dot) & is_finite(first_sq)
    if is_whole(g | k, count):
        kept_sq = _project_chunk(g, k, count, inverse_scale, part, applies, T, S, K, BLOCK, True)
    else:
        kept_sq = _project_chunk(g, k, count, inverse_scale, part, applies, T, S, K, BLOCK, False)
    nothing = (number(stats, 0.0) * 0.0).to(S)  # NaN where the norm is not finite
    tl.store(partials + tl.program_id(0).to(tl.int64), tl.where(applies, kept_sq, nothing))
