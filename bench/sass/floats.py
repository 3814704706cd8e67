"""The semantics of instructions on floats of 32 and 16 bits, and of the conversions.

NOTE [approximations]
MUFU gives approximations whose bits NVIDIA does not specify. What nvcc builds from them, the IEEE division and root, is
correctly rounded for any approximation that is off by at most one unit in the last place; so the nearest float stands
for it here, and a test shows that one unit more or less changes nothing. Where a kernel used MUFU's result as it is,
its bits would differ from a GPU's.

NOTE [NaN]
A GPU gives one NaN whatever the operands: all bits but the sign.
"""

from __future__ import annotations

import math

import numpy as np

from bench.sass.integers import COMBINE, RELATIONS
from bench.sass.machine import Execution, as_signed, executes

NAN = np.uint32(0x7FFFFFFF)
SIGN = np.uint32(0x80000000)
APPROXIMATION_ERROR = 0  # units in the last place, added to each result of MUFU: for the test


def value(x: Execution, i: int) -> np.ndarray:
    """Operand i as a float."""
    op = x.ins.operands[i]
    if op.kind == "float":
        return x.full(0).view(np.float32) + np.float32(op.text)
    if op.suffix or op.inverted:
        raise x.ins.refuse()
    bits = x.raw(i)
    if op.absolute:
        bits = bits & ~SIGN
    if op.negative:
        bits = bits ^ SIGN
    floats = bits.view(np.float32)
    return flushed(floats) if x.has("FTZ") else floats


def flushed(floats: np.ndarray) -> np.ndarray:
    """Subnormals as zeros with their sign."""
    tiny = np.abs(floats) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), floats), floats)


def write(x: Execution, floats: np.ndarray, i: int = 0) -> None:
    """Operand i becomes these floats: NOTE [NaN]."""
    if x.has("FTZ"):
        floats = flushed(floats)
    x.write(i, np.where(np.isnan(floats), NAN, floats.view(np.uint32)))


@executes("FADD", modifiers="FTZ")
def add(x: Execution) -> None:
    """a + b."""
    write(x, value(x, 1) + value(x, 2))


@executes("FMUL", modifiers="FTZ")
def multiply(x: Execution) -> None:
    """a * b."""
    write(x, value(x, 1) * value(x, 2))


