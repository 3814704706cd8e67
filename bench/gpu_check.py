"""Everything that a GPU is needed for, in one run: tests, NVIDIA's sanitizers, and each kernel's share of bandwidth.

``python bench/gpu_check.py`` needs an installed torch with Triton, fsam_ext with its CUDA library, pytest, and no
network. It checks both backends; where the library is not there (an AMD GPU), Triton alone. The rows of the benchmark
go to ``bench/results/``; docs/gpu-model.md says what they should be.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import measure, rows  # noqa: E402
from fsam_ext import ops  # noqa: E402
from fsam_ext.backends import CANDIDATES  # noqa: E402

DEVICE = torch.device("cuda")
NUMELS = (10_000_000, 100_000_000, 1_000_000_000)
# Parameters of one tensor, or cut into tensors of 256 elements: the smallest that models have many of.
LAYOUTS = ("flat", "tiny")
TINY = 256


def pytest_command(*arguments: str) -> list[str]:
    """pytest over some of the tests, from the root."""
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def backends_here() -> dict[str, Any]:
    """This package's backends that serve the GPU, by name."""
    served = {name: CANDIDATES[name](DEVICE) for name in ("cuda", "triton")}
    for name, (backend, reason) in served.items():
        if backend is None:
            print(f"backend '{name}' is not checked: {reason}")
    return {name: backend for name, (backend, _) in served.items() if backend is not None}


def run_tests(names: Iterable[str]) -> bool:
    """The conformance suite on the GPU and the tests that need one."""
    chosen = {
        "cuda": ("cuda and not emulated", "tests/test_cuda_gpu.py"),
        "triton": ("triton", "tests/test_triton.py"),
    }
    passed = True
    for name in names:
        expression, tests = chosen[name]
        for command in (
            pytest_command("tests/test_conformance.py", "tests/test_mixed_precision.py", "-k", expression),
            pytest_command(tests, "-m", "gpu"),
        ):
            passed &= subprocess.run(command, cwd=ROOT).returncode == 0
    return passed


