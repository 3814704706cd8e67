"""Executes one block of a kernel and writes down which instructions each of its warps issues.

A warp whose threads have parted issues an instruction once for each part; parts that meet go on together. Of the
threads that may go on, those at the lowest address do; at BSYNC they wait for those that met the same BSSY.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bench.sass import doubles, floats, integers, memory  # noqa: F401  (they register the semantics)
from bench.sass.machine import SEMANTICS, WARP, Block, Execution
from bench.sass.program import Instruction, Program

LIMIT = 200_000  # steps, after which a kernel counts as one that never ends

# Nothing to be done for them where nothing overlaps and no result is late.
NO_EFFECT = {"NOP", "YIELD", "DEPBAR", "MEMBAR", "ERRBAR"}


@dataclass(frozen=True)
class Issue:
    """An instruction that a warp issued; `guarded`: no thread was allowed to execute it."""

    ins: Instruction
    guarded: bool


class Deadlock(Exception):
    """Every thread waits for another one."""


@dataclass
class Walk:
    """A block on its way through a program."""

    program: Program
    block: Block
    issued: list[list[Issue]] = field(init=False)  # for each warp

    def __post_init__(self) -> None:
        threads = self.block.threads
        self.issued = [[] for _ in range(threads // WARP)]
        self.at = np.zeros(threads, np.int64)  # the index of the next instruction
        self.alive = np.ones(threads, bool)
        self.waiting = np.zeros(threads, bool)  # at a barrier of any kind
        self.group = np.full((16, threads), -1)  # for each B register: the BSSY that was met last
        self.groups: list[np.ndarray] = []  # the threads that have to come to its BSYNC

    def run(self) -> Walk:
        """To the end of all threads."""
        with np.errstate(all="ignore"):
            for _ in range(LIMIT):
                if not self.alive.any():
                    return self
                self._step()
        raise Deadlock(f"{self.program.name} does not end")

    def _step(self) -> None:
        ready = self.alive & ~self.waiting
        if not ready.any():
            raise Deadlock(f"{self.program.name}: every thread waits")
        index = int(self.at[ready].min())
        ins = self.program.instruction(index)
        here = ready & (self.at == index)
        x = Execution(ins, self.block, here)
        mask = here if ins.guard is None else here & x.truth(ins.guard)
        x.mask = mask
        runs = mask.reshape(-1, WARP).any(1)
        for warp in np.flatnonzero(here.reshape(-1, WARP).any(1)):
            self.issued[warp].append(Issue(ins, not runs[warp]))
        self.at[here] = index + 1
        if not mask.any() or ins.opcode in NO_EFFECT:
            return
        control = getattr(self, f"_{ins.opcode.lower()}", None)
        if control is not None:
            return control(x, index)
        known = SEMANTICS.get(ins.opcode)
        if known is None or not known[0].issuperset(ins.modifiers):
            raise ins.refuse()
        known[1](x)

    # ---- control flow

    def _target(self, x: Execution) -> int:
        label = next((op.text for op in x.ins.operands if op.kind == "label"), None)
        if label not in self.program.labels:
            raise x.ins.refuse()
        return self.program.labels[label]

    def _whole(self, x: Execution) -> bool:
        """Whether all living threads of the warps in the mask are in it."""
        return bool((x.block.whole_warps(x.mask) & self.alive == x.mask).all())

    def _bra(self, x: Execution, index: int) -> None:
        if x.has("DIV"):
            if not self._whole(x):  # where threads have parted a copy of what follows runs, which is not known here
                raise x.ins.refuse()
            return
        if set(x.ins.modifiers) - {"U"}:
            raise x.ins.refuse()
        taken = x.mask
        for op in x.ins.operands[:-1]:
            taken = taken & x.truth(op)
        self.at[taken] = self._target(x)

    def _call(self, x: Execution, index: int) -> None:
        if x.ins.modifiers != ("REL", "NOINC"):
            raise x.ins.refuse()
        self.at[x.mask] = self._target(x)

    def _ret(self, x: Execution, index: int) -> None:
        if x.ins.modifiers != ("REL", "NODEC"):
            raise x.ins.refuse()
        self.at[x.mask] = x.register(x.ins.operands[0])[x.mask] // 16

    def _exit(self, x: Execution, index: int) -> None:
        self.alive &= ~x.mask
        for members in self.groups:
            members &= ~x.mask
        self._release_all()

    # ---- threads that wait for each other

    def _barrier_register(self, x: Execution) -> int:
        if x.ins.operands[0].kind != "B" or set(x.ins.modifiers) - {"RECONVERGENT", "RELIABLE"}:
            raise x.ins.refuse()
        return x.ins.operands[0].index

    def _bssy(self, x: Execution, index: int) -> None:
        self.group[self._barrier_register(x)][x.mask] = len(self.groups)
        self.groups.append(x.mask.copy())

    def _break(self, x: Execution, index: int) -> None:
        for group in np.unique(self.group[self._barrier_register(x)][x.mask]):
            self.groups[group] &= ~x.mask
        self._release_all()

    def _bsync(self, x: Execution, index: int) -> None:
        self._barrier_register(x)
        self._wait(x, index)

    def _warpsync(self, x: Execution, index: int) -> None:
        if x.ins.modifiers not in ((), ("ALL",)) or (not x.ins.modifiers and (~x.integer(0))[x.mask].any()):
            raise x.ins.refuse()
        self._wait(x, index)

    def _bar(self, x: Execution, index: int) -> None:
        if x.ins.modifiers[:1] != ("SYNC",) or len(x.ins.operands) != 1 or x.ins.operands[0].index != 0:
            raise x.ins.refuse()
        self._wait(x, index)

    def _wait(self, x: Execution, index: int) -> None:
        self.waiting |= x.mask
        self.at[x.mask] = index  # until it is released
        self._release_all()

    def _release_all(self) -> None:
        """Lets the threads go on whose fellows are all there."""
        for index in np.unique(self.at[self.waiting & self.alive]):
            here = self.waiting & self.alive & (self.at == index)
            ins = self.program.instruction(index)
            if ins.opcode == "BSYNC":
                numbers = self.group[ins.operands[0].index]
                for group in np.unique(numbers[here]):
                    if (here[self.groups[group]]).all():
                        self._release(here & (numbers == group), index)
            elif ins.opcode == "WARPSYNC":
                expected = self.block.whole_warps(here) & self.alive
                complete = ~self.block.whole_warps(expected & ~here)
                self._release(here & complete, index)
            elif (here == self.alive).all():
                self._release(here, index)

    def _release(self, threads: np.ndarray, index: int) -> None:
        self.waiting &= ~threads
        self.at[threads] = index + 1
