"""Optimizer steps: each provider on its own copy of a workload, and on a GPU its CUDA graphs beside it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bench import gpu
from bench.cases import DTYPES, OUT_OF_TIME, Case, Run
from bench.clocks import Call, DeviceClock, HostClock, clock_for
from bench.measure import (
    Memory,
    Quantiles,
    Sample,
    Triad,
    alternate,
    count_calls,
    count_launches,
    memory_of,
    paired_ratios,
    quantiles,
    reason_of,
    values,
)
from bench.peers import BASES, Base, Provider
from bench.rows import Row
from bench.workloads import Workload

HALVES = ("ascend", "descend")


def sample_halves(clock: HostClock | DeviceClock, halves: tuple[Call, Call], renew: Call) -> Sample:
    """Seconds of both halves of a step, each with fresh gradients; of a device, those of the host apart."""
    sample: Sample = {}
    ahead = []
    for name, half in zip(HALVES, halves):
        renew()
        sample[name] = clock.seconds(half)
        if isinstance(clock, DeviceClock):
            ahead.append(clock.queued_ahead)
    sample["step"] = sample["ascend"] + sample["descend"]
    if isinstance(clock, DeviceClock):
        sample["queued_ahead"] = float(all(ahead))
        sample["host"] = sample["wall"] = 0.0
        for half in halves:
            renew()
            queued, finished = clock.from_idle(half)
            sample["host"] += queued
            sample["wall"] += finished
    return sample


class Runner:
    """A provider on its own copy of a workload, whose gradients are renewed outside the measured time."""

    def __init__(
        self, kind: type[Provider], work: Workload, gradients: list[Tensor], base: Base, make: bool = True
    ) -> None:
        self._gradients = gradients
        first = gradients[0]
        self._clock = clock_for(first.device, flush=True)
        params = work.parameters(first.dtype, first.device)
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient.clone()
        self._kind, self._params, self._base = kind, params, base
        self._begin = time.perf_counter()
        if make:
            self.make()

    def make(self) -> None:
        """Makes the provider."""
        self.provider = self._kind(self._params, self._base)

    def first_step(self) -> float:
        """Wall-clock seconds from the provider's making to its first finished step, compilation included."""
        self.renew_gradients()
        self.step()
        if gpu.serves(self._gradients[0].device):
            torch.cuda.synchronize()
        return time.perf_counter() - self._begin

    def renew_gradients(self) -> None:
        """As a backward does: some providers use the gradients as scratch."""
        torch._foreach_copy_([p.grad for p in self.provider.params], self._gradients)

    def __call__(self) -> Sample:
        return sample_halves(self._clock, (self.provider.ascend, self.provider.descend), self.renew_gradients)

    def step(self) -> None:
        self.provider.ascend()
        self.provider.descend()


