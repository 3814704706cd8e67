"""The device side of the Triton backend: the three passes, line for line csrc/formulas.h.

One program owns one chunk of 4096 elements of one row. What a call has (an average, a backup, a
table) is decided when the kernel is compiled: tensors that it has not are None. The only branch at
run time is the one between whole and partial access below.
"""

import triton
import triton.language as tl

from .. import ops

# NOTE [scalars are fp64]
# Hyperparameters arrive as fp64, what depends on them is computed in fp64 and rounded once: as in
# the C++ backends, and so with the same bits. A parameter without that annotation would arrive as
# fp32. `_double` is for the interpreter, which hands Python floats over as they are.

# NOTE [whole and partial access]
# A chunk of 4096 elements whose every address is a multiple of 16 is accessed without masks in
# 128-bit vectors. Any other chunk (the last one of a row, or a misaligned view) is accessed with
# masks, element by element. An address that was computed or read from a table tells Triton nothing
# about its alignment, so `_pointer` does. Both ways read with the same indices; Triton then gives
# both the same register layout, and so a sum has the same order, hence the same bits, for an
# aligned and for a misaligned tensor (a test looks at the compiled code).

# NOTE [16-bit types are integers in memory]
# bfloat16 and float16 are loaded and stored as bit patterns. So a copy is exact for every pattern,
# and bfloat16 is rounded to nearest even by integer operations: the same bits under Triton's
# interpreter (whose own conversion truncates), on GPUs with the instruction and on those without.

# What kernels call. The interpreter patches Triton's language anew for each call of a jitted
# function, and spends nine tenths of its time on that; for the kernel itself it has done so already.
_helper = (lambda function: function) if triton.knobs.runtime.interpret else triton.jit

CHUNK = tl.constexpr(ops.CHUNK)
STATISTICS = tl.constexpr(ops.STATISTICS)
VECTOR_BYTES = tl.constexpr(16)
TABLE_COLUMNS = tl.constexpr(5)  # address, gradient's address, numel, offset, first chunk


# ---- Values in memory ----------------------------------------------------------------------------


@_helper
def _double(x):
    return tl.full((), x, tl.float64)


@_helper
def _pointer(address, T: tl.constexpr, WHOLE: tl.constexpr):
    if T.primitive_bitwidth == 16:
        pointer = address.to(tl.pointer_type(tl.uint16))
    else:
        pointer = address.to(tl.pointer_type(T))
    if WHOLE:
        pointer = tl.multiple_of(pointer, VECTOR_BYTES)
    return pointer


@_helper
def _load(address, lanes, count, T: tl.constexpr, WHOLE: tl.constexpr):
    """The elements as they are in memory."""
    if WHOLE:
        return tl.load(_pointer(address, T, WHOLE) + lanes)
    else:
        return tl.load(_pointer(address, T, WHOLE) + lanes, mask=lanes < count, other=0)


@_helper
def _store(address, lanes, count, stored, T: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(_pointer(address, T, WHOLE) + lanes, stored)
    else:
        tl.store(_pointer(address, T, WHOLE) + lanes, stored, mask=lanes < count)


@_helper
def _widen(stored, T: tl.constexpr):
    if T.is_bf16():
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif T.is_fp16():
        return stored.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return stored


@_helper
def _narrow(x, T: tl.constexpr):
    if T.is_bf16():
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)
    elif T.is_fp16():
        return x.to(tl.float16).to(tl.uint16, bitcast=True)
    else:
        return x


@_helper
def _is_finite(x):
    return x - x == 0


@_helper
def _number(pointer, otherwise):
    """The optional number that lives in a tensor of one element, in fp64."""
    if pointer is None:
        return _double(otherwise)
    else:
        return tl.load(pointer).to(tl.float64)


# IEEE square root and division; Triton's plain fp32 ones are approximations.
@_helper
def _square_root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@_helper
def _divide(x, y):
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


# ---- Which elements a program owns ---------------------------------------------------------------


