"""Pass C with Adam or AdamW."""

import triton
import triton.language as tl

from .arithmetic import applies_to_step, divide, double, helper, number, square_root
from .base import load_source, store_weights
from .memory import load, store_where, widen
from .reused import reuse_length, with_reused
from .rounding import rounding_key
from .rows import address_in, chunk_of_program, is_whole


@helper
def _adam_chunk(
    w, g, b, m, v, r, at, count, applies, scalars, step_size, sqrt_second, length, key,
    DECAY: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, T: tl.constexpr,
    S: tl.constexpr, B: tl.constexpr, K: tl.constexpr, ADOPTS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    inverse_scale, weight_decay, keep, one_minus_beta1, beta2, one_minus_beta2, eps = scalars
    for start in range(0, count, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        stored, kept = load_source(w, b, lanes, count, T, B, ADOPTS, WHOLE)
        weight = widen(stored, B)
        gradient = widen(load(g, lanes, count, T, WHOLE), T) * inverse_scale
        gradient = with_reused(gradient, r, length, lanes, count, K, WHOLE)
        if MAXIMIZE:
            gradient = -gradient
        if DECOUPLED:
            weight = weight * keep
        elif DECAY:
            gradient = gradient + weight_decay * weight
        first = load(m, lanes, count, S, WHOLE)
        second = load(v, lanes, count, S, WHOLE)
        new_first = first + one_minus_beta1 * (gradient - first)
        new_second = beta2 * second + one_minus_beta2 * (gradient * gradient)
        denominator = divide(square_root(new_second), sqrt_second) + eps
        new = weight - step_size * divide(new_first, denominator)
        store_where(applies, m, lanes, count, new_first, S, WHOLE)
        store_where(applies, v, lanes, count, new_second, S, WHOLE)
        store_weights(
            applies, w, b, at, lanes, count, stored, kept, new, key, T, B, ADOPTS, WHOLE
        )  # fmt: skip


@triton.jit(do_not_specialize=["numel", "offset"])
def restore_adam(
    weights, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    backup, exp_avg, exp_avg_sq, corrections, stats, grad_scale, found_inf, lr_tensor,
    lr: tl.float64, beta1: tl.float64, beta2: tl.float64, eps: tl.float64,
    weight_decay: tl.float64, rounding,
    reused, reuse_sq, reuse: tl.float64, reuse_eps: tl.float64,
    DECAY: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, B: tl.constexpr, K: tl.constexpr, ADOPTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass C with Adam: w = backup - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps).

    m = m + (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g^2; decoupled: w (1 - lr decay) first.
    Source: torch.optim.Adam and AdamW. Without a backup it starts from w; where it does not apply
    it only restores. Masters are updated, and w is their rounded copy; where they adopt, w counts
    first. With `reused`, g = g + length reused before anything else (reused.py).
    """
    row, w, g, at, count = chunk_of_program(weights, grads, numel, offset, table, rows_of_chunks, T)
    b = address_in(backup, at, w)
    m = address_in(exp_avg, at, w)
    v = address_in(exp_avg_sq, at, w)
    r = address_in(reused, at, w)
    applies = applies_to_step(stats, found_inf)
    rate = number(lr_tensor, lr)
    decay = double(weight_decay)
    scalars = (
        (1.0 / number(grad_scale, 1.0)).to(S),
        decay.to(S),
        (1.0 - rate * decay).to(S),
        (1.0 - double(beta1)).to(S),
        double(beta2).to(S),
        (1.0 - double(beta2)).to(S),
        double(eps).to(S),
    )
    step_size = tl.load(corrections + row * 2)
    sqrt_second = tl.load(corrections + row * 2 + 1)
    length = None
    if reused is not None:
        length = reuse_length(reuse_sq, reuse, reuse_eps, S)
    key = None
    if rounding is not None:
        key = rounding_key(rounding)
    if is_whole(w | r | g | b | m | v, count):
        _adam_chunk(
            w, g, b, m, v, r, at, count, applies, scalars, step_size, sqrt_second, length, key,
            DECAY, DECOUPLED, MAXIMIZE, T, S, B, K, ADOPTS, BLOCK, True,
        )  # fmt: skip
    else:
        _adam_chunk(
            w, g, b, m, v, r, at, count, applies, scalars, step_size, sqrt_second, length, key,
            DECAY, DECOUPLED, MAXIMIZE, T, S, B, K, ADOPTS, BLOCK, False,
        )  # fmt: skip
