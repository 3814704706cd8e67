"""Pass C with SGD."""

import triton
import triton.language as tl

from .arithmetic import applies_to_step, double, helper, number
from .base import load_source, store_weights
from .memory import load, store_where, widen
from .reused import reuse_length, with_reused
from .rounding import rounding_key
from .rows import address_in, chunk_of_program, is_whole


@helper
def _sgd_chunk(
    w, g, b, m, r, at, count, applies, scalars, length, key, MOMENTUM: tl.constexpr,
    DECAY: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, T: tl.constexpr,
    S: tl.constexpr, B: tl.constexpr, K: tl.constexpr, ADOPTS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    inverse_scale, lr, momentum, one_minus_dampening, weight_decay = scalars
    for start in range(0, count, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        stored, kept = load_source(w, b, lanes, count, T, B, ADOPTS, WHOLE)
        weight = widen(stored, B)
        gradient = widen(load(g, lanes, count, T, WHOLE), T) * inverse_scale
        gradient = with_reused(gradient, r, length, lanes, count, K, WHOLE)
        if MAXIMIZE:
            gradient = -gradient
        if DECAY:
            gradient = gradient + weight_decay * weight
        if MOMENTUM:
            buffer = load(m, lanes, count, S, WHOLE)
            updated = momentum * buffer + one_minus_dampening * gradient
            updated = tl.where(buffer != buffer, gradient, updated)
            store_where(applies, m, lanes, count, updated, S, WHOLE)
            if NESTEROV:
                gradient = gradient + momentum * updated
            else:
                gradient = updated
        new = weight - lr * gradient
        store_weights(
            applies, w, b, at, lanes, count, stored, kept, new, key, T, B, ADOPTS, WHOLE
        )  # fmt: skip


@triton.jit(do_not_specialize=["numel", "offset"])
def restore_sgd(
    weights, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    backup, momentum_buffer, stats, grad_scale, found_inf, lr_tensor,
    lr: tl.float64, momentum: tl.float64, dampening: tl.float64, weight_decay: tl.float64, rounding,
    reused, reuse_sq, reuse: tl.float64, reuse_eps: tl.float64,
    DECAY: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, B: tl.constexpr, K: tl.constexpr, ADOPTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass C with SGD: w = backup; g = g + decay w; v = momentum v + (1 - dampening) g; w -= lr v.

    Source: torch.optim.SGD. Without a backup it starts from w; where it does not apply it only
    restores. Masters are updated, and w is their rounded copy; where they adopt, w counts first.
    With `reused`, g = g + length reused before anything else (reused.py).
    """
    row, w, g, at, count = chunk_of_program(weights, grads, numel, offset, table, rows_of_chunks, T)
    b = address_in(backup, at, w)
    m = address_in(momentum_buffer, at, w)
    r = address_in(reused, at, w)
    applies = applies_to_step(stats, found_inf)
    scalars = (
        (1.0 / number(grad_scale, 1.0)).to(S),
        number(lr_tensor, lr).to(S),
        double(momentum).to(S),
        (1.0 - double(dampening)).to(S),
        double(weight_decay).to(S),
    )
    length = None
    if reused is not None:
        length = reuse_length(reuse_sq, reuse, reuse_eps, S)
    key = None
    if rounding is not None:
        key = rounding_key(rounding)
    MOMENTUM: tl.constexpr = momentum_buffer is not None
    if is_whole(w | r | g | b | m, count):
        _sgd_chunk(
            w, g, b, m, r, at, count, applies, scalars, length, key, MOMENTUM, DECAY, NESTEROV,
            MAXIMIZE, T, S, B, K, ADOPTS, BLOCK, True,
        )  # fmt: skip
    else:
        _sgd_chunk(
            w, g, b, m, r, at, count, applies, scalars, length, key, MOMENTUM, DECAY, NESTEROV,
            MAXIMIZE, T, S, B, K, ADOPTS, BLOCK, False,
        )  # fmt: skip