class GraphRunner:
    """The step of a provider as two CUDA graphs: what is left when nothing is launched from Python.

    One for each half, since a forward and backward lie between them, and the L2 is another one after it.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._clock = clock_for(runner._gradients[0].device, flush=True)
        runner.renew_gradients()
        provider = runner.provider
        ascend = gpu.capture(provider.ascend) if provider.ascends else provider.ascend
        self._halves = (ascend, gpu.capture(provider.descend))

    def __call__(self) -> Sample:
        return sample_halves(self._clock, self._halves, self._runner.renew_gradients)


def available_bytes(device: torch.device) -> int:
    """Memory that nobody uses now."""
    if gpu.serves(device):
        return gpu.free_bytes(device)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo does not tell MemAvailable")


def groups_that_fit(
    names: Iterable[str], sizes: dict[str, int], anchors: tuple[str, ...], room: int
) -> list[list[str]]:
    """Cuts the providers into groups that fit into memory at once, with the anchors in each, so that all meet them."""
    fixed = [name for name in anchors if name in sizes]
    groups, used = [list(fixed)], sum(sizes[name] for name in fixed)
    start = used
    for name in names:
        if name in fixed:
            continue
        if used + sizes[name] > room and len(groups[-1]) > len(fixed):
            groups.append(list(fixed))
            used = start
        groups[-1].append(name)
        used += sizes[name]
    return groups


@dataclass
class Found:
    """What is known of a case so far."""

    rounds: list[dict[str, Sample]] = field(default_factory=list)
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def measure_steps(case: Case, run: Run) -> Iterator[list[Row]]:
    """All figures of one optimizer workload, given out each time there are more of them.

    Those that compile join when the others have been measured: a run that is killed meanwhile has these.
    """
    size = case.work.numel * DTYPES[case.dtype].itemsize
    sizes = {}
    for name in case.providers:
        kind = run.available[name]
        graphs = gpu.serves(run.device) and kind.capturable  # what a graph allocates stays with it
        sizes[name] = (2 if graphs else 1) * kind.buffers * size
    room = int(0.8 * available_bytes(run.device)) - 4 * size
    anchors = ("fsam_ext", "official")
    if sum(sizes.get(name, 0) for name in anchors) > room:
        yield [run.not_run(case, "fsam_ext", f"needs about {sum(sizes.values()) >> 30} GiB")]
        return
    found = Found()
    gradients = case.work.gradients(DTYPES[case.dtype], run.device)
    groups = groups_that_fit(case.providers, sizes, anchors, room)
    phases = []
    for group in groups:
        compiled = [name for name in group if run.available[name].compiles]
        phases += [(True, [name for name in group if name not in compiled])] + [(False, compiled)] * bool(compiled)
    runners: dict[str, Callable[[], Sample]] = {}
    for fresh, names in phases:
        if fresh:
            runners = {}
            _give_back(run.device)
            runners["triad"] = Triad(size, run.device)
        for name in names:
            _set_up(name, case, run, gradients, runners, found)
        run.say(f"{case.title}: {', '.join(runners)}")
        seconds = run.left(case.seconds / len(phases))
        found.rounds += alternate(runners, seconds, min_rounds=run.rounds, failures=found.failures)
        runners = {name: runner for name, runner in runners.items() if name not in found.failures}
        yield step_rows(case, run, found)


def _give_back(device: torch.device) -> None:
    gc.collect()
    if gpu.serves(device):
        torch.cuda.empty_cache()


def _set_up(
    name: str,
    case: Case,
    run: Run,
    gradients: list[Tensor],
    runners: dict[str, Callable[[], Sample]],
    found: Found,
) -> None:
    """Warms a provider up, notes what is measured once, and adds it and its graphs to the runners.

    Whatever it raises is a result, and ends nothing but its own figures.
    """
    if not run.left(1.0):
        if name not in found.facts:  # an anchor has figures of an earlier group
            found.failures[name] = OUT_OF_TIME
        return
    run.say(f"{case.title}: {name}, first step")
    kind, base = run.available[name], BASES[case.base]
    try:
        runner = Runner(kind, case.work, gradients, base)
        first = runner.first_step()
        runner()  # the first step sets up, the second one may still compile
        facts = found.facts.setdefault(name, {})
        facts.setdefault("first_step", first)
        if case.work.footprint:  # after the cold start, which would else find what this one compiled
            facts.update(_footprint(kind, case.work, gradients, base))
        if "calls" not in facts:
            facts.update(_side_effects(runner, run.device))
        runners[name] = runner
    except Exception as error:
        found.failures[name] = reason_of(error)
        return
    if not gpu.serves(run.device):
        return
    graph = f"{name} graph"
    if not kind.capturable:
        found.failures[graph] = f"not captured: {kind.not_captured}"
        return
    try:
        runners[graph] = GraphRunner(runner)
        runners[graph]()
    except Exception as error:
        found.failures[graph] = reason_of(error)
        runners.pop(graph, None)
        del runners[name]  # a capture that broke off may have left it between its halves
        try:
            again = Runner(kind, case.work, gradients, base)
            again.first_step()
            runners[name] = again
        except Exception as after:
            found.failures[name] = f"{reason_of(after)} (after its graph failed)"


def _footprint(kind: type[Provider], work: Workload, gradients: list[Tensor], base: Base) -> dict[str, float]:
    """Bytes for each parameter beyond parameters and gradients: between steps, and at most within one."""
    runner: Runner | None = None
    gc.collect()  # or the memory of an earlier provider would be freed, and counted, meanwhile

    def parameters() -> None:
        nonlocal runner
        runner = Runner(kind, work, gradients, base, make=False)

    def first_steps() -> None:
        runner.make()
        runner.first_step()
        later_step()

    def later_step() -> None:
        runner.renew_gradients()
        runner.step()

    _, first, later = memory_of([parameters, first_steps, later_step], gradients[0].device)
    return {"state": first.kept_bytes / work.numel, "state_peak": (first.kept_bytes + later.peak_bytes) / work.numel}


def _side_effects(runner: Runner, device: torch.device) -> dict[str, float]:
    facts: dict[str, float] = {}
    runner.renew_gradients()
    memory: Memory = memory_of([runner.step, runner.step], device)[1]
    facts["allocations"], facts["peak_extra"] = memory.allocations, memory.peak_bytes
    if runner.provider.eager:
        runner.renew_gradients()
        facts["calls"] = count_calls(runner.step)
    if gpu.serves(device):
        facts["launches"] = count_launches(runner.step)
    return facts


# ---- Rows ----------------------------------------------------------------------------------------------------------

# Of each round where the clock tells it: (metric, unit, scale).
TIMES = (
    ("ascend", "ms", 1e3),
    ("descend", "ms", 1e3),
    ("host", "ms", 1e3),
    ("wall", "ms", 1e3),
)
# Measured once: (metric, unit, scale).
FACTS = (
    ("first_step", "ms", 1e3),
    ("allocations", "", 1),
    ("peak_extra", "MiB", 2**-20),
    ("state", "B/parameter", 1),
    ("state_peak", "B/parameter", 1),
    ("calls", "", 1),
    ("launches", "", 1),
)


def step_rows(case: Case, run: Run, found: Found) -> list[Row]:
    rounds = [{n: s for n, s in record.items() if n not in found.failures} for record in found.rounds]
    names = list({name: None for record in rounds for name in record})
    rows = []
    if "triad" in names:
        bus = quantiles(values(rounds, "triad", "bytes_per_second"))
        rows.append(run.row(case, "triad", "bus", "GB/s", bus, 1e-9))
    for name in names:
        if name != "triad":
            rows += _rows_of(name, names, rounds, case, run)
            for metric, unit, scale in FACTS:
                value = found.facts.get(name, {}).get(metric)
                if value is not None:
                    rows.append(run.row(case, name, metric, unit, Quantiles(value, value, value, 1), scale))
    return rows + [run.not_run(case, name, why) for name, why in found.failures.items()]


def _rows_of(name: str, names: list[str], rounds: list[dict[str, Sample]], case: Case, run: Run) -> list[Row]:
    """What one provider's rounds tell, by itself and against every other one's."""
    numel, rows = case.work.numel, []

    def add(metric: str, unit: str, samples: list[float], scale: float = 1.0) -> None:
        rows.append(run.row(case, name, metric, unit, quantiles(samples), scale))

    steps = values(rounds, name, "step")
    known = next(record[name] for record in rounds if name in record)
    add("step", "ms", steps, 1e3)
    add("per_parameter", "ns", steps, 1e9 / numel)
    for metric, unit, scale in TIMES:
        if metric in known:
            add(metric, unit, values(rounds, name, metric), scale)
    if "queued_ahead" in known:
        share = sum(values(rounds, name, "queued_ahead")) / len(steps)
        rows.append(run.row(case, name, "queued_ahead", "", Quantiles(share, share, share, len(steps))))
    kind = run.available[name.removesuffix(" graph")]
    if kind.is_fsam:
        must_move = numel * kind.bytes_per_parameter(DTYPES[case.dtype], case.base)
        add("achieved", "GB/s", [must_move / seconds for seconds in steps], 1e-9)
        both = [record for record in rounds if name in record and "triad" in record]
        if both:
            rates = [must_move / r[name]["step"] / r["triad"]["bytes_per_second"] for r in both]
            add("bus_fraction", "", rates)
    for other in names:
        if other not in (name, "triad") and (ratios := paired_ratios(rounds, name, other)):
            add(f"speedup_over {other}", "x", ratios)
    return rows
