"""The cycles of a block's warps up to their barriers and loads, as a model.

NOTE [cycles]
An instruction's upper bits hold what nvcc knows: how many cycles the warp stalls behind it, which scoreboards it waits
for, and which one its result will release. So all that is assumed is how long results take that come at no fixed time,
LATENCY below: rounded figures of published microbenchmarks for these architectures. A block is alone on its
multiprocessor, each warp has an issue slot when it wants one, and code is in the instruction cache; a real block is
slower.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.sass.walk import Issue

LATENCY = {
    "LDG": 350,  # the scalars on the device: found in the L2
    "LDC": 35, "LDCU": 35, "ULDC": 12, "LDS": 30, "S2R": 25, "S2UR": 25, "R2UR": 12, "SHFL": 25,
    "MUFU": 24, "FCHK": 20, "F2F": 20, "F2I": 20, "I2F": 20, "FRND": 20,
    "DADD": 16, "DMUL": 16, "DFMA": 16, "DSETP": 16,
}  # fmt: skip
OTHERWISE = 12
LOADED = 900  # a load of the main loop, while memory is busy
READ = 12  # until the operands of a store have been read
BARRIER = 20  # from the last warp's arrival until the others go on


@dataclass
class Clock:
    """One warp on its way."""

    issued: list[Issue]
    position: int = 0
    cycle: int = 0
    scoreboards: list[int] = field(default_factory=lambda: [0] * 8)
    first_load: int | None = None
    barriers: list[int] = field(default_factory=list)

    def run_to_barrier(self) -> bool:
        """Up to the next barrier of the block; whether there is one."""
        while self.position < len(self.issued):
            issue = self.issued[self.position]
            ins, control = issue.ins, issue.ins.control
            waits = [self.scoreboards[k] for k in range(6) if control.waits >> k & 1]
            self.cycle = max([self.cycle, *waits])
            if not issue.guarded:
                self._start(issue)
            self.cycle += max(1, control.stall)
            self.position += 1
            if ins.opcode == "BAR" and not issue.guarded:
                self.barriers.append(self.cycle)
                return True
        return False

    def _start(self, issue: Issue) -> None:
        ins, control = issue.ins, issue.ins.control
        latency = LATENCY.get(ins.opcode, OTHERWISE)
        if ins.opcode == "LDG" and ins.in_main_loop:
            latency = LOADED
            if self.first_load is None:
                self.first_load = self.cycle
        for scoreboard, takes in ((control.sets, latency), (control.read, READ)):
            if scoreboard != 7:
                self.scoreboards[scoreboard] = max(self.scoreboards[scoreboard], self.cycle + takes)


@dataclass(frozen=True)
class Timeline:
    """Cycles from the start of the block."""

    barrier: int  # until the last warp is at the first barrier before the main loop's loads; 0 without one
    first_load: int  # until the last warp has its first load of the main loop under way
    end: int  # until the last warp is done


def timeline(issued: list[list[Issue]]) -> Timeline:
    """The model of a block from what each warp issued."""
    clocks = [Clock(issues) for issues in issued]
    barrier = 0
    while waiting := [clock for clock in clocks if clock.run_to_barrier()]:
        meet = max(clock.cycle for clock in waiting)
        if not barrier and any(clock.first_load is None for clock in clocks):
            barrier = meet
        for clock in waiting:
            clock.cycle = meet + BARRIER
    return Timeline(barrier, max(clock.first_load or 0 for clock in clocks), max(clock.cycle for clock in clocks))
