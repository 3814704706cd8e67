"""Each pass alone: its time and its bandwidth beside a copy's, ``python -m bench.gpu_run.passes --backend cuda``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import gpu, measure, rows
from bench.gpu_model import MOVED, REUSE
from fsam_ext.backends import CANDIDATES, ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROFILED = ("noise_norm", "perturb", "restore", "restore_sgd", "count_steps", "restore_adam")
OPS = (*PROFILED, *REUSE)
# Parameters of one tensor, or cut into tensors of 256 elements: the smallest that models have many of.
TINY = 256
# (dtype, parameters, layout) in the order of their worth: a run that is cut short has the first ones.
CASES = [
    *((dtype, 100_000_000, "flat") for dtype in DTYPES),
    *((dtype, 10_000_000, layout) for layout in ("flat", "tiny") for dtype in DTYPES),
    *((dtype, 1_000_000_000, "flat") for dtype in DTYPES),
]
DRY_CASES = [("fp32", 8192, "flat"), ("bf16", 8192, "flat"), ("fp32", 2 * TINY, "tiny")]
# Bytes for each parameter that tensors and the copy beside them may take.
ROOM = 44
LARGEST_COPY = 1 << 31
SHARE = "share of a copy's bandwidth"


def moved(op: str, dtype: torch.dtype) -> int:
    """Bytes that a pass reads and writes for each parameter of a dtype; 0 where its time does not depend on them."""
    stored, state = MOVED.get(op, (0, 0))
    return stored * dtype.itemsize + state * ops.compute_dtype(dtype).itemsize


def label(numel: int, layout: str) -> str:
    """The name of a case in rows and tables."""
    for unit, suffix in ((10**9, "B"), (10**6, "M")):
        if numel >= unit:
            return f"{layout} {numel // unit}{suffix}"
    return f"{layout} {numel}"


class Passes:
    """The passes over random tensors of one dtype, and what each one reads and writes for a parameter."""

    def __init__(self, backend: Any, device: torch.device, dtype: torch.dtype, numel: int, layout: str) -> None:
        self.backend = backend
        sizes = [numel] if layout == "flat" else [TINY] * (numel // TINY)
        state = ops.compute_dtype(dtype)
        self.numel = sum(sizes)
        self.params, self.grads = (
            list(torch.randn(self.numel, device=device).to(dtype).split(sizes)) for _ in range(2)
        )
        self.offsets = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
        self.first, self.second = (torch.rand(self.numel, dtype=state, device=device) for _ in range(2))
        self.backup = self.params[0].new_zeros(self.numel)
        self.kept = torch.rand(self.numel, dtype=state, device=device)
        self.sums, self.squares, self.one_sum = (
            torch.tensor(values, dtype=torch.float64, device=device) for values in ([-0.7, 1.3], [2.0, 3.0], [0.0])
        )
        self.partials = torch.empty(5 * ops.count_chunks(sizes), dtype=state, device=device)
        self.stats = torch.ones(5, dtype=torch.float64, device=device)
        self.steps = torch.ones(len(sizes), device=device)
        self.index = torch.arange(len(sizes), device=device)
        self.corrections = torch.ones(len(sizes), 2, dtype=state, device=device)
        # name -> (call, bytes read and written for each parameter)
        self.calls: dict[str, tuple[Callable[[], None], int]] = {
            op: (getattr(self, op), moved(op, dtype)) for op in OPS
        }

    def noise_norm(self) -> None:
        self.backend.noise_norm(
            self.params, self.grads, self.offsets, self.first, None, None, 1.0, 0.9, False, False, self.partials,
            self.stats,
        )  # fmt: skip

    def perturb(self, *more: Any) -> None:
        self.backend.perturb(
            self.params, self.grads, self.offsets, self.first, None, self.backup, self.stats, None,
            1e-3, None, 1.0, 0.9, 1e-12, False, False, True, 0, None, *more,
        )  # fmt: skip

    def perturb_keeping(self) -> None:
        self.perturb(None, self.kept)

    def dots(self) -> None:
        self.backend.dots(self.params, self.grads, self.offsets, self.kept, None, self.partials, self.sums)

    def project(self) -> None:
        self.backend.project(
            self.params, self.grads, self.offsets, self.kept, self.sums, self.stats, None, None, self.partials,
            self.one_sum,
        )  # fmt: skip

    def update_ema_measuring(self) -> None:
        self.backend.update_ema(
            self.params, self.grads, self.offsets, self.first, None, None, None, None, 0.9, None, self.partials,
            self.one_sum,
        )  # fmt: skip

    def reused(self) -> tuple:
        """The last arguments of an update between two ascents."""
        return (False, None, self.kept, self.squares, 0.3, 1e-12)

    def restore(self) -> None:
        self.backend.restore(self.params, self.offsets, self.backup)

    def restore_sgd(self, *more: Any) -> None:
        self.backend.restore_sgd(
            self.params, self.grads, self.offsets, None if more else self.backup, self.first, self.stats, None, None,
            1e-3, None, 0.9, 0.0, 1e-4, False, False, None, *more,
        )  # fmt: skip

    def restore_sgd_reusing(self) -> None:
        self.restore_sgd(*self.reused())

    def count_steps(self) -> None:
        self.backend.count_steps(
            self.steps, self.index, self.corrections, self.stats, None, 1e-3, None, 0.9, 0.999
        )  # fmt: skip

    def restore_adam(self, *more: Any) -> None:
        self.backend.restore_adam(
            self.params, self.grads, self.offsets, None if more else self.backup, self.first, self.second,
            self.corrections, self.stats, None, None, 1e-3, None, 0.9, 0.999, 1e-8, 0.01, True, False, None, *more,
        )  # fmt: skip

    def restore_adam_reusing(self) -> None:
        self.restore_adam(*self.reused())


def serving(name: str, device: torch.device) -> Any:
    """The ops of one of this package's GPU backends; on a CPU, where runs are dry, what stands in for it.

    Raises:
        SystemExit: the backend does not serve the device; the message says why.
    """
    candidate = "cpu" if (name, device.type) == ("cuda", "cpu") else name
    backend, reason = CANDIDATES[candidate](device)
    if backend is None:
        raise SystemExit(f"backend '{name}' does not serve {device}: {reason}")
    return backend


def provider(backend: str, op: str) -> str:
    """Who a row is of: CUDA's kernels are what users of an NVIDIA GPU get unasked."""
    return f"fsam_ext {op}" if backend == "cuda" else f"fsam_ext {backend} {op}"