@_helper
def _chunk(params, grads, numel, offset, table, rows_of_chunks, T: tl.constexpr):
    """The chunk of this program: (row, address of its part of the parameter, of the gradient, index
    of its part of the flat buffers, number of elements).

    Without a table there is one row, at `params` and `grads`; NOTE [one row needs no table] in
    triton.py.
    """
    SIZE: tl.constexpr = T.primitive_bitwidth // 8
    chunk = tl.program_id(0).to(tl.int64)
    if table is None:
        row = tl.full((), 0, tl.int64)
        weight = params.to(tl.int64)
        gradient = weight
        if grads is not None:
            gradient = grads.to(tl.int64)
        length = numel.to(tl.int64)
        at = offset.to(tl.int64)
        begin = chunk * CHUNK
    else:
        row = tl.load(rows_of_chunks + chunk).to(tl.int64)
        entry = table + row * TABLE_COLUMNS
        weight = tl.load(entry)
        gradient = tl.load(entry + 1)
        length = tl.load(entry + 2)
        at = tl.load(entry + 3)
        begin = (chunk - tl.load(entry + 4)) * CHUNK
    count = tl.minimum(length - begin, CHUNK).to(tl.int32)
    return row, weight + begin * SIZE, gradient + begin * SIZE, at + begin, count


