"""The semantics of instructions that reach memory: the parameters, a block's shared memory, the GPU's, other lanes."""

from __future__ import annotations

import numpy as np

from bench.sass.machine import SHARED_BYTES, WARP, BadAccess, Execution, as_signed, as_words, executes

WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
# What decides about caches and order, and nothing about values.
HINTS = "E EF CONSTANT STRONG SM"


def width_of(x: Execution) -> int:
    """The bytes that an access moves."""
    return next((WIDTHS[name] for name in x.ins.modifiers if name in WIDTHS), 4)


def source_words(x: Execution, i: int, width: int) -> list[np.ndarray]:
    """What is stored: operand i and the registers behind it."""
    op = x.ins.operands[i]
    if op.kind not in ("R", "UR") or op.suffix:
        raise x.ins.refuse()
    return [x.register(op, k) for k in range(-(-width // 4))]


def source_bytes(x: Execution, i: int, width: int) -> np.ndarray:
    """The bytes to be stored, for each active thread."""
    words = np.stack([word[x.mask] for word in source_words(x, i, width)], axis=1)
    return np.ascontiguousarray(words).view(np.uint8)[:, :width]


def extended(x: Execution, words: list[np.ndarray]) -> list[np.ndarray]:
    """What a load of less than a word gives: its upper bits are those of the sign, or zeros."""
    bits = {"S8": np.uint32(24), "S16": np.uint32(16)}
    shift = next((bits[name] for name in x.ins.modifiers if name in bits), None)
    return words if shift is None else [(as_signed(words[0] << shift) >> shift.view(np.int32)).view(np.uint32)]


def write_loaded(x: Execution, data: np.ndarray) -> None:
    """The result of a load from rows of bytes, one for each active thread."""
    full = []
    for word in extended(x, as_words(data)):
        spread = x.full(0)
        spread[x.mask] = word
        full.append(spread)
    x.write(0, *full)


@executes("LDC", "ULDC", "LDCU", modifiers="U8 S8 U16 S16 64 128")
def load_constant(x: Execution) -> None:
    """From the parameters."""
    op = x.ins.operands[1]
    if op.kind != "c" or op.negative or op.absolute or op.inverted:
        raise x.ins.refuse()
    x.write(0, *extended(x, x.constant(op, width_of(x))))


def shared_index(x: Execution, i: int, width: int) -> np.ndarray:
    """The index of each byte in shared memory, for each active thread."""
    addresses = x.addresses(i)[x.mask]
    if (addresses % width).any() or (addresses + width > SHARED_BYTES).any():
        raise BadAccess(f"misaligned or beyond shared memory: {x.ins.text}")
    return addresses.astype(np.int64)[:, None] + np.arange(width)


@executes("LDS", modifiers="U8 S8 U16 S16 64 128")
def load_shared(x: Execution) -> None:
    """From shared memory."""
    write_loaded(x, x.block.shared[shared_index(x, 1, width_of(x))])


@executes("STS", modifiers="U8 U16 64 128")
def store_shared(x: Execution) -> None:
    """To shared memory."""
    width = width_of(x)
    x.block.shared[shared_index(x, 0, width)] = source_bytes(x, 1, width)


@executes("LDG", modifiers=f"U8 S8 U16 S16 64 128 {HINTS}")
def load_global(x: Execution) -> None:
    """From global memory."""
    write_loaded(x, x.block.memory.load(x.addresses(1)[x.mask], width_of(x)))


@executes("STG", modifiers=f"U8 U16 64 128 {HINTS}")
def store_global(x: Execution) -> None:
    """To global memory."""
    x.block.memory.store(x.addresses(0)[x.mask], source_bytes(x, 1, width_of(x)))


@executes("SHFL", modifiers="BFLY IDX DOWN UP")
def shuffle(x: Execution) -> None:
    """From another lane of the warp, which has to take part."""
    start = x.leading_predicates(0)
    lanes = np.arange(x.block.threads) % WARP
    by, clamp = x.integer(start + 2).astype(np.int64), x.integer(start + 3)
    if (clamp[x.mask] != (0 if x.has("UP") else WARP - 1)).any():
        raise x.ins.refuse()
    source = {"BFLY": lanes ^ by, "IDX": by, "DOWN": lanes + by, "UP": lanes - by}[x.ins.modifiers[0]]
    inside = (source >= 0) & (source < WARP)
    source = np.where(inside, source, lanes) + np.arange(x.block.threads) // WARP * WARP
    if not x.mask[source][x.mask].all():
        raise BadAccess(f"a shuffle from a lane that takes no part: {x.ins.text}")
    x.write(start, x.integer(start + 1)[source])
    if start:
        x.write_predicate(0, inside)