def row(backend: str, op: str, case: tuple[str, int, str], metric: str, unit: str, samples: list[float]) -> rows.Row:
    """A row of some samples, without the columns that say where and when."""
    dtype, numel, layout = case
    q = measure.quantiles(samples)
    return rows.Row(
        provider(backend, op), backend, label(numel, layout), dtype, "", metric, unit, q.median, q.q20, q.q80, q.samples
    )


def fits(numel: int, device: torch.device) -> bool:
    """Whether a case fits into what is free of the device's memory."""
    return not gpu.serves(device) or gpu.free_bytes(device) > ROOM * numel


def bandwidths(name: str, device: torch.device, case: tuple[str, int, str], seconds: float) -> list[rows.Row]:
    """Each pass of a backend beside a copy in the same round: the share of the copy's bandwidth that it reaches."""
    dtype, numel, layout = case
    clock = measure.clock_for(device, flush=True)  # models are larger than an L2
    passes = Passes(serving(name, device), device, DTYPES[dtype], numel, layout)
    source = torch.ones(min(8 * numel, LARGEST_COPY), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = {op: call for op, (call, _) in passes.calls.items()} | {"copy": lambda: target.copy_(source)}
    for call in calls.values():
        call()
    candidates = {op: (lambda call=call: {"step": clock.seconds(call)}) for op, call in calls.items()}
    rounds = measure.alternate(candidates, seconds)
    copies = measure.values(rounds, "copy", "step")
    copied = 2 * source.numel()
    found = [row(name, "copy", case, "bandwidth", "GB/s", [copied / c / 1e9 for c in copies])]
    for op, (_, nbytes) in passes.calls.items():
        times, moved = measure.values(rounds, op, "step"), nbytes * passes.numel
        found.append(row(name, op, case, "time", "us", [t * 1e6 for t in times]))
        if not nbytes:
            continue
        shares = [100 * (moved / t) / (copied / c) for t, c in zip(times, copies, strict=True)]
        found += [
            row(name, op, case, "bandwidth", "GB/s", [moved / t / 1e9 for t in times]),
            row(name, op, case, SHARE, "%", shares),
        ]
    return [rows.Row(**{**vars(one), **rows.stamp(device)}) for one in found]


def once(name: str, device: torch.device, cases: list[tuple[str, int, str]]) -> None:
    """Passes of some cases once, for a profiler: by kernels' names those of a reuse cannot be told from the others."""
    for dtype, numel, layout in cases:
        passes = Passes(serving(name, device), device, DTYPES[dtype], numel, layout)
        for op in PROFILED:
            passes.calls[op][0]()
    if gpu.serves(device):
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> None:
    """Writes rows after every case, and prints them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("cuda", "triton"), required=True)
    parser.add_argument("--device", default="cuda", help="cpu: small cases, for a dry run")
    parser.add_argument("--seconds", type=float, default=40.0, help="for all cases together")
    parser.add_argument("--once", action="store_true", help="no times: each pass of the first cases once")
    parser.add_argument("--out", type=Path, help="the CSV file that the rows join")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    cases = DRY_CASES if device.type == "cpu" else CASES
    if args.once:
        return once(args.backend, device, [case for case in cases if case[1] == cases[0][1] and case[2] == "flat"])
    for case in cases:
        title = f"{case[0]} {label(*case[1:])}"
        if not fits(case[1], device):
            print(f"{title}: not run, {ROOM * case[1] >> 30} GiB of the GPU's memory would be needed")
            continue
        found = bandwidths(args.backend, device, case, args.seconds / len(cases))
        if args.out:
            rows.write(args.out, rows.merge(rows.read(args.out), found))
        for one in found:
            print(f"{title:16} {one.provider:26} {one.median:12.1f} {one.unit:5} {one.metric}", flush=True)
        if gpu.serves(device):
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
