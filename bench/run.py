"""Measures every provider on every workload and writes the rows: ``python bench/run.py --help``.

The short run covers what the README shows within ten minutes on two cores; ``--full`` covers every combination. Results
of earlier runs on the same machine stay in the file until their figure is measured again, so one case can be repeated
with ``--workloads``, ``--dtypes`` and ``--bases``, and noisy ones with ``--rerun-wide``. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch loads: the profiler talks into what is printed

import torch

# This checkout's package is measured, wherever the command is called from and whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fsam_ext
from bench import gpu
from bench.cases import DTYPES, OUT_OF_TIME, Case, Run, beside_others, nowhere_row, plan
from bench.clocks import HostClock
from bench.measure import busy_processes, reason_of
from bench.peers import BASES
from bench.providers import PACKAGE, all_providers, missing_providers
from bench.rows import Row, default_path, merge, read, write
from bench.steps import measure_steps
from bench.training import measure_training
from bench.workloads import TRAININGS, WORKLOADS, Training

# Rows of these are taken again by --rerun-wide: the middle 60 % of the samples span more than this part of the median.
WIDE = 0.15


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every workload, dtype and base, up to an hour")
    parser.add_argument("--minutes", type=float, help="nothing starts after this time (8.8; with --full 55)")
    parser.add_argument("--seconds", type=float, help="time of each case once everything is warm")
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--dtypes", nargs="+", choices=[*DTYPES, "autocast"], help="only these")
    parser.add_argument("--bases", nargs="+", choices=BASES, help="only these")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these; fsam_ext always takes part")
    parser.add_argument("--compile", nargs="*", metavar="WORKLOAD", help="where `compiled` takes part (resnet18 gpt2)")
    parser.add_argument("--rerun-wide", action="store_true", help="only cases whose rows have wide quantiles")
    parser.add_argument("--tiny", action="store_true", help="a dry run: every workload shrunk; needs --out")
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
    args = parser.parse_args(argv)
    if args.tiny and args.out is None:
        raise SystemExit("--tiny: figures of shrunk workloads are nobody's results; name another file with --out")
    return args


def chosen(cases: list[Case], args: argparse.Namespace, old: list[Row]) -> list[Case]:
    """The cases that the command line asks for.

    Raises:
        SystemExit: a name is unknown.
    """
    known = {case.work.name for case in cases}
    for name in args.workloads or ():
        if name in known:
            continue
        if name in TRAININGS:
            raise SystemExit(f"--workloads {name}: it is of a GPU's size, and torch finds none; shrink it with --tiny")
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
        if args.rerun_wide and case.key not in wide:
            continue
        names = case.providers
        if args.providers:
            names = tuple(name for name in names if name in args.providers or name == "fsam_ext")
        work = case.work.tiny() if args.tiny else case.work
        picked.append(replace(case, work=work, providers=names, seconds=args.seconds or case.seconds))
    return picked


def absent(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Rows that say who cannot run here and why: whoever was asked for, and the package that is compared.

    Raises:
        SystemExit: a name is unknown.
    """
    available, missing = all_providers(device), missing_providers(device)
    for name in args.providers or ():
        if name not in available and name not in missing:
            known = ", ".join([*available, *missing])
            raise SystemExit(f"--providers {name}: there is no such provider; there are {known}")
    names = [name for name in missing if name in (args.providers or [PACKAGE])]
    found = [nowhere_row(name, "torch", missing[name], device.type) for name in names]
    if not gpu.serves(device):
        found.append(nowhere_row("all", "cuda", "this machine has no GPU", "cuda"))
    return found


@contextmanager
def empty_compilation_cache() -> Iterator[None]:
    """A cold start is a cold start: nothing that an earlier run compiled is found."""
    caches = tempfile.mkdtemp(prefix="fsam_bench_")
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
    try:
        yield
    finally:
        shutil.rmtree(caches, ignore_errors=True)
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
        if before is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def measure(cases: list[Case], run: Run) -> Iterator[list[Row]]:
    """Rows as they come; later ones of a figure replace earlier ones. A case that fails costs its own."""
    for i, case in enumerate(cases):
        if not run.left(1.0):
            yield [run.not_run(case, "all", OUT_OF_TIME)]
            continue
        print(f"{i + 1} of {len(cases)}: {case.title}", file=sys.stderr, flush=True)
        torch._dynamo.reset()
        try:
            yield from (measure_training if isinstance(case.work, Training) else measure_steps)(case, run)
        except Exception as error:
            yield [run.not_run(case, "all", reason_of(error))]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    alone = args.processor_time or (args.tiny and not args.threads)  # threads that wait cost more than tiny work
    if args.threads or alone:
        torch.set_num_threads(1 if alone else args.threads)
    HostClock.now = time.thread_time if args.processor_time else time.perf_counter
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = args.out or default_path(device)
    try:
        old = read(out)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    available = all_providers(device)
    new = absent(args, device)
    compiled_on = args.compile if args.compile is not None else WORKLOADS if args.full else ("resnet18", "gpt2")
    large = gpu.serves(device) or (args.tiny and bool(args.workloads))
    cases = chosen(plan(args.full or bool(args.workloads), available, compiled_on, large), args, old)
    if args.list:
        for case in cases:
            print(f"{case.title}: {', '.join(case.providers)}")
        return 0
    # Whoever is there now is not "not run" any more.
    old = [row for row in old if not (row.workload == "all" and row.provider in available)]
    deadline = time.monotonic() + 60 * (args.minutes or (55 if args.full else 8.8))
    print(f"measuring {Path(fsam_ext.__file__).parent}", file=sys.stderr)
    run = Run(device, available, deadline, lambda text: print(f"  {text}", file=sys.stderr, flush=True))
    write(out, merge(old, new))
    with busy_processes(args.busy), empty_compilation_cache():
        for rows in measure(cases, run):
            new = merge(new, beside_others(rows, args.busy))
            write(out, merge(old, new))
    for row in new:
        if row.median is None and row.device == device.type:
            print(" ".join((row.workload, row.dtype, row.base, f"{row.provider}: {row.note}")), file=sys.stderr)
    print(f"{len(new)} rows in {out}")
    if not args.no_plots:
        from bench.plots import draw

        for path in draw(out):
            print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
