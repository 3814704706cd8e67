"""Elements in memory: loads and stores, whole and partial, and the conversions of stored types."""

import triton.language as tl

from .arithmetic import helper

# NOTE [whole and partial access]
# A chunk of 4096 elements whose every address is a multiple of 16 is accessed without masks in
# 128-bit vectors. Any other chunk (the last one of a row, or a misaligned view) is accessed with
# masks, element by element. An address that was computed or read from a table tells Triton nothing
# about its alignment, so `pointer_to` does. Both ways read with the same indices; Triton then gives
# both the same register layout, and so a sum has the same order, hence the same bits, for an
# aligned and for a misaligned tensor (a test looks at the compiled code).

# NOTE [16-bit types are integers in memory]
# bfloat16 and float16 are loaded and stored as bit patterns. So a copy is exact for every pattern,
# and bfloat16 is rounded to nearest even by integer operations: the same bits under Triton's
# interpreter (whose own conversion truncates), on GPUs with the instruction and on those without.

# NOTE [types of a kernel]
# T stores parameters and gradients, S is that of the arithmetic and of most state, M stores the
# average (None: there is none), B the unperturbed weights: T for a copy, S for masters. K stores what is kept of
# gradients, or reused (None: nothing is).

# NOTE [stores are predicated]
# Where an op must not change something (a norm that is not finite), the store's mask says so: it is
# the same for all lanes, so the access stays as wide as without it.

VECTOR_BYTES = tl.constexpr(16)


@helper
def pointer_to(address, T: tl.constexpr, WHOLE: tl.constexpr):
    """A typed pointer, aligned for vectors where the access is WHOLE."""
    if T.primitive_bitwidth == 16:
        pointer = address.to(tl.pointer_type(tl.uint16))
    else:
        pointer = address.to(tl.pointer_type(T))
    if WHOLE:
        pointer = tl.multiple_of(pointer, VECTOR_BYTES)
    return pointer


@helper
def load(address, lanes, count, T: tl.constexpr, WHOLE: tl.constexpr):
    """The elements as they are in memory."""
    if WHOLE:
        return tl.load(pointer_to(address, T, WHOLE) + lanes)
    else:
        return tl.load(pointer_to(address, T, WHOLE) + lanes, mask=lanes < count, other=0)


@helper
def store(address, lanes, count, stored, T: tl.constexpr, WHOLE: tl.constexpr):
    """Writes what `load` would read."""
    if WHOLE:
        tl.store(pointer_to(address, T, WHOLE) + lanes, stored)
    else:
        tl.store(pointer_to(address, T, WHOLE) + lanes, stored, mask=lanes < count)


@helper
def everywhere(condition, lanes):
    """A scalar condition as a mask: spread over the lanes and then compared, because Triton's
    interpreter spreads a comparison in the dtype of what was compared."""
    return tl.zeros_like(lanes) != tl.where(condition, 1, 0)


@helper
def store_where(applies, address, lanes, count, stored, T: tl.constexpr, WHOLE: tl.constexpr):
    """`applies`: one for all lanes."""
    store_masked(everywhere(applies, lanes), address, lanes, count, stored, T, WHOLE)


@helper
def store_masked(mask, address, lanes, count, stored, T: tl.constexpr, WHOLE: tl.constexpr):
    """`mask`: one of each lane, for what is rarely stored: one that differs among lanes costs the width."""
    if not WHOLE:
        mask = mask & (lanes < count)
    tl.store(pointer_to(address, T, WHOLE) + lanes, stored, mask=mask)


@helper
def widen(stored, T: tl.constexpr):
    """What was stored as T, in the dtype of the arithmetic; codes of an int8 average without their scale."""
    if T.is_bf16():
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif T.is_int8():
        return stored.to(tl.float32)
    elif T.is_fp16():
        return stored.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return stored


@helper
def narrow(x, T: tl.constexpr):
    """x as T is stored, rounded to nearest even."""
    if T.is_bf16():
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)
    elif T.is_fp16():
        return x.to(tl.float16).to(tl.uint16, bitcast=True)
    else:
        return x
