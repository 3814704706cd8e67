"""Whole optimizer steps through Triton's launcher, on a GPU that is not there: what they launch, and what they cost.

`python -m tests.triton_steps` prints what each step launches, as JSON: the base, the rows, if gradients are reused, if
the step ascends, kernels and grids. Every launch is compared with what arrived at libcuda (triton_gpu.py). With
`--time` it prints the host's time for a step whose kernels do nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch

from fsam_ext import FriendlySAM, backends
from fsam_ext.backends.triton import NAMESPACE

from . import triton_gpu

BASES = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adamw": (torch.optim.AdamW, {})}
ROWS = (1, 150)
REUSE = {"every": 2, "reuse": 0.3}


@functools.cache
def serve_cpu_tensors() -> None:
    """Has `backend="triton"` take CPU tensors for a GPU's."""
    triton_gpu.serve_cpu_tensors()
    backends.CANDIDATES["triton"] = lambda _: (backends._dispatcher(NAMESPACE), None)


def stepper(base: str, rows: int, dtype: torch.dtype = torch.float32, **schedule: Any) -> Callable[[], bool]:
    """A function that makes one step over parameters of so many rows and says whether it ascended."""
    serve_cpu_tensors()
    params = [torch.nn.Parameter(torch.randn(64, 65, dtype=dtype)) for _ in range(rows)]
    optimizer_class, options = BASES[base]
    optimizer = FriendlySAM(params, optimizer_class, lr=0.1, rho=0.05, backend="triton", **options, **schedule)
    for param in params:
        param.grad = torch.randn_like(param)

    def step() -> bool:
        ascends = optimizer.ascends
        if ascends:
            optimizer.first_step(zero_grad=False)
            optimizer.second_step(zero_grad=False)
        else:
            optimizer.step()
        return ascends

    return step


def run_all() -> None:
    """A step of each kind, for what a benchmark would launch."""
    for base in BASES:
        for rows in ROWS:
            for dtype in (torch.float32, torch.bfloat16):
                stepper(base, rows, dtype)()
                reusing = stepper(base, rows, dtype, **REUSE)
                reusing(), reusing()


def host_time(step: Callable[[], None], repetitions: int = 15, steps: int = 20) -> float:
    """The CPU time of the thread that launches, in microseconds a step: the least of the repetitions."""
    times = []
    for _ in range(repetitions):
        begin = time.thread_time()
        for _ in range(steps):
            step()
        times.append((time.thread_time() - begin) / steps * 1e6)
    return min(times)


def print_launches(base: str, rows: int, libcuda: triton_gpu.Libcuda, **schedule: Any) -> None:
    """A line for each step of a period of the schedule, the first period left out."""
    step, period = stepper(base, rows, **schedule), schedule.get("every", 1)
    for i in range(2 * period):
        libcuda.launched.clear()
        ascends = step()
        if i >= period:
            launched = [(name, grid[0]) for name, grid, *_ in libcuda.launched]
            print(json.dumps([base, rows, "reuse" in schedule, ascends, launched]))


def main() -> None:
    """Runs steps of each base and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", action="store_true")
    timed = parser.parse_args().time
    with tempfile.TemporaryDirectory() as folder:
        libcuda = triton_gpu.Libcuda(Path(folder))
        triton_gpu.activate(triton_gpu.cuda_driver(triton_gpu.TARGETS["sm_90"], libcuda, checks=not timed))
        for base in BASES:
            for rows in ROWS:
                if timed:
                    step = stepper(base, rows)
                    step()
                    print(f"{base}, {rows} rows: {host_time(step):.0f} us of CPU time a step")
                    continue
                print_launches(base, rows, libcuda)
                print_launches(base, rows, libcuda, **REUSE)


if __name__ == "__main__":
    main()
