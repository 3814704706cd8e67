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

# NOTE [types of a kernel]
# T stores parameters and gradients, S is that of the arithmetic and of most state, M stores the
# average (None: there is none), B the unperturbed weights: T for a copy, S for masters.

# NOTE [stores are predicated]
# Where an op must not change something (a norm that is not finite), the store's mask says so: it is
# the same for all lanes, so the access stays as wide as without it.

# What kernels call. The interpreter patches Triton's language anew for each call of a jitted
# function, and spends nine tenths of its time on that; for the kernel itself it has done so already.
_helper = (lambda function: function) if triton.knobs.runtime.interpret else triton.jit

CHUNK = tl.constexpr(ops.CHUNK)
STATISTICS = tl.constexpr(ops.STATISTICS)
EFFECT = tl.constexpr(ops.EFFECT)
QUANTIZED = tl.constexpr(ops.QUANTIZED)
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
def _everywhere(condition, lanes):
    """A scalar condition as a mask: spread over the lanes and then compared, because Triton's
    interpreter spreads a comparison in the dtype of what was compared."""
    return tl.zeros_like(lanes) != tl.where(condition, 1, 0)


@_helper
def _store_where(applies, address, lanes, count, stored, T: tl.constexpr, WHOLE: tl.constexpr):
    """`applies`: one for all lanes."""
    mask = _everywhere(applies, lanes)
    if not WHOLE:
        mask = mask & (lanes < count)
    tl.store(_pointer(address, T, WHOLE) + lanes, stored, mask=mask)


@_helper
def _widen(stored, T: tl.constexpr):
    if T.is_bf16():
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif T.is_int8():
        return stored.to(tl.float32)
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


