"""Measures every provider on every workload and writes the rows: ``python bench/run.py --help``.

The short run covers what the README shows within ten minutes on two cores; ``--full`` covers every combination. Results
of earlier runs on the same machine stay in the file until their figure is measured again, so one case can be repeated
with ``--workloads``, ``--dtypes`` and ``--bases``, and noisy ones with ``--rerun-wide``.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch loads: the profiler talks into the progress bar

import torch
from measure import (
    HostClock,
    Memory,
    Quantiles,
    Sample,
    Triad,
    alternate,
    busy_processes,
    clock_for,
    count_calls,
    count_launches,
    memory_of,
    paired_ratios,
    quantiles,
    values,
)
from providers import BASES, Base, BaseOnly, Provider, all_providers
from rows import Row, default_path, merge, read, stamp, write
from torch import Tensor
from tqdm import tqdm
from workloads import TRAININGS, WORKLOADS, Training, Workload, scaling

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Units of figures that a clock is behind.
TIMED = ("ms", "ns", "GB/s", "x")
# Rows of these are taken again by --rerun-wide: the middle 60 % of the samples span more than this part of the median.
WIDE = 0.15


# ---- Cases ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One table of the results: a workload, a dtype and a base optimizer, and who takes part."""

    work: Workload | Training
    dtype: str
    base: str
    providers: tuple[str, ...]
    seconds: float

    @property
    def title(self) -> str:
        return f"{self.work.name} {self.dtype} {self.base}"


HEADLINE = ("resnet18", "gpt2", "tensors_1000", "tensors_10000")
# Where the bytes of state are measured: they do not depend on the model.
FOOTPRINT = "resnet18"
# Compilation takes longer than everything else together where there are thousands of tensors.
NEVER_COMPILED = ("tensors_1000", "tensors_10000")


def plan(full: bool, available: dict[str, type[Provider]], compiled_on: Iterable[str]) -> list[Case]:
    """The cases in the order of their importance: a run that is cut short has the first ones."""
    short = [name for name, kind in available.items() if not kind.full_only]
    everyone = list(available) if full else short
    seconds = 20.0 if full else 4.0

    def case(work: Workload | Training, dtype: str, base: str, names: Iterable[str]) -> Case:
        compiles = work.name in compiled_on and work.name not in NEVER_COMPILED
        names = (name for name in names if name in available and (name != "compiled" or compiles))
        kinds = {name: available[name].dtypes for name in names}
        names = tuple(name for name, dtypes in kinds.items() if dtypes is None or DTYPES[dtype] in dtypes)
        return Case(work, dtype, base, names, seconds)

    eager = [name for name in everyone if name != "compiled"]
    cases = [case(WORKLOADS[name], "fp32", "sgd", everyone) for name in HEADLINE]
    training = ("fsam_ext", "fsam_ext flat", "official", "foreach", "base")
    cases += [case(work, "fp32", "adamw" if "gpt" in work.name else "sgd", training) for work in TRAININGS.values()]
    growth = ("fsam_ext", "fsam_ext flat", "official", "foreach", "base")
    cases += [case(work, "fp32", "sgd", growth) for work in scaling(3e8 if full else 1e8)]
    cases += [case(WORKLOADS["resnet18"], dtype, base, eager) for dtype in DTYPES for base in BASES]
    if full:
        cases += [
            case(work, dtype, base, everyone) for work in WORKLOADS.values() for dtype in DTYPES for base in BASES
        ]
    else:
        peers = [name for name in eager if available[name].is_fsam]
        cases += [case(WORKLOADS[name], "fp32", "sgd", peers) for name in ("vit_b_16", "one_64m", "llama_shard")]
        cases += [case(WORKLOADS["gpt2"], "bf16", "sgd", eager)]
    first: dict[tuple[str, str, str], Case] = {}
    for candidate in cases:
        first.setdefault((candidate.work.name, candidate.dtype, candidate.base), candidate)
    return list(first.values())


# ---- Optimizer steps -----------------------------------------------------------------------------------------------


