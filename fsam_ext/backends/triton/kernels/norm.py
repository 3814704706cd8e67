"""Pass A: the squared norm of the noise and the other sums."""

import triton
import triton.language as tl

from ... import ops
from .arithmetic import helper, is_finite
from .ascent import ascent_scalars, noise
from .averages import known, lanes_of, load_average, scale_address
from .memory import load, widen
from .rows import CHUNK, address_in, chunk_of_program, is_whole
from .sums import sum_tile

STATISTICS = tl.constexpr(ops.STATISTICS)


@helper
def _sum_chunk(
    slot, w, g, m, scales, count, scalars, ADAPTIVE: tl.constexpr, UPDATED: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, M: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    lanes = lanes_of(0, CHUNK, M)
    gradient = widen(load(g, lanes, count, T, WHOLE), T) * scalars[0]
    ema = None
    if M is not None:
        ema = load_average(m, scales, 0, lanes, count, M, CHUNK, WHOLE)
    d = noise(gradient, ema, scalars, UPDATED)
    if ADAPTIVE:
        d = widen(load(w, lanes, count, T, WHOLE), T) * d
    tl.store(slot, sum_tile(d * d))
    tl.store(slot + 1, sum_tile(gradient * gradient))
    if M is None:
        tl.store(slot + 2, 0.0)
        tl.store(slot + 3, 0.0)
    else:
        seen = known(ema)
        tl.store(slot + 2, sum_tile(gradient * seen))
        tl.store(slot + 3, sum_tile(seen * seen))
    tl.store(slot + 4, sum_tile(tl.where(is_finite(gradient), 0.0, 1.0).to(S)))


@triton.jit(do_not_specialize=["numel", "offset"])
def noise_norm(
    weights, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    ema, ema_scale, grad_scale, sigma: tl.float64, lmbda: tl.float64, partials,
    ADAPTIVE: tl.constexpr, UPDATED: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Pass A, stage 1: a chunk's sums of d^2, g^2, g m, m^2, non-finite g, into a slot of its own.

    d = g - sigma m, adaptive |w| d: Li et al., CVPR 2024 (arXiv 2403.12350), and its official code.
    """
    row, w, g, at, count = chunk_of_program(weights, grads, numel, offset, table, rows_of_chunks, T)
    m = address_in(ema, at, g)
    scales = scale_address(ema_scale, at, g)
    scalars = ascent_scalars(grad_scale, sigma, lmbda, S)
    slot = partials + tl.program_id(0).to(tl.int64) * STATISTICS
    addresses = g | m
    if ADAPTIVE:
        addresses = addresses | w
    if is_whole(addresses, count):
        _sum_chunk(slot, w, g, m, scales, count, scalars, ADAPTIVE, UPDATED, T, S, M, True)
    else:
        _sum_chunk(slot, w, g, m, scales, count, scalars, ADAPTIVE, UPDATED, T, S, M, False)
