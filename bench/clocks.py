"""Clocks of a host and of a device behind one interface: seconds of a call, and of calls one after the other.

NOTE [host time apart from device time]
A GPU runs what the host has queued. On an idle stream the first event counts at once, and every kernel that is shorter
than a launch waits for the next launch, so a span of short kernels would hold the host's time. ``seconds`` therefore
queues a kernel that only spins, then the events with the call between them: the device finds everything queued.
``from_idle`` measures the host by itself. A stream holds about a thousand launches; of a call with more, or of one that
waits for the device, host time cannot be kept out, and ``queued_ahead`` says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from bench import gpu

Call = Callable[[], None]


class HostClock:
    """Seconds of a call that has finished when it returns; ``now`` is the clock that all share."""

    now: Callable[[], float] = time.perf_counter

    def seconds(self, call: Call) -> float:
        return self.spans([call])[0]

    def spans(self, calls: Sequence[Call]) -> list[float]:
        """Seconds of each of some calls, made one after the other."""
        now = HostClock.now
        marks = [now()]
        for call in calls:
            call()
            marks.append(now())
        return [after - before for before, after in zip(marks, marks[1:])]


class DeviceClock:
    """Seconds on the device's stream around calls that only queue work.

    Args:
        flush: the L2 is overwritten before each timed span of ``seconds``, outside of it: what a forward and backward
            between two passes do to it.
        device: whose L2.
    """

    # Cycles of a multiprocessor in a second: as many as the fastest one has, so a spin is not shorter than asked for.
    CYCLES = 2.1e9
    LONGEST_SPIN = 0.05

    def __init__(self, flush: bool = False, device: torch.device | None = None) -> None:
        self._start = torch.cuda.Event(enable_timing=True)
        self._stop = torch.cuda.Event(enable_timing=True)
        self._flush = None
        if flush:
            device = device or torch.device("cuda")
            self._flush = gpu.flusher(device, gpu.cache_bytes(device))
        self._spin = 1e-3
        self.queued_ahead = False

    def seconds(self, call: Call) -> float:
        """Device seconds of a call; ``queued_ahead``: all of it was queued before the device began with it."""
        torch.cuda.synchronize()
        if self._flush is not None:
            self._flush.zero_()
        torch.cuda._sleep(int(self._spin * self.CYCLES))
        self._start.record()
        begin = time.perf_counter()
        call()
        self._stop.record()
        queueing = time.perf_counter() - begin
        self.queued_ahead = not self._start.query()
        if not self.queued_ahead:
            self._spin = min(self.LONGEST_SPIN, max(self._spin, 2 * queueing))
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) * 1e-3

    def from_idle(self, call: Call) -> tuple[float, float]:
        """Seconds until a call is queued, and until it is finished, where the device has nothing else to do."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        queued = time.perf_counter()
        torch.cuda.synchronize()
        return queued - begin, time.perf_counter() - begin

    def spans(self, calls: Sequence[Call]) -> list[float]:
        """Device seconds of each of some calls, queued one after the other, with one synchronisation at the end."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        for call, mark in zip(calls, marks[1:]):
            call()
            mark.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) * 1e-3 for before, after in zip(marks, marks[1:])]


def clock_for(device: torch.device, flush: bool = False) -> HostClock | DeviceClock:
    return DeviceClock(flush, device) if gpu.serves(device) else HostClock()