def exact_as_odd(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in double, rounded to odd: rounding that to float gives what rounding the exact sum would."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)  # the product is exact
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    even = total.view(np.int64) & 1 == 0
    return np.where((error != 0) & even & np.isfinite(total), np.nextafter(total, np.copysign(np.inf, error)), total)


def rounded(exact: np.ndarray, mode: str) -> np.ndarray:
    """A double as float: to the nearest, to zero (RZ), up (RP) or down (RM)."""
    nearest = exact.astype(np.float32)
    if mode == "RN":
        return nearest
    above, below = nearest > exact, nearest < exact
    down, up = np.nextafter(nearest, np.float32(-np.inf)), np.nextafter(nearest, np.float32(np.inf))
    if mode == "RM" or mode == "RZ":
        nearest = np.where(above & ((mode == "RM") | (exact > 0)), down, nearest)
    if mode == "RP" or mode == "RZ":
        nearest = np.where(below & ((mode == "RP") | (exact < 0)), up, nearest)
    return nearest


def rounding_mode(x: Execution) -> str:
    """The rounding that the opcode names."""
    return next((name for name in ("RZ", "RP", "RM") if x.has(name)), "RN")


@executes("FFMA", modifiers="FTZ RZ RP RM")
def fused(x: Execution) -> None:
    """a * b + c, rounded once."""
    write(x, rounded(exact_as_odd(value(x, 1), value(x, 2), value(x, 3)), rounding_mode(x)))


@executes("FSEL")
def select(x: Execution) -> None:
    """a where the predicate holds, else b; the bits as they are."""
    x.write(0, np.where(x.predicate(3), value(x, 1).view(np.uint32), value(x, 2).view(np.uint32)))


def related(relation: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A relation of floats; with a U at its end it holds for NaN, too."""
    nan = np.isnan(a) | np.isnan(b)
    if relation in ("NAN", "NUM"):
        return nan if relation == "NAN" else ~nan
    if relation.endswith("U"):
        return RELATIONS[relation[:-1]](a, b) | nan
    return RELATIONS[relation](a, b) & ~nan


@executes("FSETP", modifiers="FTZ LT LE GT GE EQ NE LTU LEU GTU GEU EQU NEU NAN NUM AND OR XOR")
def compare(x: Execution) -> None:
    """A relation."""
    relation, combine = (name for name in x.ins.modifiers if name != "FTZ")
    result = related(relation, value(x, 2), value(x, 3))
    x.write_two_predicates(result, x.predicate(4), COMBINE[combine])


@executes("FSET", modifiers="BF LT LE GT GE EQ NE LTU LEU GTU GEU EQU NEU NAN NUM AND OR XOR")
def compare_to_float(x: Execution) -> None:
    """A relation as 1 or 0."""
    if x.ins.modifiers[0] != "BF":
        raise x.ins.refuse()
    relation, combine = x.ins.modifiers[1:]
    result = COMBINE[combine](related(relation, value(x, 1), value(x, 2)), x.predicate(3))
    write(x, result.astype(np.float32))


@executes("FMNMX")
def minimum_or_maximum(x: Execution) -> None:
    """The smaller where the predicate holds, else the larger; a NaN loses."""
    a, b = value(x, 1), value(x, 2)
    write(x, np.where(x.predicate(3), np.fmin(a, b), np.fmax(a, b)))


FUNCTIONS = {
    "RCP": lambda x: 1 / x,
    "RSQ": lambda x: 1 / np.sqrt(x),
    "SQRT": np.sqrt,
    "EX2": np.exp2,
    "LG2": np.log2,
}


@executes("MUFU", modifiers=" ".join([*FUNCTIONS, "RCP64H", "RSQ64H"]))
def approximate(x: Execution) -> None:
    """See NOTE [approximations]. RCP64H and RSQ64H take and give the upper words of doubles."""
    (name,) = x.ins.modifiers
    if name.endswith("64H"):
        doubles = (x.raw(1).astype(np.uint64) << np.uint64(32)).view(np.float64)
        result = FUNCTIONS[name[:3]](doubles)
        return x.write(0, (result.view(np.uint64) >> np.uint64(32)).astype(np.uint32))
    result = FUNCTIONS[name](value(x, 1).astype(np.float64)).astype(np.float32)
    for _ in range(abs(APPROXIMATION_ERROR)):
        result = np.nextafter(result, np.float32(math.copysign(math.inf, APPROXIMATION_ERROR)))
    write(x, result)


@executes("FCHK")
def needs_slow_division(x: Execution) -> None:
    """Whether a / b may leave the range of the fast path.

    The exact bounds are not documented; these are narrower than any that a fast path could have, and both paths give
    the same quotient.
    """
    a, b = (np.abs(value(x, i).astype(np.float64)) for i in (1, 2))
    with np.errstate(invalid="ignore"):
        fast = (b > 2.0**-60) & (b < 2.0**60) & (a < 2.0**60) & ((a > 2.0**-60) | (a == 0))
    x.write_predicate(0, ~fast)


# ---- Conversions


def to_bfloat16(floats: np.ndarray) -> np.ndarray:
    """To the nearest, to even; the 16 bits in a word."""
    bits = floats.view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
    return np.where(np.isnan(floats), np.uint32(0x7FFF), nearest)


def to_half(floats: np.ndarray) -> np.ndarray:
    """To the nearest, to even; the 16 bits in a word."""
    halves = floats.astype(np.float16).view(np.uint16).astype(np.uint32)
    return np.where(np.isnan(floats), np.uint32(0x7FFF), halves)


@executes("F2FP", modifiers="BF16 F16 F32 PACK_AB")
def pack(x: Execution) -> None:
    """Two floats as two halves, the first one on top."""
    narrow = to_bfloat16 if x.has("BF16") else to_half
    x.write(0, narrow(value(x, 1)) << np.uint32(16) | narrow(value(x, 2)))


@executes("HADD2", modifiers="F32")
def widen_half(x: Execution) -> None:
    """Only as it widens: minus zero and a half, to a float."""
    zero, op = x.ins.operands[1:3]
    if not x.has("F32") or not (zero.negative and zero.kind == "R" and zero.index == 255) or op.negative or op.absolute:
        raise x.ins.refuse()
    if op.suffix not in ("H0_H0", "H1_H1"):
        raise x.ins.refuse()
    halves = (x.register(op) >> np.uint32(16 if op.suffix == "H1_H1" else 0)).astype(np.uint16)
    write(x, halves.view(np.float16).astype(np.float32))


@executes("HFMA2", modifiers="MMA")
def constant_halves(x: Execution) -> None:
    """Only as it makes a constant: minus zero times zero and two halves."""
    a, b, upper, lower = x.ins.operands[1:5]
    zeros = a.kind == b.kind == "R" and a.index == b.index == 255 and a.negative and not b.negative
    if not zeros or upper.kind != "float" or lower.kind != "float":
        raise x.ins.refuse()
    upper, lower = (int(np.float16(op.text).view(np.uint16)) for op in (upper, lower))
    x.write(0, x.full(upper << 16 | lower))


def part(x: Execution, i: int, width: int) -> np.ndarray:
    """The part of operand i that its suffix names: a byte (B0 to B3) or a half (H0, H1)."""
    op = x.ins.operands[i]
    names = [f"{'B' if width == 8 else 'H'}{k}" for k in range(32 // width)]
    if op.kind != "R" or op.negative or op.suffix not in ("", *names):
        raise x.ins.refuse()
    return x.register(op) >> np.uint32(width * (names.index(op.suffix) if op.suffix else 0))


@executes("I2F", "I2FP", modifiers="S8 S16 S32 U32 F32")
def from_integer(x: Execution) -> None:
    """To the nearest float."""
    if x.has("S8"):
        numbers = part(x, 1, 8).astype(np.uint8).view(np.int8)
    elif x.has("S16"):
        numbers = part(x, 1, 16).astype(np.uint16).view(np.int16)
    elif x.has("U32"):
        numbers = x.integer(1)
    else:
        numbers = as_signed(x.integer(1))
    write(x, numbers.astype(np.float64).astype(np.float32))


@executes("F2I", modifiers="TRUNC NTZ FTZ U32")
def to_integer(x: Execution) -> None:
    """Towards zero; only what fits."""
    numbers = np.trunc(value(x, 1).astype(np.float64))
    low, high = (0, 2**32 - 1) if x.has("U32") else (-(2**31), 2**31 - 1)
    fits = (numbers >= low) & (numbers <= high)
    if not x.has("TRUNC") or not fits[x.mask].all():
        raise x.ins.refuse()
    x.write(0, np.where(fits, numbers, 0).astype(np.int64).astype(np.uint32))
