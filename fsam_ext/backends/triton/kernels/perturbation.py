"""Pass B: the backup, the average and the perturbation."""

import triton
import triton.language as tl

from ... import ops
from .arithmetic import double, helper, is_finite, number
from .ascent import ascent_scalars, next_average, noise
from .averages import lanes_of, load_average, scale_address, store_average
from .base import others_wrote
from .memory import load, narrow, store, store_masked, store_where, widen
from .rows import address_in, chunk_of_program, is_whole
from .sums import sum_tile

EFFECT = tl.constexpr(ops.EFFECT)


@helper
def _seen(stored, T: tl.constexpr, FORWARD: tl.constexpr):
    """What a forward pass in bfloat16 (1) or float16 (2) sees of the weights; 0: as they are stored."""
    x = widen(stored, T)
    if FORWARD == 1:
        return widen(narrow(x, tl.bfloat16), tl.bfloat16)
    elif FORWARD == 2:
        return widen(narrow(x, tl.float16), tl.float16)
    else:
        return x


@helper
def _perturb_chunk(
    w, g, m, scales, b, k, effect, count, finite, step_length, scalars, ADAPTIVE: tl.constexpr,
    UPDATED: tl.constexpr, FEEDS: tl.constexpr, FORWARD: tl.constexpr, T: tl.constexpr,
    S: tl.constexpr, M: tl.constexpr, B: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    if effect is not None:
        effective_sq = tl.zeros_like(lanes_of(0, BLOCK, M)).to(S)
        effective_dot_intended = effective_sq
        intended_sq = effective_sq
    for start in range(0, count, BLOCK):
        lanes = lanes_of(start, BLOCK, M)
        if B == T:
            before = load(w, lanes, count, T, WHOLE)
            store(b, lanes, count, before, T, WHOLE)
            weight = widen(before, T)
        else:
            weight = load(b, lanes, count, B, WHOLE)
            written = load(w, lanes, count, T, WHOLE)
            others = others_wrote(weight, written, T)
            weight = tl.where(others, widen(written, T), weight)
            store_masked(others, b, lanes, count, weight, B, WHOLE)
            before = narrow(weight, T)
        gradient = widen(load(g, lanes, count, T, WHOLE), T) * scalars[0]
        ema = None
        if M is not None:
            ema = load_average(m, scales, start, lanes, count, M, BLOCK, WHOLE)
        d = noise(gradient, ema, scalars, UPDATED)
        if ADAPTIVE:
            intended = weight * weight * d * step_length
        else:
            intended = d * step_length
        after = narrow(weight + intended, T)
        store_where(finite, w, lanes, count, after, T, WHOLE)
        if FEEDS and M is not None:
            average = next_average(ema, gradient, scalars)
            store_average(finite, m, scales, start, lanes, count, average, M, BLOCK, WHOLE)
        if K is not None:
            store_where(finite, k, lanes, count, narrow(gradient, K), K, WHOLE)
        if effect is not None:
            effective = _seen(after, T, FORWARD) - _seen(before, T, FORWARD)
            effective_sq += effective * effective
            effective_dot_intended += effective * intended
            intended_sq += intended * intended
    if effect is not None:
        tl.store(effect, tl.where(finite, sum_tile(effective_sq), 0.0))
        tl.store(effect + 1, tl.where(finite, sum_tile(effective_dot_intended), 0.0))
        tl.store(effect + 2, tl.where(finite, sum_tile(intended_sq), 0.0))


@triton.jit(do_not_specialize=["numel", "offset"])
def perturb(
    weights, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    ema, ema_scale, backup, stats, grad_scale, rho_tensor,
    rho: tl.float64, sigma: tl.float64, lmbda: tl.float64, eps: tl.float64, effect, kept,
    ADAPTIVE: tl.constexpr, UPDATED: tl.constexpr, FEEDS: tl.constexpr, FORWARD: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, M: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass B: backup = w; m = lmbda m + (1 - lmbda) g; w = w + rho d / (norm + eps).

    Adaptive: w = w + rho |w|^2 d / (norm + eps). Where the norm is not finite w and m keep their
    bits, and so does `kept`, which gets g else. Masters adopt w first and are read in its place.
    Li et al., CVPR 2024 (arXiv 2403.12350), Algorithm 1, and its official code; adaptive: Kwon et
    al., ICML 2021 (arXiv 2102.11600).
    """
    row, w, g, at, count = chunk_of_program(weights, grads, numel, offset, table, rows_of_chunks, T)
    m = address_in(ema, at, g)
    scales = scale_address(ema_scale, at, g)
    b = address_in(backup, at, w)
    k = address_in(kept, at, g)
    scalars = ascent_scalars(grad_scale, sigma, lmbda, S)
    noise_sq = tl.load(stats)
    finite = is_finite(noise_sq)
    length = number(rho_tensor, rho) / (tl.sqrt(noise_sq) + double(eps))
    length = tl.where(noise_sq > 0, length, 0.0).to(S)
    sums = None
    if effect is not None:
        sums = effect + tl.program_id(0).to(tl.int64) * EFFECT
    if is_whole(w | g | k | m | b, count):
        _perturb_chunk(
            w, g, m, scales, b, k, sums, count, finite, length, scalars, ADAPTIVE, UPDATED, FEEDS,
            FORWARD, T, S, M, B, K, BLOCK, True,
        )  # fmt: skip
    else:
        _perturb_chunk(
            w, g, m, scales, b, k, sums, count, finite, length, scalars, ADAPTIVE, UPDATED, FEEDS,
            FORWARD, T, S, M, B, K, BLOCK, False,
        )  # fmt: skip