def run_sanitizers() -> bool:
    """memcheck and racecheck of compute-sanitizer over the conformance suite, each tensor in its own allocation."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        print("compute-sanitizer was not found: install the CUDA toolkit's, or add it to PATH")
        return False
    passed = True
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        command += pytest_command("tests/test_conformance.py", "-x", "-k", "cuda and not emulated and bfloat16")
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        print(f"{tool}: {'clean' if code == 0 else f'failed with {code}'}")
        passed &= code == 0
    return passed


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
        self.partials = torch.empty(5 * ops.count_chunks(sizes), dtype=state, device=device)
        self.stats = torch.ones(5, dtype=torch.float64, device=device)
        self.corrections = torch.ones(len(sizes), 2, dtype=state, device=device)
        low, high = dtype.itemsize, state.itemsize
        # name -> (call, bytes read and written for each parameter)
        self.calls: dict[str, tuple[Callable[[], None], int]] = {
            "noise_norm": (self.noise_norm, low + high),
            "perturb": (self.perturb, 2 * low + high + 2 * low + high),
            "restore": (self.restore, 2 * low),
            "restore_sgd": (self.restore_sgd, 2 * low + high + low + high),
            "restore_adam": (self.restore_adam, 2 * low + 2 * high + low + 2 * high),
        }

    def noise_norm(self) -> None:
        self.backend.noise_norm(
            self.params,
            self.grads,
            self.offsets,
            self.first,
            None,
            None,
            1.0,
            0.9,
            False,
            False,
            self.partials,
            self.stats,
        )

    def perturb(self) -> None:
        self.backend.perturb(
            self.params, self.grads, self.offsets, self.first, None, self.backup, self.stats, None,
            1e-3, None, 1.0, 0.9, 1e-12, False, False, True, 0, None,
        )  # fmt: skip

    def restore(self) -> None:
        self.backend.restore(self.params, self.offsets, self.backup)

    def restore_sgd(self) -> None:
        self.backend.restore_sgd(
            self.params, self.grads, self.offsets, self.backup, self.first, self.stats, None, None,
            1e-3, None, 0.9, 0.0, 1e-4, False, False, None,
        )  # fmt: skip

    def restore_adam(self) -> None:
        self.backend.restore_adam(
            self.params, self.grads, self.offsets, self.backup, self.first, self.second, self.corrections, self.stats,
            None, None, 1e-3, None, 0.9, 0.999, 1e-8, 0.01, True, False, None,
        )  # fmt: skip


def run_benchmark(backends: dict[str, Any], seconds: float) -> list[rows.Row]:
    """Each pass of each backend beside a copy in the same round: the share of the copy's bandwidth that it reaches."""
    clock, found = measure.DeviceClock(), []
    for dtype in (torch.float32, torch.bfloat16):
        for numel in NUMELS:
            for layout in LAYOUTS:
                if layout == "tiny" and numel > NUMELS[0]:
                    continue
                if torch.cuda.mem_get_info()[0] < 32 * numel * len(backends):
                    continue
                passes = {name: Passes(backend, DEVICE, dtype, numel, layout) for name, backend in backends.items()}
                source = torch.empty(min(8 * numel, 1 << 31), dtype=torch.uint8, device=DEVICE)
                target = torch.empty_like(source)
                which = [(name, op) for name, made in passes.items() for op in made.calls]
                calls = {f"{name} {op}": passes[name].calls[op][0] for name, op in which}
                calls["copy"] = lambda target=target, source=source: target.copy_(source)
                for call in calls.values():
                    call()
                candidates = {name: (lambda call=call: {"step": clock.seconds(call)}) for name, call in calls.items()}
                rounds = measure.alternate(candidates, seconds)
                copied = 2 * source.numel()
                for name, op in which:
                    moved = passes[name].calls[op][1] * passes[name].numel
                    times = measure.values(rounds, f"{name} {op}", "step")
                    shares = [
                        100 * (moved / t) / (copied / c)
                        for t, c in zip(times, measure.values(rounds, "copy", "step"), strict=True)
                    ]
                    for metric, unit, samples in (
                        ("time", "us", [t * 1e6 for t in times]),
                        ("bandwidth", "GB/s", [moved / t / 1e9 for t in times]),
                        ("share of a copy's bandwidth", "%", shares),
                    ):
                        q = measure.quantiles(samples)
                        found.append(
                            rows.Row(
                                provider=f"fsam_ext {op}" if name == "cuda" else f"fsam_ext {name} {op}",
                                backend=name,
                                workload=f"{layout} {numel // 1_000_000}M",
                                dtype=str(dtype).removeprefix("torch."),
                                base="",
                                metric=metric,
                                unit=unit,
                                median=q.median,
                                q20=q.q20,
                                q80=q.q80,
                                samples=q.samples,
                                **rows.stamp(DEVICE),
                            )
                        )
                        print(f"{found[-1].workload:10} {found[-1].dtype:8} {name:7}{op:12} {q.median:10.1f} {unit}")
                del passes, source, target, calls, candidates
                torch.cuda.empty_cache()
    return found


def main() -> None:
    """Runs what is asked for, all of it by default, and exits with 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["tests", "sanitizers", "benchmark"], action="append")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each workload of the benchmark")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_check needs a CUDA GPU and a torch that sees it")
    backends = backends_here()
    if not backends:
        sys.exit("gpu_check: no backend of this package serves the GPU")
    wanted = arguments.only or ["tests", "sanitizers", "benchmark"]
    passed = True
    if "tests" in wanted:
        passed &= run_tests(backends)
    if "sanitizers" in wanted and "cuda" in backends:
        passed &= run_sanitizers()
    if "benchmark" in wanted:
        path = rows.default_path(DEVICE)
        rows.write(path, rows.merge(rows.read(path), run_benchmark(backends, arguments.seconds)))
        print(f"rows are in {path}")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