@_helper
def _element(buffer, at, otherwise):
    """The address of element `at` of a flat buffer; `otherwise` where there is no buffer."""
    if buffer is None:
        return otherwise
    else:
        return buffer.to(tl.int64) + at * (buffer.dtype.element_ty.primitive_bitwidth // 8)


@_helper
def _is_whole(addresses, count):
    """`addresses`: all that the pass accesses, or-ed."""
    return (addresses % VECTOR_BYTES == 0) & (count == CHUNK)


# ---- The ascent ----------------------------------------------------------------------------------


@_helper
def _ascent_scalars(grad_scale, sigma, lmbda, S: tl.constexpr):
    inverse_scale = 1.0 / _number(grad_scale, 1.0)
    one_minus_lmbda = 1.0 - _double(lmbda)
    return inverse_scale.to(S), _double(sigma).to(S), _double(lmbda).to(S), one_minus_lmbda.to(S)


@_helper
def _known(state):
    """An element that is NaN has seen no gradient: NOTE [an unset state is NaN] in formulas.h."""
    return tl.where(state != state, 0.0, state)


@_helper
def _average(ema, g, scalars):
    """m = lmbda m + (1 - lmbda) g; the first gradient becomes m itself."""
    inverse_scale, sigma, lmbda, one_minus_lmbda = scalars
    return tl.where(ema != ema, g, lmbda * ema + one_minus_lmbda * g)


@_helper
def _noise(g, ema, scalars, UPDATED: tl.constexpr):
    """d = g - sigma m_prev (the official code), or g - sigma m_new (the paper's Algorithm 1)."""
    inverse_scale, sigma, lmbda, one_minus_lmbda = scalars
    if ema is None:
        return g
    elif UPDATED:
        return g - sigma * _average(ema, g, scalars)
    else:
        return g - sigma * _known(ema)


@_helper
def _sum_chunk(
    slot, w, g, m, count, scalars, EMA: tl.constexpr, ADAPTIVE: tl.constexpr,
    UPDATED: tl.constexpr, T: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, CHUNK)
    gradient = _widen(_load(g, lanes, count, T, WHOLE), T) * scalars[0]
    ema = None
    if EMA:
        ema = _load(m, lanes, count, S, WHOLE)
    d = _noise(gradient, ema, scalars, UPDATED)
    if ADAPTIVE:
        d = _widen(_load(w, lanes, count, T, WHOLE), T) * d
    tl.store(slot, tl.sum(d * d, 0))
    tl.store(slot + 1, tl.sum(gradient * gradient, 0))
    if EMA:
        known = _known(ema)
        tl.store(slot + 2, tl.sum(gradient * known, 0))
        tl.store(slot + 3, tl.sum(known * known, 0))
    else:
        tl.store(slot + 2, 0.0)
        tl.store(slot + 3, 0.0)
    tl.store(slot + 4, tl.sum(tl.where(_is_finite(gradient), 0.0, 1.0).to(S), 0))


@triton.jit(do_not_specialize=["numel", "offset"])
def noise_norm(
    params, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    ema, grad_scale, sigma: tl.float64, lmbda: tl.float64, partials,
    ADAPTIVE: tl.constexpr, UPDATED: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Pass A, stage 1: a chunk's sums of d^2, g^2, g m, m^2, non-finite g, into a slot of its own.

    d = g - sigma m, adaptive |w| d: Li et al., CVPR 2024 (arXiv 2403.12350), and its official code.
    """
    row, w, g, at, count = _chunk(params, grads, numel, offset, table, rows_of_chunks, T)
    m = _element(ema, at, g)
    scalars = _ascent_scalars(grad_scale, sigma, lmbda, S)
    slot = partials + tl.program_id(0).to(tl.int64) * STATISTICS
    EMA: tl.constexpr = ema is not None
    addresses = g | m
    if ADAPTIVE:
        addresses = addresses | w
    if _is_whole(addresses, count):
        _sum_chunk(slot, w, g, m, count, scalars, EMA, ADAPTIVE, UPDATED, T, S, True)
    else:
        _sum_chunk(slot, w, g, m, count, scalars, EMA, ADAPTIVE, UPDATED, T, S, False)


@triton.jit(do_not_specialize=["chunks"])
def sum_partials(partials, chunks: tl.int64, stats, BLOCK: tl.constexpr):
    """Pass A, stage 2: program k sums statistic k of all chunks in fp64, in a fixed order."""
    k = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, chunks, BLOCK):
        chunk = start + lanes
        partial = tl.load(partials + chunk * STATISTICS + k, mask=chunk < chunks, other=0.0)
        total += partial.to(tl.float64)
    tl.store(stats + k, tl.sum(total, 0))


@_helper
def _perturb_chunk(
    w, g, m, b, count, finite, step_length, scalars, EMA: tl.constexpr, ADAPTIVE: tl.constexpr,
    UPDATED: tl.constexpr, T: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    for start in range(0, count, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        stored = _load(w, lanes, count, T, WHOLE)
        weight = _widen(stored, T)
        gradient = _widen(_load(g, lanes, count, T, WHOLE), T) * scalars[0]
        ema = None
        if EMA:
            ema = _load(m, lanes, count, S, WHOLE)
        d = _noise(gradient, ema, scalars, UPDATED)
        if ADAPTIVE:
            moved = weight + weight * weight * d * step_length
        else:
            moved = weight + d * step_length
        _store(b, lanes, count, stored, T, WHOLE)
        _store(w, lanes, count, tl.where(finite, _narrow(moved, T), stored), T, WHOLE)
        if EMA:
            average = _average(ema, gradient, scalars)
            _store(m, lanes, count, tl.where(finite, average, ema), S, WHOLE)


@triton.jit(do_not_specialize=["numel", "offset"])
def perturb(
    params, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    ema, backup, stats, grad_scale, rho_tensor,
    rho: tl.float64, sigma: tl.float64, lmbda: tl.float64, eps: tl.float64,
    ADAPTIVE: tl.constexpr, UPDATED: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass B: backup = w; m = lmbda m + (1 - lmbda) g; w = w + rho d / (norm + eps).

    Adaptive: w = w + rho |w|^2 d / (norm + eps). Where the norm is not finite w and m keep their
    bits. Li et al., CVPR 2024 (arXiv 2403.12350), Algorithm 1, and its official code; adaptive:
    Kwon et al., ICML 2021 (arXiv 2102.11600).
    """
    row, w, g, at, count = _chunk(params, grads, numel, offset, table, rows_of_chunks, T)
    m = _element(ema, at, g)
    b = _element(backup, at, w)
    scalars = _ascent_scalars(grad_scale, sigma, lmbda, S)
    noise_sq = tl.load(stats)
    finite = _is_finite(noise_sq)
    length = _number(rho_tensor, rho) / (tl.sqrt(noise_sq) + _double(eps))
    length = tl.where(noise_sq > 0, length, 0.0).to(S)
    EMA: tl.constexpr = ema is not None
    if _is_whole(w | g | m | b, count):
        _perturb_chunk(w, g, m, b, count, finite, length, scalars, EMA, ADAPTIVE, UPDATED, T, S, BLOCK, True)
    else:
        _perturb_chunk(w, g, m, b, count, finite, length, scalars, EMA, ADAPTIVE, UPDATED, T, S, BLOCK, False)


# ---- The restore and the base updates ------------------------------------------------------------


@_helper
def _copy_chunk(to, source, count, T: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    for start in range(0, count, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        _store(to, lanes, count, _load(source, lanes, count, T, WHOLE), T, WHOLE)


@triton.jit(do_not_specialize=["numel", "offset"])
def restore(
    params, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    backup, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass C without a base: w = backup, bit for bit."""
    row, w, g, at, count = _chunk(params, grads, numel, offset, table, rows_of_chunks, T)
    b = _element(backup, at, w)
    if _is_whole(w | b, count):
        _copy_chunk(w, b, count, T, BLOCK, True)
    else:
        _copy_chunk(w, b, count, T, BLOCK, False)


@_helper
def _applies(stats, found_inf):
    """Whether pass C updates: neither the ascent nor the scaler met a non-finite gradient."""
    return _is_finite(_number(stats, 0.0)) & (_number(found_inf, 0.0) == 0)


@_helper
def _sgd_chunk(
    w, g, b, m, count, applies, scalars, MOMENTUM: tl.constexpr, DECAY: tl.constexpr,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    inverse_scale, lr, momentum, one_minus_dampening, weight_decay = scalars
    for start in range(0, count, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        stored = _load(b, lanes, count, T, WHOLE)
        weight = _widen(stored, T)
        gradient = _widen(_load(g, lanes, count, T, WHOLE), T) * inverse_scale
        if MAXIMIZE:
            gradient = -gradient
        if DECAY:
            gradient = gradient + weight_decay * weight
        if MOMENTUM:
            buffer = _load(m, lanes, count, S, WHOLE)
            updated = momentum * buffer + one_minus_dampening * gradient
            updated = tl.where(buffer != buffer, gradient, updated)
            _store(m, lanes, count, tl.where(applies, updated, buffer), S, WHOLE)
            if NESTEROV:
                gradient = gradient + momentum * updated
            else:
                gradient = updated
        new = _narrow(weight - lr * gradient, T)
        _store(w, lanes, count, tl.where(applies, new, stored), T, WHOLE)


@triton.jit(do_not_specialize=["numel", "offset"])
def restore_sgd(
    params, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    backup, momentum_buffer, stats, grad_scale, found_inf, lr_tensor,
    lr: tl.float64, momentum: tl.float64, dampening: tl.float64, weight_decay: tl.float64,
    DECAY: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass C with SGD: w = backup; g = g + decay w; v = momentum v + (1 - dampening) g; w -= lr v.

    Source: torch.optim.SGD. Without a backup it starts from w; where it does not apply it only
    restores.
    """
    row, w, g, at, count = _chunk(params, grads, numel, offset, table, rows_of_chunks, T)
    b = _element(backup, at, w)
    m = _element(momentum_buffer, at, w)
    applies = _applies(stats, found_inf)
    scalars = (
        (1.0 / _number(grad_scale, 1.0)).to(S),
        _number(lr_tensor, lr).to(S),
        _double(momentum).to(S),
        (1.0 - _double(dampening)).to(S),
        _double(weight_decay).to(S),
    )
    MOMENTUM: tl.constexpr = momentum_buffer is not None
    if _is_whole(w | g | b | m, count):
        _sgd_chunk(
            w, g, b, m, count, applies, scalars, MOMENTUM, DECAY, NESTEROV, MAXIMIZE,
            T, S, BLOCK, True,
        )  # fmt: skip
    else:
        _sgd_chunk(
            w, g, b, m, count, applies, scalars, MOMENTUM, DECAY, NESTEROV, MAXIMIZE,
            T, S, BLOCK, False,
        )  # fmt: skip


@_helper
def _product(a, a_low, b, b_low):
    """(a + a_low) (b + b_low) as a sum of two doubles, the second far below the first."""
    high = a * b
    low = tl.fma(a, b, -high) + (a * b_low + a_low * b)
    total = high + low
    return total, low - (total - high)


@_helper
def _power(base, exponent, TWICE: tl.constexpr):
    """base^exponent in fp64, by squaring. TWICE: in twice the precision, rounded at the end.

    1 - beta^t loses up to three digits to cancellation. That leaves more than enough of fp64 for
    fp32 states; fp64 states need the power rounded correctly, as the C library's pow() does.
    """
    power = _double(1.0)
    power_low = _double(0.0)
    base_low = _double(0.0)
    while exponent > 0:
        odd = exponent % 2 == 1
        if TWICE:
            next_power, next_low = _product(power, power_low, base, base_low)
            power = tl.where(odd, next_power, power)
            power_low = tl.where(odd, next_low, power_low)
            base, base_low = _product(base, base_low, base, base_low)
        else:
            power = tl.where(odd, power * base, power)
            base = base * base
        exponent = exponent // 2
    return power


@_helper
def _adam_chunk(
    w, g, b, m, v, count, applies, scalars, step_size, sqrt_second, DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    inverse_scale, weight_decay, keep, one_minus_beta1, beta2, one_minus_beta2, eps = scalars
    for start in range(0, count, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        stored = _load(b, lanes, count, T, WHOLE)
        weight = _widen(stored, T)
        gradient = _widen(_load(g, lanes, count, T, WHOLE), T) * inverse_scale
        if MAXIMIZE:
            gradient = -gradient
        if DECOUPLED:
            weight = weight * keep
        elif DECAY:
            gradient = gradient + weight_decay * weight
        first = _load(m, lanes, count, S, WHOLE)
        second = _load(v, lanes, count, S, WHOLE)
        new_first = first + one_minus_beta1 * (gradient - first)
        new_second = beta2 * second + one_minus_beta2 * (gradient * gradient)
        denominator = _divide(_square_root(new_second), sqrt_second) + eps
        new = _narrow(weight - step_size * _divide(new_first, denominator), T)
        _store(m, lanes, count, tl.where(applies, new_first, first), S, WHOLE)
        _store(v, lanes, count, tl.where(applies, new_second, second), S, WHOLE)
        _store(w, lanes, count, tl.where(applies, new, stored), T, WHOLE)


@triton.jit(do_not_specialize=["numel", "offset"])
def restore_adam(
    params, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    backup, exp_avg, exp_avg_sq, steps, stats, grad_scale, found_inf, lr_tensor,
    lr: tl.float64, beta1: tl.float64, beta2: tl.float64, eps: tl.float64,
    weight_decay: tl.float64,
    DECAY: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass C with Adam: w = backup - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps).

    m = m + (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g^2; decoupled: w (1 - lr decay) first.
    Source: torch.optim.Adam and AdamW. Without a backup it starts from w; where it does not apply
    it only restores.
    """
    row, w, g, at, count = _chunk(params, grads, numel, offset, table, rows_of_chunks, T)
    b = _element(backup, at, w)
    m = _element(exp_avg, at, w)
    v = _element(exp_avg_sq, at, w)
    applies = _applies(stats, found_inf)
    rate = _number(lr_tensor, lr)
    decay = _double(weight_decay)
    scalars = (
        (1.0 / _number(grad_scale, 1.0)).to(S),
        decay.to(S),
        (1.0 - rate * decay).to(S),
        (1.0 - _double(beta1)).to(S),
        _double(beta2).to(S),
        (1.0 - _double(beta2)).to(S),
        _double(eps).to(S),
    )
    step = tl.load(steps + row).to(tl.int32)
    TWICE: tl.constexpr = S.is_fp64()
    step_size = (rate / (1.0 - _power(_double(beta1), step, TWICE))).to(S)
    sqrt_second = tl.sqrt(1.0 - _power(_double(beta2), step, TWICE)).to(S)
    if _is_whole(w | g | b | m | v, count):
        _adam_chunk(
            w, g, b, m, v, count, applies, scalars, step_size, sqrt_second,
            DECAY, DECOUPLED, MAXIMIZE, T, S, BLOCK, True,
        )  # fmt: skip
    else:
        _adam_chunk(
            w, g, b, m, v, count, applies, scalars, step_size, sqrt_second,
            DECAY, DECOUPLED, MAXIMIZE, T, S, BLOCK, False,
        )  # fmt: skip
