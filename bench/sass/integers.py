"""The semantics of instructions on integers, bits and predicates."""

from __future__ import annotations

import numpy as np

from bench.sass.machine import Execution, as_signed, executes
from bench.sass.program import TRUE, ZERO, Operand

ONES = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


def wide(x: np.ndarray) -> np.ndarray:
    """32 bits in 64, without a sign."""
    return x.astype(np.uint64)


def low(x: np.ndarray) -> np.ndarray:
    """The lower word of 64 bits."""
    return (x & ONES).astype(np.uint32)


def high(x: np.ndarray) -> np.ndarray:
    """The upper word of 64 bits."""
    return (x >> SHIFT).astype(np.uint32)


@executes("MOV", "UMOV")
def move(x: Execution) -> None:
    """The bits as they are."""
    x.write(0, x.integer(1))


@executes("CS2R", modifiers="32")
def move_special(x: Execution) -> None:
    """Only zeros are moved this way here."""
    if x.ins.operands[1].text != "SRZ":
        raise x.ins.refuse()
    x.write(0, *[x.full(0)] * (1 if x.has("32") else 2))


@executes("R2UR")
def to_uniform(x: Execution) -> None:
    """From a register that is the same in the warp's active threads."""
    x.write(0, x.integer(len(x) - 1))


@executes("S2R", "S2UR")
def special(x: Execution) -> None:
    """Where the thread is."""
    threads = np.arange(x.block.threads, dtype=np.uint32)
    values = {
        "SR_TID.X": threads,
        "SR_LANEID": threads % np.uint32(32),
        "SR_CTAID.X": x.full(x.block.block),
        "SR_CgaCtaId": x.full(0),  # no clusters
    }
    if x.ins.operands[1].text not in values:
        raise x.ins.refuse()
    x.write(0, values[x.ins.operands[1].text])


@executes("IMAD", "UIMAD", modifiers="MOV SHL IADD U32 X WIDE HI")
def multiply_add(x: Execution) -> None:
    """a * b + c; WIDE: with a product and a sum of 64 bits; HI: the upper word of the product."""
    carries = x.leading_predicates(1)
    at = 1 + carries
    a, b = x.integer(at), x.integer(at + 1)
    if not (x.has("WIDE") or x.has("HI")):
        if carries:
            raise x.ins.refuse()
        result = a * b + x.integer(at + 2)
        if x.has("X"):
            result = result + x.predicate(at + 3)
        return x.write(0, result)
    if x.has("X") or (carries and not x.has("U32")):
        raise x.ins.refuse()
    if x.has("U32"):
        product = wide(a) * wide(b)
    else:
        product = (as_signed(a).astype(np.int64) * as_signed(b).astype(np.int64)).view(np.uint64)
    if x.has("HI"):
        if carries or x.has("WIDE") or x.ins.operands[at + 2] != Operand("R", ZERO):
            raise x.ins.refuse()
        return x.write(0, high(product))
    total = product + x.pair(at + 2)
    x.write_pair(0, total)
    if carries:
        x.write_predicate(1, total < product)


@executes("IADD3", "UIADD3", modifiers="X")
def add3(x: Execution) -> None:
    """a + b + c and the carries in (X); the carries out count what exceeds 32 bits."""
    outs = x.leading_predicates(1)
    at = 1 + outs
    total = x.full(0, np.uint64)
    for i in range(at, at + 3):
        op = x.ins.operands[i]
        if op.negative:
            if x.has("X"):
                raise x.ins.refuse()
            total = total + wide(~x.raw(i)) + np.uint64(1)  # so that minus 0 carries
        else:
            total = total + wide(x.integer(i))
    for i in range(at + 3, len(x)):
        if not x.has("X"):
            raise x.ins.refuse()
        total = total + x.predicate(i)
    x.write(0, low(total))
    for k in range(outs):
        x.write_predicate(1 + k, (total >> SHIFT) > np.uint64(k))


@executes("VIADD", "UVIADD")
def add(x: Execution) -> None:
    """a + b."""
    x.write(0, x.integer(1) + x.integer(2))


def ordered(x: Execution, value: np.ndarray) -> np.ndarray:
    """For comparisons: with a sign unless the instruction says U32."""
    return value if x.has("U32") else as_signed(value)


@executes("VIMNMX", "IMNMX", modifiers="U32")
def minimum_or_maximum(x: Execution) -> None:
    """The smaller where the predicate holds, else the larger. Which one it was is never asked here."""
    at = 1 + x.leading_predicates(1)
    if any(op.index != TRUE or op.negative for op in x.ins.operands[1:at]):
        raise x.ins.refuse()
    a, b = ordered(x, x.integer(at)), ordered(x, x.integer(at + 1))
    x.write(0, np.where(x.predicate(at + 2), np.minimum(a, b), np.maximum(a, b)))


@executes("VIADDMNMX", modifiers="U32")
def add_minimum_or_maximum(x: Execution) -> None:
    """The smaller or larger of a + b and c."""
    a, b = ordered(x, x.integer(1) + x.integer(2)), ordered(x, x.integer(3))
    x.write(0, np.where(x.predicate(4), np.minimum(a, b), np.maximum(a, b)))