class Runner:
    """A provider on its own copy of a workload, whose gradients are renewed outside the measured time."""

    def __init__(
        self, kind: type[Provider], work: Workload, gradients: list[Tensor], base: Base, make: bool = True
    ) -> None:
        self._gradients = gradients
        first = gradients[0]
        self._clock = clock_for(first.device)
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
        self()
        if self._gradients[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - self._begin

    def renew_gradients(self) -> None:
        """As a backward does: some providers use the gradients as scratch."""
        torch._foreach_copy_([p.grad for p in self.provider.params], self._gradients)

    def __call__(self) -> Sample:
        self.renew_gradients()
        ascend = self._clock.seconds(self.provider.ascend)
        self.renew_gradients()
        descend = self._clock.seconds(self.provider.descend)
        return {"ascend": ascend, "descend": descend, "step": ascend + descend}

    def step(self) -> None:
        self.provider.ascend()
        self.provider.descend()


class GraphRunner:
    """The step of a provider as a CUDA graph: what is left when nothing is launched from Python."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._clock = clock_for(torch.device("cuda"))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            runner.step()

    def __call__(self) -> Sample:
        self._runner.renew_gradients()
        return {"step": self._clock.seconds(self._graph.replay)}


def available_bytes(device: torch.device) -> int:
    """Memory that nobody uses now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
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


def measure_steps(case: Case, device: torch.device, available: dict[str, type[Provider]], say: Callable) -> list[Row]:
    """All figures of one optimizer workload."""
    work, dtype, base = case.work, DTYPES[case.dtype], BASES[case.base]
    size = work.numel * dtype.itemsize
    sizes = {name: available[name].buffers * size for name in case.providers}
    room = int(0.8 * available_bytes(device)) - 4 * size
    anchors = ("fsam_ext", "official")
    if sum(sizes.get(name, 0) for name in anchors) > room:
        return [_not_run(case, "fsam_ext", f"needs about {sum(sizes.values()) >> 30} GiB", device)]
    rounds: list[dict[str, Sample]] = []
    extra: dict[str, dict[str, float]] = {}
    failures: dict[str, str] = {}
    gradients = work.gradients(dtype, device)
    groups = groups_that_fit(case.providers, sizes, anchors, room)
    for group in groups:
        runners: dict[str, Callable[[], Sample]] = {}
        for name in group:
            say(f"{case.title}: {name}, first step")
            try:
                runner = Runner(available[name], work, gradients, base)
                first = runner.first_step()
                runner()  # the first step sets up, the second one may still compile
                facts = extra.setdefault(name, {})
                facts.setdefault("first_step", first)
                if work.name == FOOTPRINT:  # after the cold start, which would else find what this one compiled
                    facts.update(_footprint(available[name], work, gradients, base))
                if "calls" not in facts:
                    facts.update(_side_effects(runner, device))
                runners[name] = runner
                if device.type == "cuda" and runner.provider.capturable:
                    runners[f"{name} graph"] = GraphRunner(runner)
            except Exception as error:  # a peer that fails is a result, not the end of the run
                failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        runners["triad"] = Triad(size, device)
        say(f"{case.title}: {', '.join(runners)}")
        rounds += alternate(runners, case.seconds / len(groups), min_rounds=5)
        del runners, runner
        gc.collect()
    rows = _step_rows(case, rounds, extra, device, available)
    return rows + [_not_run(case, name, why, device) for name, why in failures.items()]


def _footprint(kind: type[Provider], work: Workload, gradients: list[Tensor], base: Base) -> dict[str, float]:
    """Bytes for each parameter beyond parameters and gradients: between steps, and at most within one."""
    runner: Runner | None = None
    gc.collect()  # or the memory of an earlier provider would be freed, and counted, meanwhile

    def parameters() -> None:
        nonlocal runner
        runner = Runner(kind, work, gradients, base, make=False)

    def first_steps() -> None:
        runner.make()
        runner()
        runner()

    _, first, later = memory_of([parameters, first_steps, lambda: runner()], gradients[0].device)
    return {"state": first.kept_bytes / work.numel, "state_peak": (first.kept_bytes + later.peak_bytes) / work.numel}


def _side_effects(runner: Runner, device: torch.device) -> dict[str, float]:
    facts: dict[str, float] = {}
    runner.renew_gradients()
    memory: Memory = memory_of([runner.step, runner.step], device)[1]
    facts["allocations"], facts["peak_extra"] = memory.allocations, memory.peak_bytes
    if runner.provider.eager:
        runner.renew_gradients()
        facts["calls"] = count_calls(runner.step)
    if device.type == "cuda":
        facts["launches"] = count_launches(runner.step)
    return facts


def _step_rows(
    case: Case,
    rounds: list[dict[str, Sample]],
    extra: dict[str, dict[str, float]],
    device: torch.device,
    available: dict[str, type[Provider]],
) -> list[Row]:
    work, dtype = case.work, DTYPES[case.dtype]
    names = list({name: None for record in rounds for name in record})
    rows = [_row(case, "triad", "bus", "GB/s", quantiles(values(rounds, "triad", "bytes_per_second")), device, 1e-9)]
    for name in names:
        if name == "triad":
            continue
        steps = values(rounds, name, "step")
        step = quantiles(steps)

        def add(metric: str, unit: str, q: Quantiles, scale: float = 1.0, name: str = name) -> None:
            rows.append(_row(case, name, metric, unit, q, device, scale))

        add("step", "ms", step, 1e3)
        add("per_parameter", "ns", step, 1e9 / work.numel)
        if "ascend" in rounds[-1].get(name, {}) or any("ascend" in r.get(name, {}) for r in rounds):
            add("ascend", "ms", quantiles(values(rounds, name, "ascend")), 1e3)
            add("descend", "ms", quantiles(values(rounds, name, "descend")), 1e3)
        kind = available.get(name.removesuffix(" graph"))
        if kind is not None and kind.is_fsam:
            must_move = work.numel * kind.bytes_per_parameter(dtype, case.base)
            rates = [must_move / seconds for seconds in steps]
            add("achieved", "GB/s", quantiles(rates), 1e-9)
            fractions = [
                must_move / r[name]["step"] / r["triad"]["bytes_per_second"]
                for r in rounds
                if name in r and "triad" in r
            ]
            add("bus_fraction", "", quantiles(fractions))
        for other in names:
            if other not in (name, "triad") and (ratios := paired_ratios(rounds, name, other)):
                add(f"speedup_over {other}", "x", quantiles(ratios))
        for metric, unit, scale in (
            ("first_step", "ms", 1e3),
            ("allocations", "", 1),
            ("peak_extra", "MiB", 2**-20),
            ("state", "B/parameter", 1),
            ("state_peak", "B/parameter", 1),
            ("calls", "", 1),
            ("launches", "", 1),
        ):
            if metric in extra.get(name, {}):
                value = extra[name][metric]
                add(metric, unit, Quantiles(value, value, value, 1), scale)
    return rows


# ---- Training steps ------------------------------------------------------------------------------------------------


class TrainingRunner:
    """Whole steps of a small model: two forwards and backwards and the optimizer."""

    def __init__(self, kind: type[Provider], work: Training, base: Base, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = work.model().to(device)
        self.batch = work.batch(device)
        self.provider = kind(list(self.model.parameters()), base)
        self._clock = clock_for(device)

    def backward(self) -> None:
        self.provider.zero_grad()
        self.model(self.batch).backward()

    def __call__(self) -> Sample:
        first = self._clock.seconds(self.backward)
        ascend = self._clock.seconds(self.provider.ascend)
        second = self._clock.seconds(self.backward)
        descend = self._clock.seconds(self.provider.descend)
        step = first + ascend + second + descend
        return {"step": step, "optimizer": ascend + descend, "share": (ascend + descend) / step}


def measure_training(
    case: Case, device: torch.device, available: dict[str, type[Provider]], say: Callable
) -> list[Row]:
    """The optimizer's share of whole steps, and F-SAM's cost over two forward-backwards plus the fused base alone.

    The provider ``base`` is the yardstick here: it makes both forward-backwards too and perturbs nothing.
    """
    runners = {}
    for name in case.providers:
        say(f"{case.title}: {name}, first steps")
        runners[name] = TrainingRunner(available[name], case.work, BASES[case.base], device)
        for _ in range(3):
            runners[name]()
    say(f"{case.title}: {', '.join(runners)}")
    rounds = alternate(runners, 2.5 * case.seconds, min_rounds=5)
    rows = []
    for name in runners:
        rows.append(_row(case, name, "step", "ms", quantiles(values(rounds, name, "step")), device, 1e3))
        rows.append(_row(case, name, "optimizer", "ms", quantiles(values(rounds, name, "optimizer")), device, 1e3))
        rows.append(_row(case, name, "share", "", quantiles(values(rounds, name, "share")), device))
        for other in runners:
            if other != name:
                ratio = quantiles(paired_ratios(rounds, name, other))
                rows.append(_row(case, name, f"speedup_over {other}", "x", ratio, device))
        if name != BaseOnly.name and BaseOnly.name in runners:
            cost = quantiles(paired_ratios(rounds, BaseOnly.name, name))
            rows.append(_row(case, name, "cost_over_base", "x", cost, device))
    return rows


# ---- Rows ----------------------------------------------------------------------------------------------------------


def _backend(name: str, device: torch.device) -> str:
    kind = all_providers(device).get(name.removesuffix(" graph"))
    return kind.backend if kind is not None else "torch"


def _row(case: Case, name: str, metric: str, unit: str, q: Quantiles, device: torch.device, scale: float = 1.0) -> Row:
    return Row(
        provider=name,
        backend=_backend(name, device),
        workload=case.work.name,
        dtype=case.dtype,
        base=case.base,
        metric=metric,
        unit=unit,
        median=q.median * scale,
        q20=q.q20 * scale,
        q80=q.q80 * scale,
        samples=q.samples,
        note="processor time" if HostClock.now is time.thread_time and unit in TIMED and metric != "first_step" else "",
        **stamp(device),
    )


def _not_run(case: Case, name: str, why: str, device: torch.device) -> Row:
    return Row(
        name,
        _backend(name, device),
        case.work.name,
        case.dtype,
        case.base,
        "step",
        "ms",
        None,
        None,
        None,
        0,
        f"not run: {why}",
        **stamp(device),
    )


def beside_others(rows: list[Row], busy: int) -> list[Row]:
    """What was timed beside busy processes, as figures of their own."""
    if not busy:
        return rows
    return [replace(row, metric=f"{row.metric}, {busy} busy") for row in rows if row.unit in TIMED]


def no_gpu_row() -> Row:
    """Says that nothing is known about GPUs, where there is none."""
    return Row(
        "all",
        "cuda",
        "all",
        "all",
        "all",
        "step",
        "ms",
        None,
        None,
        None,
        0,
        "not run: this machine has no GPU",
        **{**stamp(torch.device("cpu")), "device": "cuda"},
    )


# ---- The command ---------------------------------------------------------------------------------------------------


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every workload, dtype and base, up to an hour")
    parser.add_argument("--minutes", type=float, help="no case starts after this time (8.8; with --full 55)")
    parser.add_argument("--seconds", type=float, help="time of each case once everything is warm")
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="only these")
    parser.add_argument("--bases", nargs="+", choices=BASES, help="only these")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these; fsam_ext always takes part")
    parser.add_argument("--compile", nargs="*", metavar="WORKLOAD", help="where `compiled` takes part (resnet18 gpt2)")
    parser.add_argument("--rerun-wide", action="store_true", help="only cases whose rows have wide quantiles")
    parser.add_argument("--threads", type=int, help="of torch (all cores)")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="of one thread, instead of wall-clock time: for a machine that other jobs use too",
    )
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="measure beside N processes that never wait")
    parser.add_argument("--out", type=Path, help="the CSV file (bench/results/<machine>.csv)")
    parser.add_argument("--no-plots", action="store_true", help="write rows only")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    return parser.parse_args(argv)


