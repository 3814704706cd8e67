"""The semantics of instructions on doubles."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
from fractions import Fraction

import numpy as np

from bench.sass import floats
from bench.sass.integers import COMBINE
from bench.sass.machine import Execution, executes

NAN = np.uint64(0x7FFFFFFFFFFFFFFF)
SIGN = np.uint64(1 << 63)

_fma = ctypes.CDLL(ctypes.util.find_library("m")).fma
_fma.argtypes, _fma.restype = [ctypes.c_double] * 3, ctypes.c_double


def value(x: Execution, i: int) -> np.ndarray:
    """Operand i as a double."""
    op = x.ins.operands[i]
    if op.kind == "float":
        return x.full(0, np.float64) + float(op.text)
    bits = x.raw_pair(i)
    if op.absolute:
        bits = bits & ~SIGN
    if op.negative:
        bits = bits ^ SIGN
    return bits.view(np.float64)


def write(x: Execution, doubles: np.ndarray) -> None:
    """The result; see NOTE [NaN] in floats.py."""
    x.write_pair(0, np.where(np.isnan(doubles), NAN, doubles.view(np.uint64)))


def exact(a: float, b: float, c: float | None) -> Fraction:
    """a * b + c, or a * b."""
    return Fraction(a) * Fraction(b) + (Fraction(c) if c is not None else 0)


def multiply_add(x: Execution, a: np.ndarray, b: np.ndarray, c: np.ndarray | None) -> np.ndarray:
    """a * b (+ c), rounded once as the opcode says."""
    mode, result = floats.rounding_mode(x), x.full(0, np.float64)
    for k in np.flatnonzero(x.mask):
        operands = float(a[k]), float(b[k]), None if c is None else float(c[k])
        nearest = operands[0] * operands[1] if c is None else _fma(*operands)
        if mode != "RN" and math.isfinite(nearest):
            off = Fraction(nearest) - exact(*operands)
            if off > 0 and (mode == "RM" or mode == "RZ" and nearest > 0):
                nearest = math.nextafter(nearest, -math.inf)
            elif off < 0 and (mode == "RP" or mode == "RZ" and nearest < 0):
                nearest = math.nextafter(nearest, math.inf)
        result[k] = nearest
    return result


@executes("DADD")
def add(x: Execution) -> None:
    """a + b."""
    write(x, value(x, 1) + value(x, 2))


@executes("DMUL", modifiers="RP RM RZ")
def multiply(x: Execution) -> None:
    """a * b."""
    write(x, multiply_add(x, value(x, 1), value(x, 2), None))


@executes("DFMA", modifiers="RP RM RZ")
def fused(x: Execution) -> None:
    """a * b + c, rounded once."""
    write(x, multiply_add(x, value(x, 1), value(x, 2), value(x, 3)))


@executes("DSETP", modifiers="LT LE GT GE EQ NE LTU LEU GTU GEU EQU NEU NAN NUM AND OR XOR")
def compare(x: Execution) -> None:
    """A relation."""
    relation, combine = x.ins.modifiers
    result = floats.related(relation, value(x, 2), value(x, 3))
    x.write_two_predicates(result, x.predicate(4), COMBINE[combine])


@executes("F2F", modifiers="F64 F32 BF16 F16")
def convert(x: Execution) -> None:
    """From the type that is named last to the one that is named first."""
    to, source = x.ins.modifiers
    if (to, source) == ("F64", "F32"):
        write(x, floats.value(x, 1).astype(np.float64))
    elif (to, source) == ("F32", "F64"):
        floats.write(x, value(x, 1).astype(np.float32))
    elif source == "F32":
        x.write(0, (floats.to_bfloat16 if to == "BF16" else floats.to_half)(floats.value(x, 1)))
    else:
        raise x.ins.refuse()


@executes("FRND", modifiers="F64 TRUNC FLOOR CEIL")
def round_to_integer(x: Execution) -> None:
    """To an integer, as a double."""
    if not x.has("F64") or len(x.ins.modifiers) != 2:
        raise x.ins.refuse()
    write(x, {"TRUNC": np.trunc, "FLOOR": np.floor, "CEIL": np.ceil}[x.ins.modifiers[1]](value(x, 1)))