# NOTE [stochastic rounding] in storage.h has the reasons, and the random numbers that all backends draw.
@_helper
def _rounding_key(rounding):
    """32 bits from [seed, number of the step]."""
    x = tl.load(rounding).to(tl.uint64) + tl.load(rounding + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return (x ^ (x >> 31)).to(tl.uint32)


@_helper
def _random_bits(positions, key):
    """32 random bits for each position (int64) in the flat state."""
    x = positions.to(tl.uint32) ^ (key + (positions >> 32).to(tl.uint32) * 0x9E3779B9)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@_helper
def _narrow_stochastically(x, random, T: tl.constexpr):
    bits = x.to(tl.uint32, bitcast=True)
    if T.is_bf16():
        cut = (bits + (random & 0xFFFF)) >> 16
        return tl.where((bits & 0x7F800000) == 0x7F800000, _narrow(x, T), cut.to(tl.uint16))
    else:
        sign = (bits >> 16) & 0x8000
        magnitude = bits & 0x7FFFFFFF
        normal = (magnitude - (112 << 23) + (random & 0x1FFF)) >> 13
        # Below 2^-14 the unit is 2^-24: what is cut off of a multiple of it, plus a fraction below one.
        is_small = magnitude < 0x38800000
        small = tl.where(is_small, magnitude, 0).to(tl.float32, bitcast=True) * 16777216.0
        fraction = (random & 0x1FFF).to(tl.int32).to(tl.float32) * 0.0001220703125
        subnormal = (small + fraction).to(tl.int32).to(tl.uint32)
        finite = (sign | tl.where(is_small, subnormal, normal)).to(tl.uint16)
        return tl.where(magnitude >= 0x477FE000, _narrow(x, T), finite)  # 65504 and above, inf, nan


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


# ---- The average in memory -----------------------------------------------------------------------

# NOTE [tiles of blocks]
# Where the average is int8, a tile has two dimensions: a row is a block of 128 elements, which share
# a scale (NOTE [int8 averages] in storage.h). Its largest magnitude is then a maximum along a row,
# inside a warp.


@_helper
def _lanes(start, BLOCK: tl.constexpr, M: tl.constexpr):
    """The indices of a tile's elements in its chunk."""
    if M is not None and M.is_int8():
        blocks = tl.arange(0, BLOCK // QUANTIZED)[:, None] * QUANTIZED
        return start + blocks + tl.arange(0, QUANTIZED)[None, :]
    else:
        return start + tl.arange(0, BLOCK)


@_helper
def _scale(ema_scale, at, otherwise):
    """The address of the scale of element `at`; `otherwise` where there are no scales."""
    if ema_scale is None:
        return otherwise
    else:
        return ema_scale.to(tl.int64) + at // QUANTIZED * 4


@_helper
def _tile_scales(scales, start, BLOCK: tl.constexpr):
    """Pointers to the scales of a tile's blocks, and each block's first element."""
    blocks = tl.arange(0, BLOCK // QUANTIZED)[:, None]
    pointers = scales.to(tl.pointer_type(tl.float32)) + (start // QUANTIZED + blocks)
    return pointers, start + blocks * QUANTIZED


@_helper
def _load_average(
    m, scales, start, lanes, count, M: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """A tile of the average, NaN where it is unset."""
    average = _widen(_load(m, lanes, count, M, WHOLE), M)
    if M.is_int8():
        pointers, first = _tile_scales(scales, start, BLOCK)
        average = average * tl.load(pointers, mask=first < count, other=0.0)
    return average


@_helper
def _store_average(
    applies, m, scales, start, lanes, count, average, M: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Lanes beyond `count` must hold zero: they take part in their block's maximum."""
    if M.is_int8():
        average = _known(average)
        largest = tl.max(tl.abs(average), 1)[:, None]
        # A 127th, rounded up to 17 significant bits; zero below 2^-100.
        bits = _divide(largest, tl.full(largest.shape, 127.0, tl.float32)).to(tl.uint32, bitcast=True)
        scale = ((bits + 0x7F) & 0xFFFFFF80).to(tl.float32, bitcast=True)
        scale = tl.where(largest >= 7.888609052210118e-31, scale, 0.0)
        is_zero = scale == 0
        inverse = tl.where(is_zero, 0.0, _divide(tl.full(scale.shape, 1.0, tl.float32), tl.where(is_zero, 1.0, scale)))
        pointers, first = _tile_scales(scales, start, BLOCK)
        tl.store(pointers, scale, mask=(first < count) & _everywhere(applies, first))
        # Adding 1.5 * 2^23 leaves a float whose last bit counts ones.
        codes = ((average * inverse + 12582912.0).to(tl.uint32, bitcast=True) & 0xFF).to(tl.int8)
        _store_where(applies, m, lanes, count, codes, M, WHOLE)
    else:
        _store_where(applies, m, lanes, count, _narrow(average, M), M, WHOLE)


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
def _sum(x):
    """Of a tile of one dimension or two."""
    if len(x.shape) == 2:
        return tl.sum(tl.sum(x, 1), 0)
    else:
        return tl.sum(x, 0)


@_helper
def _sum_chunk(
    slot, w, g, m, scales, count, scalars, ADAPTIVE: tl.constexpr, UPDATED: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, M: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    lanes = _lanes(0, CHUNK, M)
    gradient = _widen(_load(g, lanes, count, T, WHOLE), T) * scalars[0]
    ema = None
    if M is not None:
        ema = _load_average(m, scales, 0, lanes, count, M, CHUNK, WHOLE)
    d = _noise(gradient, ema, scalars, UPDATED)
    if ADAPTIVE:
        d = _widen(_load(w, lanes, count, T, WHOLE), T) * d
    tl.store(slot, _sum(d * d))
    tl.store(slot + 1, _sum(gradient * gradient))
    if M is None:
        tl.store(slot + 2, 0.0)
        tl.store(slot + 3, 0.0)
    else:
        known = _known(ema)
        tl.store(slot + 2, _sum(gradient * known))
        tl.store(slot + 3, _sum(known * known))
    tl.store(slot + 4, _sum(tl.where(_is_finite(gradient), 0.0, 1.0).to(S)))


@triton.jit(do_not_specialize=["numel", "offset"])
def noise_norm(
    params, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    ema, ema_scale, grad_scale, sigma: tl.float64, lmbda: tl.float64, partials,
    ADAPTIVE: tl.constexpr, UPDATED: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Pass A, stage 1: a chunk's sums of d^2, g^2, g m, m^2, non-finite g, into a slot of its own.

    d = g - sigma m, adaptive |w| d: Li et al., CVPR 2024 (arXiv 2403.12350), and its official code.
    """
    row, w, g, at, count = _chunk(params, grads, numel, offset, table, rows_of_chunks, T)
    m = _element(ema, at, g)
    scales = _scale(ema_scale, at, g)
    scalars = _ascent_scalars(grad_scale, sigma, lmbda, S)
    slot = partials + tl.program_id(0).to(tl.int64) * STATISTICS
    addresses = g | m
    if ADAPTIVE:
        addresses = addresses | w
    if _is_whole(addresses, count):
        _sum_chunk(slot, w, g, m, scales, count, scalars, ADAPTIVE, UPDATED, T, S, M, True)
    else:
        _sum_chunk(slot, w, g, m, scales, count, scalars, ADAPTIVE, UPDATED, T, S, M, False)


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
def _seen(stored, T: tl.constexpr, FORWARD: tl.constexpr):
    """What a forward pass in bfloat16 (1) or float16 (2) sees of the weights; 0: as they are stored."""
    x = _widen(stored, T)
    if FORWARD == 1:
        return _widen(_narrow(x, tl.bfloat16), tl.bfloat16)
    elif FORWARD == 2:
        return _widen(_narrow(x, tl.float16), tl.float16)
    else:
        return x


@_helper
def _perturb_chunk(
    w, g, m, scales, b, effect, count, finite, step_length, scalars, ADAPTIVE: tl.constexpr,
    UPDATED: tl.constexpr, FEEDS: tl.constexpr, FORWARD: tl.constexpr, T: tl.constexpr,
    S: tl.constexpr, M: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    if effect is not None:
        effective_sq = tl.zeros_like(_lanes(0, BLOCK, M)).to(S)
        effective_dot_intended = effective_sq
        intended_sq = effective_sq
    for start in range(0, count, BLOCK):
        lanes = _lanes(start, BLOCK, M)
        if B == T:
            before = _load(w, lanes, count, T, WHOLE)
            _store(b, lanes, count, before, T, WHOLE)
            weight = _widen(before, T)
        else:
            weight = _load(b, lanes, count, B, WHOLE)
            before = _narrow(weight, T)
        gradient = _widen(_load(g, lanes, count, T, WHOLE), T) * scalars[0]
        ema = None
        if M is not None:
            ema = _load_average(m, scales, start, lanes, count, M, BLOCK, WHOLE)
        d = _noise(gradient, ema, scalars, UPDATED)
        if ADAPTIVE:
            intended = weight * weight * d * step_length
        else:
            intended = d * step_length
        after = _narrow(weight + intended, T)
        _store_where(finite, w, lanes, count, after, T, WHOLE)
        if FEEDS and M is not None:
            average = _average(ema, gradient, scalars)
            _store_average(finite, m, scales, start, lanes, count, average, M, BLOCK, WHOLE)
        if effect is not None:
            effective = _seen(after, T, FORWARD) - _seen(before, T, FORWARD)
            effective_sq += effective * effective
            effective_dot_intended += effective * intended
            intended_sq += intended * intended
    if effect is not None:
        tl.store(effect, tl.where(finite, _sum(effective_sq), 0.0))
        tl.store(effect + 1, tl.where(finite, _sum(effective_dot_intended), 0.0))
        tl.store(effect + 2, tl.where(finite, _sum(intended_sq), 0.0))


@triton.jit(do_not_specialize=["numel", "offset"])
def perturb(
    params, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    ema, ema_scale, backup, stats, grad_scale, rho_tensor,
    rho: tl.float64, sigma: tl.float64, lmbda: tl.float64, eps: tl.float64, effect,
    ADAPTIVE: tl.constexpr, UPDATED: tl.constexpr, FEEDS: tl.constexpr, FORWARD: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, M: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass B: backup = w; m = lmbda m + (1 - lmbda) g; w = w + rho d / (norm + eps).

    Adaptive: w = w + rho |w|^2 d / (norm + eps). Where the norm is not finite w and m keep their
    bits. Masters are read in the place of w. Li et al., CVPR 2024 (arXiv 2403.12350), Algorithm 1,
    and its official code; adaptive: Kwon et al., ICML 2021 (arXiv 2102.11600).
    """
    row, w, g, at, count = _chunk(params, grads, numel, offset, table, rows_of_chunks, T)
    m = _element(ema, at, g)
    scales = _scale(ema_scale, at, g)
    b = _element(backup, at, w)
    scalars = _ascent_scalars(grad_scale, sigma, lmbda, S)
    noise_sq = tl.load(stats)
    finite = _is_finite(noise_sq)
    length = _number(rho_tensor, rho) / (tl.sqrt(noise_sq) + _double(eps))
    length = tl.where(noise_sq > 0, length, 0.0).to(S)
    sums = None
    if effect is not None:
        sums = effect + tl.program_id(0).to(tl.int64) * EFFECT
    if _is_whole(w | g | m | b, count):
        _perturb_chunk(
            w, g, m, scales, b, sums, count, finite, length, scalars, ADAPTIVE, UPDATED, FEEDS,
            FORWARD, T, S, M, B, BLOCK, True,
        )  # fmt: skip
    else:
        _perturb_chunk(
            w, g, m, scales, b, sums, count, finite, length, scalars, ADAPTIVE, UPDATED, FEEDS,
            FORWARD, T, S, M, B, BLOCK, False,
        )  # fmt: skip


@_helper
def _applies(stats, found_inf):
    """Whether a step updates: neither the ascent nor the scaler met a non-finite gradient."""
    return _is_finite(_number(stats, 0.0)) & (_number(found_inf, 0.0) == 0)


@_helper
def _feed_chunk(
    g, m, scales, count, applies, scalars, T: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    for start in range(0, count, BLOCK):
        lanes = _lanes(start, BLOCK, M)
        gradient = _widen(_load(g, lanes, count, T, WHOLE), T) * scalars[0]
        ema = _load_average(m, scales, start, lanes, count, M, BLOCK, WHOLE)
        average = tl.where(_is_finite(gradient), _average(ema, gradient, scalars), ema)
        _store_average(applies, m, scales, start, lanes, count, average, M, BLOCK, WHOLE)


@triton.jit(do_not_specialize=["numel", "offset"])
def update_ema(
    params, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    ema, ema_scale, stats, grad_scale, found_inf, lmbda: tl.float64,
    T: tl.constexpr, S: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The average without an ascent: m = lmbda m + (1 - lmbda) g where g is finite."""
    row, w, g, at, count = _chunk(params, grads, numel, offset, table, rows_of_chunks, T)
    m = _element(ema, at, g)
    scales = _scale(ema_scale, at, g)
    applies = _applies(stats, found_inf)
    scalars = _ascent_scalars(grad_scale, 0.0, lmbda, S)
    if _is_whole(g | m, count):
        _feed_chunk(g, m, scales, count, applies, scalars, T, S, M, BLOCK, True)
    else:
        _feed_chunk(g, m, scales, count, applies, scalars, T, S, M, BLOCK, False)


# ---- The restore and the base updates ------------------------------------------------------------


@_helper
def _as_weight(stored, T: tl.constexpr, B: tl.constexpr):
    """The weight in the dtype of the parameters: a copy as it is, a master rounded."""
    if B == T:
        return stored
    else:
        return _narrow(stored, T)


@_helper
def _copy_chunk(
    w, b, count, T: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    for start in range(0, count, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        _store(w, lanes, count, _as_weight(_load(b, lanes, count, B, WHOLE), T, B), T, WHOLE)


@triton.jit(do_not_specialize=["numel", "offset"])
def restore(
    params, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    backup, T: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass C without a base: w = backup, bit for bit, or the rounded masters."""
    row, w, g, at, count = _chunk(params, grads, numel, offset, table, rows_of_chunks, T)
    b = _element(backup, at, w)
    if _is_whole(w | b, count):
        _copy_chunk(w, b, count, T, B, BLOCK, True)
    else:
        _copy_chunk(w, b, count, T, B, BLOCK, False)


@_helper
def _store_weights(
    applies, w, b, at, lanes, count, stored, new, key, T: tl.constexpr, B: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The updated weights where the update `applies`, else those that were `stored`."""
    if key is not None:
        low = _narrow_stochastically(new, _random_bits(at + lanes, key), T)
    else:
        low = _narrow(new, T)
    if B != T:
        _store_where(applies, b, lanes, count, new, B, WHOLE)
    _store(w, lanes, count, tl.where(applies, low, _as_weight(stored, T, B)), T, WHOLE)


@_helper
def _sgd_chunk(
    w, g, b, m, at, count, applies, scalars, key, MOMENTUM: tl.constexpr, DECAY: tl.constexpr,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    B: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    inverse_scale, lr, momentum, one_minus_dampening, weight_decay = scalars
    for start in range(0, count, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        stored = _load(b, lanes, count, B, WHOLE)
        weight = _widen(stored, B)
        gradient = _widen(_load(g, lanes, count, T, WHOLE), T) * inverse_scale
        if MAXIMIZE:
            gradient = -gradient
        if DECAY:
            gradient = gradient + weight_decay * weight
        if MOMENTUM:
            buffer = _load(m, lanes, count, S, WHOLE)
            updated = momentum * buffer + one_minus_dampening * gradient
            updated = tl.where(buffer != buffer, gradient, updated)
            _store_where(applies, m, lanes, count, updated, S, WHOLE)
            if NESTEROV:
                gradient = gradient + momentum * updated
            else:
                gradient = updated
        new = weight - lr * gradient
        _store_weights(applies, w, b, at, lanes, count, stored, new, key, T, B, WHOLE)


@triton.jit(do_not_specialize=["numel", "offset"])
def restore_sgd(
    params, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    backup, momentum_buffer, stats, grad_scale, found_inf, lr_tensor,
    lr: tl.float64, momentum: tl.float64, dampening: tl.float64, weight_decay: tl.float64, rounding,
    DECAY: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass C with SGD: w = backup; g = g + decay w; v = momentum v + (1 - dampening) g; w -= lr v.

    Source: torch.optim.SGD. Without a backup it starts from w; where it does not apply it only
    restores. Masters are updated, and w is their rounded copy.
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
    key = None
    if rounding is not None:
        key = _rounding_key(rounding)
    MOMENTUM: tl.constexpr = momentum_buffer is not None
    if _is_whole(w | g | b | m, count):
        _sgd_chunk(
            w, g, b, m, at, count, applies, scalars, key, MOMENTUM, DECAY, NESTEROV, MAXIMIZE,
            T, S, B, BLOCK, True,
        )  # fmt: skip
    else:
        _sgd_chunk(
            w, g, b, m, at, count, applies, scalars, key, MOMENTUM, DECAY, NESTEROV, MAXIMIZE,
            T, S, B, BLOCK, False,
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
    w, g, b, m, v, at, count, applies, scalars, step_size, sqrt_second, key, DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    B: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    inverse_scale, weight_decay, keep, one_minus_beta1, beta2, one_minus_beta2, eps = scalars
    for start in range(0, count, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        stored = _load(b, lanes, count, B, WHOLE)
        weight = _widen(stored, B)
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
        new = weight - step_size * _divide(new_first, denominator)
        _store_where(applies, m, lanes, count, new_first, S, WHOLE)
        _store_where(applies, v, lanes, count, new_second, S, WHOLE)
        _store_weights(applies, w, b, at, lanes, count, stored, new, key, T, B, WHOLE)


@triton.jit(do_not_specialize=["numel", "offset"])
def restore_adam(
    params, grads, numel: tl.int64, offset: tl.int64, table, rows_of_chunks,
    backup, exp_avg, exp_avg_sq, steps, stats, grad_scale, found_inf, lr_tensor,
    lr: tl.float64, beta1: tl.float64, beta2: tl.float64, eps: tl.float64,
    weight_decay: tl.float64, rounding,
    DECAY: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass C with Adam: w = backup - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps).

    m = m + (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g^2; decoupled: w (1 - lr decay) first.
    Source: torch.optim.Adam and AdamW. Without a backup it starts from w; where it does not apply
    it only restores. Masters are updated, and w is their rounded copy.
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
    key = None
    if rounding is not None:
        key = _rounding_key(rounding)
    if _is_whole(w | g | b | m | v, count):
        _adam_chunk(
            w, g, b, m, v, at, count, applies, scalars, step_size, sqrt_second, key,
            DECAY, DECOUPLED, MAXIMIZE, T, S, B, BLOCK, True,
        )  # fmt: skip
    else:
        _adam_chunk(
            w, g, b, m, v, at, count, applies, scalars, step_size, sqrt_second, key,
            DECAY, DECOUPLED, MAXIMIZE, T, S, B, BLOCK, False,
        )  # fmt: skip
