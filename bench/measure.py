"""What is measured: alternately, with quantiles, next to the memory bus; and what a step allocates and calls.

NOTE [alternate, then compare pairs]
A machine's speed drifts: other jobs, clocks, temperature. Providers therefore run in turn, A B C A B C, and a ratio is
the median over the rounds of the ratio within one round, never a ratio of two medians.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import gpu
from bench.clocks import DeviceClock, HostClock, clock_for

__all__ = ["DeviceClock", "HostClock", "clock_for"]  # with everything below: what is measured is asked for in one place

Sample = dict[str, float]


@dataclass(frozen=True)
class Quantiles:
    """The median, the 20 % and the 80 % quantile of some samples."""

    median: float
    q20: float
    q80: float
    samples: int

    @property
    def spread(self) -> float:
        """Width of the middle 60 % over the median."""
        return (self.q80 - self.q20) / self.median if self.median else 0.0


def quantiles(samples: Sequence[float]) -> Quantiles:
    """Of samples in any order, interpolated linearly."""
    ordered = sorted(samples)

    def at(fraction: float) -> float:
        position = fraction * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    return Quantiles(at(0.5), at(0.2), at(0.8), len(ordered))


# ---- Rounds --------------------------------------------------------------------------------------------------------


def alternate(
    candidates: dict[str, Callable[[], Sample]],
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 200,
    after_round: Callable[[], None] = lambda: None,
    failures: dict[str, str] | None = None,
) -> list[dict[str, Sample]]:
    """Runs the candidates in turn until the time is used up; returns what each one reported, round by round.

    Args:
        candidates: name -> a call that runs once and returns what it measured. Warmed up by the caller.
        seconds: no round starts after this time, once there are ``min_rounds``.
        failures: gets the reason of a candidate that raises, which takes no part from then on and in no round; without
            it the error goes on.
    """
    candidates = dict(candidates)
    rounds: list[dict[str, Sample]] = []
    start = time.perf_counter()
    while len(rounds) < max_rounds and (len(rounds) < min_rounds or time.perf_counter() - start < seconds):
        record: dict[str, Sample] = {}
        for name, call in list(candidates.items()):
            try:
                record[name] = call()
            except Exception as error:
                if failures is None:
                    raise
                failures[name] = reason_of(error)
                del candidates[name]
        rounds.append(record)
        after_round()
    return [{name: sample for name, sample in record.items() if name in candidates} for record in rounds]


def reason_of(error: Exception) -> str:
    """One line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def values(rounds: Sequence[dict[str, Sample]], name: str, metric: str) -> list[float]:
    """One candidate's metric over the rounds in which it took part."""
    return [record[name][metric] for record in rounds if name in record]


def paired_ratios(rounds: Sequence[dict[str, Sample]], name: str, other: str, metric: str = "step") -> list[float]:
    """The other's time over this one's, in each round in which both took part: above 1 this one is faster."""
    return [record[other][metric] / record[name][metric] for record in rounds if name in record and other in record]


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Within the block ``count`` other processes each want a core for themselves."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


# ---- The memory bus ------------------------------------------------------------------------------------------------


class Triad:
    """a = b + s c over buffers of a given size: the measure of what the memory bus gives to a stream.

    NOTE [the bytes that a store moves]
    An ordinary store on a CPU first reads its line into the cache, so a triad moves four values for each element, not
    three. GPUs write whole lines without reading them.
    """

    # Beyond this size nothing stays in a cache, and more would only take memory.
    LARGEST = 1 << 26

    def __init__(self, nbytes: int, device: torch.device) -> None:
        numel = max(1, min(nbytes // 4, self.LARGEST))
        # Filled, so that every page is there before it is measured, on the thread that will use it.
        self.a, self.b, self.c = (torch.full((numel,), value, device=device) for value in (0.0, 1.0, 2.0))
        self.bytes = numel * 4 * (3 if gpu.serves(device) else 4)
        self._clock = clock_for(device, flush=True)

    def __call__(self) -> Sample:
        seconds = self._clock.seconds(lambda: torch.add(self.b, self.c, alpha=0.5, out=self.a))
        return {"step": seconds, "bytes_per_second": self.bytes / seconds}


# ---- What a call does besides taking time --------------------------------------------------------------------------


class _CountCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def count_calls(call: Callable[[], None]) -> int:
    """Number of operator calls that a call makes."""
    with _CountCalls() as mode:
        call()
    return mode.calls


@dataclass(frozen=True)
class Memory:
    """What a call allocated, how far the tensors' memory rose above where it began, and what it kept."""

    allocations: int
    peak_bytes: int
    kept_bytes: int


_NEXT_CALL = "fsam_ext bench: the next call"


def memory_of(calls: Sequence[Callable[[], None]], device: torch.device) -> list[Memory]:
    """What torch's allocator does during each of some calls, made one after the other.

    On a CPU the end of memory that was there before the first call is not seen (nor is any scratch of the host's own
    libraries), so a step has to be given twice, and the second one counts.
    """
    if gpu.serves(device):
        return [_memory_on_cuda(call) for call in calls]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for call in calls:
            with torch.profiler.record_function(_NEXT_CALL):
                call()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    found: list[list[int]] = []
    for event in events:
        if event.name() == _NEXT_CALL:
            found.append([])
        elif event.name() == "[memory]" and found:
            found[-1].append(event.nbytes())
    return [
        Memory(sum(change > 0 for change in changes), max(accumulate(changes, initial=0)), sum(changes))
        for changes in found
    ]


def _memory_on_cuda(call: Callable[[], None]) -> Memory:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    call()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    return Memory(
        after["allocation.all.allocated"] - before["allocation.all.allocated"],
        after["allocated_bytes.all.peak"] - before["allocated_bytes.all.current"],
        after["allocated_bytes.all.current"] - before["allocated_bytes.all.current"],
    )


def count_launches(call: Callable[[], None]) -> int:
    """Number of kernels, copies and fills that a call starts on the GPU."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