@executes("LEA", "ULEA", modifiers="HI X SX32")
def scaled_add(x: Execution) -> None:
    """(a << shift) + b; HI: with the upper word of the shifted pair."""
    outs = x.leading_predicates(1)
    at = 1 + outs
    a, b = x.integer(at), x.integer(at + 1)
    if not x.has("HI"):
        if x.has("X") or x.has("SX32"):
            raise x.ins.refuse()
        total = wide(a << x.integer(at + 2)) + wide(b)
        end = at + 3
    else:
        if x.has("SX32"):
            upper = (as_signed(a) >> 31).view(np.uint32)
            end = at + 3
        else:
            upper = x.integer(at + 2)
            end = at + 4
        shifted = (wide(upper) << SHIFT | wide(a)) << wide(x.integer(end - 1))
        total = (shifted >> SHIFT) + wide(b)
    for i in range(end, len(x)):
        if not x.has("X"):
            raise x.ins.refuse()
        total = total + x.predicate(i)
    x.write(0, low(total))
    for k in range(outs):
        x.write_predicate(1 + k, (total >> SHIFT) > np.uint64(k))


@executes("SHF", "USHF", modifiers="L R HI U32 S32 U64 S64 W")
def funnel_shift(x: Execution) -> None:
    """The pair of operands 3 and 1, shifted by operand 2; HI: the upper word of it."""
    pair = wide(x.integer(3)) << SHIFT | wide(x.integer(1))
    limit = 64 if x.has("U64") or x.has("S64") else 32
    by = wide(x.integer(2))
    by = by % np.uint64(limit) if x.has("W") else np.minimum(by, np.uint64(limit))
    if (by[x.mask] == 64).any():
        raise x.ins.refuse()
    if x.has("L"):
        pair = pair << by
    elif x.has("S32") or x.has("S64"):
        pair = (pair.view(np.int64) >> by.view(np.int64)).view(np.uint64)
    else:
        pair = pair >> by
    x.write(0, high(pair) if x.has("HI") else low(pair))


@executes("SEL", "USEL")
def select(x: Execution) -> None:
    """a where the predicate holds, else b."""
    x.write(0, np.where(x.predicate(3), x.integer(1), x.integer(2)))


RELATIONS = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal, "NE": np.not_equal,
}  # fmt: skip
COMBINE = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}


@executes("ISETP", "UISETP", modifiers="LT LE GT GE EQ NE AND OR XOR U32 EX")
def compare(x: Execution) -> None:
    """A relation; EX: of 64 bits, whose lower words have been compared."""
    names = [name for name in x.ins.modifiers if name not in ("U32", "EX")]
    relation, combine = names
    a, b = ordered(x, x.integer(2)), ordered(x, x.integer(3))
    if x.has("EX"):
        of_lower = x.predicate(5)
        if relation == "NE":
            result = (a != b) | of_lower
        elif relation == "EQ":
            result = (a == b) & of_lower
        else:
            result = RELATIONS[relation[0] + "T"](a, b) | (a == b) & of_lower
    else:
        result = RELATIONS[relation](a, b)
    x.write_two_predicates(result, x.predicate(4), COMBINE[combine])


def lookup(table: int, *inputs: np.ndarray) -> np.ndarray:
    """A function of three truth values, or of three words bit by bit, from its truth table."""
    a, b, c = inputs
    result = a & ~a
    for k in range(8):
        if table >> k & 1:
            result = result | (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return result


@executes("LOP3", "ULOP3", modifiers="LUT")
def logic(x: Execution) -> None:
    """Any function of three words, bit by bit, and whether a bit is set in the result."""
    outs = x.leading_predicates(0)
    result = lookup(x.ins.operands[outs + 4].index, *(x.integer(outs + k) for k in (1, 2, 3)))
    x.write(outs, result)
    if outs:
        known = outs == 1 and len(x) == 7 and x.ins.operands[6].index == TRUE and x.ins.operands[6].negative
        if not known:
            raise x.ins.refuse()
        x.write_predicate(0, result != 0)


@executes("PLOP3", "UPLOP3", modifiers="LUT")
def predicate_logic(x: Execution) -> None:
    """Two functions of three predicates."""
    inputs = [x.predicate(k) for k in (2, 3, 4)]
    results = [lookup(x.ins.operands[k].index, *inputs) for k in (5, 6)]
    for k, result in enumerate(results):
        x.write_predicate(k, result)


@executes("PRMT", "UPRMT")
def permute_bytes(x: Execution) -> None:
    """Four bytes, each chosen from the eight of a and c or made of its sign."""
    pair = wide(x.integer(3)) << SHIFT | wide(x.integer(1))
    selector, result = x.integer(2), x.full(0)
    for k in range(4):
        choice = selector >> np.uint32(4 * k) & np.uint32(15)
        byte = (pair >> (wide(choice & np.uint32(7)) * np.uint64(8))).astype(np.uint32) & np.uint32(0xFF)
        of_sign = np.where(byte >> np.uint32(7) != 0, np.uint32(0xFF), np.uint32(0))
        result |= np.where(choice & np.uint32(8) != 0, of_sign, byte) << np.uint32(8 * k)
    x.write(0, result)


@executes("P2R")
def predicates_to_register(x: Execution) -> None:
    """The predicates in a mask as bits."""
    if x.ins.operands[1].text != "PR":
        raise x.ins.refuse()
    mask, packed = x.integer(3), x.full(0)
    for k in range(7):
        packed |= x.block.P[k].astype(np.uint32) << np.uint32(k)
    x.write(0, x.integer(2) & ~mask | packed & mask)


@executes("R2P")
def register_to_predicates(x: Execution) -> None:
    """Bits as the predicates in a mask."""
    op = x.ins.operands[2]
    if x.ins.operands[0].text != "PR" or op.kind != "int":
        raise x.ins.refuse()
    for k in range(7):
        if op.index >> k & 1:
            np.copyto(x.block.P[k], (x.integer(1) >> np.uint32(k) & np.uint32(1)) != 0, where=x.mask)
