"""The average without an ascent, and the gradient's squared norm in the same pass."""

import triton
import triton.language as tl

from .arithmetic import applies_to_step, helper, is_finite
from .ascent import ascent_scalars, next_average
from .averages import lanes_of, load_average, scale_address, store_average
from .memory import load, widen
from .rows import address_in, chunk_of_program, is_whole
from .sums import sum_tile


@helper
def _feed_chunk(
    g, m, scales, slot, count, applies, scalars, T: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    if slot is not None:
        grad_sq = tl.zeros_like(lanes_of(0, BLOCK, M)).to(S)
    for start in range(0, count, BLOCK):
        lanes = lanes_of(start, BLOCK, M)
        gradient = widen(load(g, lanes, count, T, WHOLE), T) * scalars[0]
        ema = load_average(m, scales, start, lanes, count, M, BLOCK, WHOLE)
        average = tl.where(is_finite(gradient), next_average(ema, gradient, scalars), ema)
        store_average(applies, m, scales, start, lanes, count, average, M, BLOCK, WHOLE)
        if slot is not None:
            grad_sq += gradient * gradient
    if slot is not None:
        tl.store(slot, sum_tile(grad_sq))


@triton.jit(do_not_specialize=["numel", "offset"])
def update_ema(
    weights, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    ema, ema_scale, stats, grad_scale, found_inf, lmbda: tl.float64, partials,
    T: tl.constexpr, S: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The average without an ascent: m = lmbda m + (1 - lmbda) g where g is finite. Each chunk's sum of g^2."""
    row, w, g, at, count = chunk_of_program(weights, grads, numel, offset, table, rows_of_chunks, T)
    m = address_in(ema, at, g)
    scales = scale_address(ema_scale, at, g)
    applies = applies_to_step(stats, found_inf)
    scalars = ascent_scalars(grad_scale, 0.0, lmbda, S)
    slot = None
    if partials is not None:
        slot = partials + tl.program_id(0).to(tl.int64)
    if is_whole(g | m, count):
        _feed_chunk(g, m, scales, slot, count, applies, scalars, T, S, M, BLOCK, True)
    else:
        _feed_chunk(g, m, scales, slot, count, applies, scalars, T, S, M, BLOCK, False)
