"""What the GPU's counters say of each pass, as rows: ``python -m bench.gpu_run.ncu --backend cuda --out DIR``.

Nsight Compute runs every pass of bench/gpu_run/passes.py once and prints one line of CSV for each launch.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import rows
from bench.gpu_run import passes
from bench.gpu_run.tools import find

# counter -> (what rows call it, unit of the row)
COUNTERS = {
    "gpu__time_duration.sum": ("ncu time", "us"),
    "dram__bytes_read.sum": ("ncu bytes read", "B/parameter"),
    "dram__bytes_write.sum": ("ncu bytes written", "B/parameter"),
    "smsp__inst_executed.sum": ("ncu instructions", "/parameter"),
    "smsp__issue_active.avg.pct_of_peak_sustained_active": ("ncu issue slots used", "%"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("ncu warps active", "%"),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("ncu memory throughput", "%"),
    "launch__registers_per_thread": ("ncu registers", ""),
    **{
        f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio": (f"ncu stalled: {reason}", "warps")
        for reason in ("long_scoreboard", "short_scoreboard", "no_instruction", "math_pipe_throttle", "lg_throttle",
                       "wait", "barrier")
    },
}  # fmt: skip
# The kernels of both backends, by the beginning of their names; the longer of two names first.
KERNELS = (
    "noise_norm",
    "sum_slots",
    "sum_partials",
    "perturb",
    "count_steps",
    "restore_sgd",
    "restore_adam",
    "restore",
)
_KERNEL = re.compile(rf"(?:^|[^\w])({'|'.join(KERNELS)})(?:_kernel)?(?![a-z])")
_SCALES = {"": 1, "n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNIT = re.compile(r"([numKMGT]?)(s|second|byte|inst)")
WARP = 32


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its full name, and its counters in base units (seconds, bytes, instructions, %)."""

    kernel: str
    counters: dict[str, float]

    @property
    def op(self) -> str | None:
        """The op that it serves, or None for a kernel that is not of this package."""
        found = _KERNEL.search(self.kernel)
        return found[1] if found else None


def in_base_units(text: str, unit: str) -> float | None:
    """A figure as the profiler prints it ("1,234.5" in "usecond"); None where it has none ("n/a")."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    scaled = _UNIT.fullmatch(unit)
    return value * _SCALES[scaled[1]] if scaled else value


def parse(text: str) -> list[Launch]:
    """The launches in what ``ncu --csv --page raw`` printed, whatever stands around its table.

    The table has a line of names, one of units, and one for each launch.

    Raises:
        ValueError: there is no table in the text.
    """
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith('"ID"')]
    if not starts:
        raise ValueError("ncu printed no table; the last it said: " + " / ".join(lines[-3:]))
    names, units, *records = csv.reader(line for line in lines[starts[0] :] if line.startswith('"'))
    launches = []
    for record in records:
        values = {
            name: value
            for name, unit, cell in zip(names, units, record)
            if name in COUNTERS and (value := in_base_units(cell, unit)) is not None
        }
        launches.append(Launch(record[names.index("Kernel Name")], values))
    return launches


def _of_case(launches: list[Launch], numel: int) -> Iterator[tuple[str, str, float]]:
    """(metric, unit, figure) of the launches that one pass made: sums, and means of what does not add up."""
    for counter in dict.fromkeys(counter for launch in launches for counter in launch.counters):
        values = [launch.counters[counter] for launch in launches if counter in launch.counters]
        metric, unit = COUNTERS[counter]
        if unit == "us":
            yield metric, unit, sum(values) * 1e6
        elif unit == "B/parameter":
            yield metric, unit, sum(values) / numel
        elif unit == "/parameter":  # each one is executed for the lanes of a warp
            yield metric, unit, sum(values) * WARP / numel
        else:
            yield metric, unit, sum(values) / len(values)


def as_rows(launches: Iterable[Launch], backend: str, cases: list[tuple[str, int, str]]) -> list[rows.Row]:
    """Rows of the passes' launches. Every case launches a kernel as often as the others do, one after the other.

    Raises:
        ValueError: that is not so.
    """
    by_op: dict[str, list[Launch]] = {}
    for launch in launches:
        if launch.op is not None:
            by_op.setdefault(launch.op, []).append(launch)
    found = []
    for op, mine in by_op.items():
        each, rest = divmod(len(mine), len(cases))
        if rest:
            raise ValueError(
                f"{op} was launched {len(mine)} times for {len(cases)} cases; rows would be of the wrong ones"
            )
        for i, case in enumerate(cases):
            part = mine[i * each : (i + 1) * each]
            found += [passes.row(backend, op, case, metric, unit, [x]) for metric, unit, x in _of_case(part, case[1])]
    return found


def command(tool: str, backend: str, device: str) -> list[str]:
    """The profiler around one round of the passes. The clocks are left as they are."""
    names = "|".join(KERNELS)
    return [
        tool, "--clock-control", "none", "--target-processes", "all", "--kernel-name", f"regex:^({names})",
        "--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(COUNTERS),
        sys.executable, "-m", "bench.gpu_run.passes", "--once", "--backend", backend, "--device", device,
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Writes the profiler's own output beside the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("cuda", "triton"), required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the run")
    args = parser.parse_args(argv)
    tool = find("ncu")
    if tool is None:
        raise SystemExit("ncu was not found: install Nsight Compute, or add it to PATH")
    done = subprocess.run(command(tool, args.backend, args.device), stdout=subprocess.PIPE, text=True)
    raw = args.out / "ncu.csv"
    with raw.open("a") as file:
        file.write(f"backend {args.backend}\n{done.stdout}")
    device = torch.device(args.device)
    cases = passes.DRY_CASES if device.type == "cpu" else passes.CASES
    profiled = [case for case in cases if case[1] == cases[0][1] and case[2] == "flat"]
    found = [
        rows.Row(**{**vars(one), **rows.stamp(device)}) for one in as_rows(parse(done.stdout), args.backend, profiled)
    ]
    if not found:
        raise SystemExit(f"ncu saw no kernel of this package; what it saw is in {raw}")
    path = args.out / "rows.csv"
    rows.write(path, rows.merge(rows.read(path), found))
    for one in found:
        print(f"{one.dtype} {one.workload} {one.provider:26} {one.median:14.3f} {one.unit:12} {one.metric}")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
