"""The average in memory: tiles, and the scales of an int8 average."""

import triton.language as tl

from ... import ops
from .arithmetic import divide, helper
from .memory import everywhere, load, narrow, store_where, widen

QUANTIZED = tl.constexpr(ops.QUANTIZED)

# NOTE [tiles of blocks]
# Where the average is int8, a tile has two dimensions: a row is a block of 128 elements, which share
# a scale (NOTE [int8 averages] in storage.h). Its largest magnitude is then a maximum along a row,
# inside a warp.


@helper
def lanes_of(start, BLOCK: tl.constexpr, M: tl.constexpr):
    """The indices of a tile's elements in its chunk."""
    if M is not None and M.is_int8():
        blocks = tl.arange(0, BLOCK // QUANTIZED)[:, None] * QUANTIZED
        return start + blocks + tl.arange(0, QUANTIZED)[None, :]
    else:
        return start + tl.arange(0, BLOCK)


@helper
def scale_address(ema_scale, at, otherwise):
    """The address of the scale of element `at`; `otherwise` where there are no scales."""
    if ema_scale is None:
        return otherwise
    else:
        return ema_scale.to(tl.int64) + at // QUANTIZED * 4


@helper
def _tile_scales(scales, start, BLOCK: tl.constexpr):
    """Pointers to the scales of a tile's blocks, and each block's first element."""
    blocks = tl.arange(0, BLOCK // QUANTIZED)[:, None]
    pointers = scales.to(tl.pointer_type(tl.float32)) + (start // QUANTIZED + blocks)
    return pointers, start + blocks * QUANTIZED


@helper
def load_average(
    m, scales, start, lanes, count, M: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """A tile of the average, NaN where it is unset."""
    average = widen(load(m, lanes, count, M, WHOLE), M)
    if M.is_int8():
        pointers, first = _tile_scales(scales, start, BLOCK)
        average = average * tl.load(pointers, mask=first < count, other=0.0)
    return average


@helper
def known(state):
    """An element that is NaN has seen no gradient: NOTE [an unset state is NaN] in formulas.h."""
    return tl.where(state != state, 0.0, state)


@helper
def store_average(
    applies, m, scales, start, lanes, count, average, M: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Lanes beyond `count` must hold zero: they take part in their block's maximum."""
    if M.is_int8():
        average = known(average)
        largest = tl.max(tl.abs(average), 1)[:, None]
        # A 127th, rounded up to 17 significant bits; zero below 2^-100.
        bits = divide(largest, tl.full(largest.shape, 127.0, tl.float32)).to(tl.uint32, bitcast=True)
        scale = ((bits + 0x7F) & 0xFFFFFF80).to(tl.float32, bitcast=True)
        scale = tl.where(largest >= 7.888609052210118e-31, scale, 0.0)
        is_zero = scale == 0
        inverse = tl.where(is_zero, 0.0, divide(tl.full(scale.shape, 1.0, tl.float32), tl.where(is_zero, 1.0, scale)))
        pointers, first = _tile_scales(scales, start, BLOCK)
        tl.store(pointers, scale, mask=(first < count) & everywhere(applies, first))
        # Adding 1.5 * 2^23 leaves a float whose last bit counts ones.
        codes = ((average * inverse + 12582912.0).to(tl.uint32, bitcast=True) & 0xFF).to(tl.int8)
        store_where(applies, m, lanes, count, codes, M, WHOLE)
    else:
        store_where(applies, m, lanes, count, narrow(average, M), M, WHOLE)