def chosen(cases: list[Case], args: argparse.Namespace, old: list[Row]) -> list[Case]:
    """The cases that the command line asks for.

    Raises:
        SystemExit: a name is unknown.
    """
    known = {case.work.name for case in cases}
    for name in args.workloads or ():
        if name not in known:
            raise SystemExit(f"--workloads {name}: there is no such workload; there are {', '.join(sorted(known))}")
    wide = {
        (row.workload, row.dtype, row.base)
        for row in old
        if row.metric == "step" and row.median and (row.q80 - row.q20) / row.median > WIDE
    }
    picked = []
    for case in cases:
        if args.workloads and case.work.name not in args.workloads:
            continue
        if (args.dtypes and case.dtype not in args.dtypes) or (args.bases and case.base not in args.bases):
            continue
        if args.rerun_wide and (case.work.name, case.dtype, case.base) not in wide:
            continue
        names = case.providers
        if args.providers:
            names = tuple(name for name in names if name in args.providers or name == "fsam_ext")
        picked.append(Case(case.work, case.dtype, case.base, names, args.seconds or case.seconds))
    return picked


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.threads or args.processor_time:
        torch.set_num_threads(1 if args.processor_time else args.threads)
    HostClock.now = time.thread_time if args.processor_time else time.perf_counter
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = args.out or default_path(device)
    try:
        old = read(out)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    available = all_providers(device)
    for name in args.providers or ():
        if name not in available:
            raise SystemExit(f"--providers {name}: there is no such provider here; there are {', '.join(available)}")
    compiled_on = args.compile if args.compile is not None else WORKLOADS if args.full else ("resnet18", "gpt2")
    cases = chosen(plan(args.full or bool(args.workloads), available, compiled_on), args, old)
    if args.list:
        for case in cases:
            print(f"{case.title}: {', '.join(case.providers)}")
        return 0

    # A cold start is a cold start: nothing that an earlier run compiled is found.
    caches = tempfile.mkdtemp(prefix="fsam_bench_")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
    deadline = time.monotonic() + 60 * (args.minutes or (55 if args.full else 8.8))
    new = [] if device.type == "cuda" else [no_gpu_row()]
    try:
        with busy_processes(args.busy), tqdm(cases, unit="case", dynamic_ncols=True) as bar:
            for case in bar:
                if time.monotonic() > deadline:
                    new.append(_not_run(case, "all", "the time was used up; see --minutes", device))
                    continue
                torch._dynamo.reset()
                measure = measure_training if isinstance(case.work, Training) else measure_steps
                new += beside_others(measure(case, device, available, bar.set_description), args.busy)
                write(out, merge(old, new))
    finally:
        shutil.rmtree(caches, ignore_errors=True)
    unfinished = [row for row in new if row.provider == "all" and row.device == device.type]
    for row in unfinished:
        print(f"{row.workload} {row.dtype} {row.base} {row.note}", file=sys.stderr)
    print(f"{len(new)} rows in {out}")
    if not args.no_plots:
        from plots import draw

        for path in draw(out):
            print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
