"""What a block of threads holds: registers, predicates, shared and global memory; and how operands are read from them.

Each register is an array with an entry for each thread, so one operation of numpy executes an instruction for the
whole block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from bench.sass.program import TRUE, ZERO, Instruction, Operand

WARP = 32
SHARED_BYTES = 49 * 1024  # a block's, and a KiB below that the system keeps from sm_90 on

Semantics = Callable[["Execution"], None]
SEMANTICS: dict[str, tuple[frozenset[str], Semantics]] = {}


def executes(*opcodes: str, modifiers: str = "") -> Callable[[Semantics], Semantics]:
    """Registers a function as the meaning of instructions; any modifier that is not named is refused."""

    def register(function: Semantics) -> Semantics:
        for opcode in opcodes:
            SEMANTICS[opcode] = (frozenset(modifiers.split()), function)
        return function

    return register


class BadAccess(Exception):
    """A kernel reached memory that it was not given, or that it had not written."""


class Memory:
    """Global memory: numpy arrays at made-up addresses."""

    def __init__(self) -> None:
        self._buffers: list[tuple[int, np.ndarray]] = []
        self._next = 0x7F0000000000

    def place(self, data: np.ndarray, misaligned_by: int = 0) -> int:
        """Gives `data`, which is used in place, an address: a multiple of 256 and `misaligned_by` bytes more."""
        address = self._next + misaligned_by
        self._buffers.append((address, data.reshape(-1).view(np.uint8)))
        self._next += -(-(data.nbytes + misaligned_by) // 4096) * 4096 + 4096
        return address

    def _pieces(self, addresses: np.ndarray, width: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each buffer that is reached its bytes, which of the addresses are in it, and the index of each byte."""
        if (addresses % width).any():
            raise BadAccess(f"misaligned access of {width} bytes")
        starts = np.array([start for start, _ in self._buffers], np.uint64)
        numbers = np.searchsorted(starts, addresses, side="right") - 1
        for number in np.unique(numbers):
            start, data = self._buffers[number]
            here = numbers == number
            offsets = addresses[here].astype(np.int64) - start
            if number < 0 or (offsets + width > len(data)).any():
                raise BadAccess(f"{width} bytes at 0x{int(addresses[here].max()):x} are outside of every buffer")
            yield data, here, offsets[:, None] + np.arange(width)

    def load(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """`width` bytes from each address."""
        result = np.empty((len(addresses), width), np.uint8)
        for data, here, index in self._pieces(addresses, width):
            result[here] = data[index]
        return result

    def store(self, addresses: np.ndarray, source: np.ndarray) -> None:
        """A row of bytes to each address."""
        for data, here, index in self._pieces(addresses, source.shape[1]):
            data[index] = source[here]


@dataclass
class Block:
    """The state of one block."""

    threads: int
    block: int  # blockIdx.x
    constants: dict[int, bytes]  # by bank; in bank 0 what the driver writes, then the parameters
    memory: Memory
    R: np.ndarray = field(init=False)
    UR: np.ndarray = field(init=False)
    P: np.ndarray = field(init=False)
    UP: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        assert self.threads % WARP == 0
        self.R, self.UR = (np.zeros((256, self.threads), np.uint32) for _ in range(2))
        self.P, self.UP = (np.zeros((8, self.threads), bool) for _ in range(2))
        self.P[TRUE] = self.UP[TRUE] = True
        self.shared = np.full(SHARED_BYTES, 0xFF, np.uint8)  # NaN until something is written
        self.banks = {bank: np.frombuffer(data, np.uint8) for bank, data in self.constants.items()}

    def whole_warps(self, mask: np.ndarray) -> np.ndarray:
        """All threads of the warps of which some are in `mask`: uniform registers belong to the warp."""
        return mask.reshape(-1, WARP).any(1).repeat(WARP)


def as_signed(x: np.ndarray) -> np.ndarray:
    """32 bits as a number with a sign."""
    return x.view(np.int32)


@dataclass
class Execution:
    """One instruction, executed by the threads in `mask`. Operands are counted from 0."""

    ins: Instruction
    block: Block
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.ins.operands)

    def has(self, modifier: str) -> bool:
        """Whether the opcode has this modifier."""
        return modifier in self.ins.modifiers

    def full(self, value: int, dtype: type = np.uint32) -> np.ndarray:
        """The same value in each thread."""
        return np.full(self.block.threads, value, dtype)

    # ---- reading

    def _plain(self, op: Operand, suffixes: tuple[str, ...] = ("",)) -> None:
        if op.suffix not in suffixes:
            raise self.ins.refuse()

    def register(self, op: Operand, further: int = 0) -> np.ndarray:
        """A register's bits, or those of the one `further` behind it."""
        if op.index == ZERO:
            return self.full(0)
        return (self.block.R if op.kind == "R" else self.block.UR)[op.index + further]

    def constant(self, op: Operand, width: int) -> list[np.ndarray]:
        """`width` bytes of a bank of constants as words."""
        if op.bank not in self.block.banks:
            raise self.ins.refuse()
        bank = self.block.banks[op.bank]
        at = self.full(op.offset, np.int64)
        for base in op.base:
            self._plain(base)
            at = at + as_signed(self.register(base))
        inside = (at[self.mask] >= 0) & (at[self.mask] + width <= len(bank))
        if not inside.all():
            raise BadAccess(f"constants outside of the parameters: {self.ins.text}")
        index = np.where(self.mask, at, 0)[:, None] + np.arange(width)
        return as_words(bank[index])

    def raw(self, i: int) -> np.ndarray:
        """The 32 bits of operand i, its sign not yet applied."""
        op = self.ins.operands[i]
        if op.kind in ("R", "UR"):
            return self.register(op)
        if op.kind == "int":
            return self.full(op.index)
        if op.kind == "c":
            return self.constant(op, 4)[0]
        raise self.ins.refuse()

    def integer(self, i: int) -> np.ndarray:
        """Operand i as 32 bits of an integer."""
        op = self.ins.operands[i]
        self._plain(op)
        x = self.raw(i)
        if op.absolute:
            raise self.ins.refuse()
        if op.inverted:
            return ~x
        return (~x + np.uint32(1)) if op.negative else x

    def raw_pair(self, i: int) -> np.ndarray:
        """The 64 bits of operand i: two registers, or constants."""
        op = self.ins.operands[i]
        self._plain(op, ("", "64"))
        if op.inverted:
            raise self.ins.refuse()
        if op.kind in ("R", "UR"):
            low, high = self.register(op), self.register(op, 1)
        elif op.kind == "c":
            low, high = self.constant(op, 8)
        else:
            raise self.ins.refuse()
        return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)

    def pair(self, i: int) -> np.ndarray:
        """Operand i as 64 bits of an integer."""
        op = self.ins.operands[i]
        if op.negative or op.absolute:
            raise self.ins.refuse()
        return self.raw_pair(i)

    def predicate(self, i: int) -> np.ndarray:
        """Operand i as a truth value."""
        return self.truth(self.ins.operands[i])

    def truth(self, op: Operand) -> np.ndarray:
        """A predicate's truth value."""
        if op.kind not in ("P", "UP"):
            raise self.ins.refuse()
        value = (self.block.P if op.kind == "P" else self.block.UP)[op.index]
        return ~value if op.negative else value

    def addresses(self, i: int) -> np.ndarray:
        """Where the address operand i points to."""
        op = self.ins.operands[i]
        total = self.full(op.offset % 2**64, np.uint64)
        for base in op.base:
            self._plain(base, ("", "64", "U32", "X4", "X8", "X16"))
            value = self.register(base).astype(np.uint64)
            if base.suffix == "64":
                value |= self.register(base, 1).astype(np.uint64) << np.uint64(32)
            elif base.suffix.startswith("X"):
                value = value * np.uint64(base.suffix[1:])
            total = total + value
        return total

    def leading_predicates(self, at: int) -> int:
        """How many of the operands from `at` on are predicates: optional further results."""
        count = 0
        while at + count < len(self) and self.ins.operands[at + count].kind in ("P", "UP"):
            count += 1
        return count

    # ---- writing

    def _target(self, op: Operand) -> np.ndarray:
        return self.block.whole_warps(self.mask) if op.kind.startswith("U") else self.mask

    def write(self, i: int, *words: np.ndarray) -> None:
        """Operand i, and the registers behind it, become these words."""
        op = self.ins.operands[i]
        if op.kind not in ("R", "UR") or op.suffix:
            raise self.ins.refuse()
        if op.index == ZERO:
            return
        bank = self.block.R if op.kind == "R" else self.block.UR
        for k, word in enumerate(words):
            value = word.view(np.uint32)
            if op.kind == "UR":
                value = self.uniform(value)
            np.copyto(bank[op.index + k], value, where=self._target(op))

    def write_pair(self, i: int, value: np.ndarray) -> None:
        """Operand i and the register behind it become these 64 bits."""
        bits = value.view(np.uint64)
        self.write(i, bits.astype(np.uint32), (bits >> np.uint64(32)).astype(np.uint32))

    def write_predicate(self, i: int, value: np.ndarray) -> None:
        """Operand i becomes this truth value."""
        op = self.ins.operands[i]
        if op.kind not in ("P", "UP") or op.negative:
            raise self.ins.refuse()
        if op.index == TRUE:
            return
        if op.kind == "UP":
            value = self.uniform(value)
        np.copyto((self.block.P if op.kind == "P" else self.block.UP)[op.index], value, where=self._target(op))

    def write_two_predicates(self, result: np.ndarray, further: np.ndarray, combine: np.ufunc) -> None:
        """What a comparison leaves: its result and the opposite, each combined with a further predicate."""
        results = combine(result, further), combine(~result, further)  # both before a write: `further` may be a result
        for i, value in enumerate(results):
            self.write_predicate(i, value)

    def uniform(self, value: np.ndarray) -> np.ndarray:
        """The value that the active threads of each warp share, in all of its threads."""
        values, active = value.reshape(-1, WARP), self.mask.reshape(-1, WARP)
        first = np.take_along_axis(values, active.argmax(1)[:, None], 1)
        if ((values != first) & active).any():
            raise self.ins.refuse()
        return np.broadcast_to(first, values.shape).reshape(-1)


def as_words(data: np.ndarray) -> list[np.ndarray]:
    """Rows of bytes as words, the last one filled up with zeros."""
    count, width = data.shape
    if width % 4:
        filled = np.zeros((count, 4), np.uint8)
        filled[:, :width] = data
        data = filled
    words = np.ascontiguousarray(data).view(np.uint32)
    return [words[:, k] for k in range(words.shape[1])]
