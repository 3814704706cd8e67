"""How the work is cut into programs and threads, and the launch of a kernel."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable
from typing import Any

import torch
import triton

from . import kernels

INTERPRETED = triton.knobs.runtime.interpret


def unavailable(device: torch.device) -> str | None:
    """Returns why this backend cannot serve ``device``, or None where it can."""
    if INTERPRETED:
        return None if device.type == "cpu" else "TRITON_INTERPRET is set: Triton runs on the CPU"
    if device.type not in ("cuda", "xpu"):
        return "it serves GPUs only (cuda, ROCm, xpu), and the CPU under TRITON_INTERPRET=1"
    # Its driver is compiled when it is first asked for, which fails in other ways without a C compiler or libcuda.
    try:
        target = triton.runtime.driver.active.get_current_target()
    except (RuntimeError, AssertionError, OSError, subprocess.SubprocessError) as error:
        return f"Triton finds no driver for a GPU: {error}"
    if target.backend == "cuda" and torch.cuda.get_device_capability(device) < (7, 5):
        return "Triton needs compute capability 7.5 or later"
    return None


# NOTE [tiles]
# Passes that only sum take their chunk in one tile: a reduction then synchronises once. The other passes walk
# the chunk in tiles of 1024 (fp64: 512) elements with 128 threads, so that each thread holds 8
# elements (4 of fp64) of up to four tensors: one or two 128-bit accesses for each tensor, no
# spills, and enough programs on a multiprocessor to hide the memory's latency. Eight elements are
# also the fewest that give 16-bit types 128-bit accesses: 1024 elements on 256 threads (4 waves of
# an AMD CDNA) give 64-bit ones. It is a table, not a search: nothing is tuned at import or in the
# first step, and a run always gives the same bits.


def tile(dtype: torch.dtype) -> int:
    """Elements that a program of an elementwise pass handles at once."""
    return 512 if dtype == torch.float64 else 1024


def threads(kernel: str, dtype: torch.dtype) -> int:
    """Threads of a program of ``kernel``, whatever the size of a warp is."""
    if kernel == "sum_partials":
        return 256
    if kernel in ("noise_norm", "dots"):
        return 512 if dtype == torch.float64 else 256
    return 128


SUM_BLOCK = 2048  # chunks that a sum's second stage adds at once
COUNT_BLOCK = 128  # parameters whose steps a program counts


@functools.cache
def _warp_size() -> int:
    return 32 if INTERPRETED else triton.runtime.driver.active.get_current_target().warp_size


# NOTE [nothing is compiled under graph capture]
# A kernel that is met for the first time is compiled, which takes seconds, and loaded, which drivers older than CUDA
# 12.3 refuse during a capture: the capture is lost then, with an error that names neither the kernel nor the way out.
# So Triton's hook before a compilation refuses ours first, before the op writes anything.
def _refuse_to_compile(fn: Any, **_: Any) -> None:
    if fn.module.startswith(kernels.__name__):
        raise RuntimeError(
            f"fsam_ext: Triton's kernel {fn.name} is not compiled yet for these dtypes and options, and a graph is "
            "being captured; make one step with them before the capture"
        )


def without_compiling(op: Callable[..., None], *args: Any) -> None:
    """Runs an op under capture: NOTE [nothing is compiled under graph capture]."""
    runtime = triton.knobs.runtime
    hook, runtime.jit_cache_hook = runtime.jit_cache_hook, _refuse_to_compile
    try:
        op(*args)
    finally:
        runtime.jit_cache_hook = hook


def launch(kernel: str, dtype: torch.dtype, programs: int, *args: Any, **constants: Any) -> None:
    """``enable_fp_fusion=False``: separate multiplications and additions, as in every backend."""
    getattr(kernels, kernel)[(programs,)](
        *args,
        **constants,
        num_warps=threads(kernel, dtype) // _warp_size(),
        enable_fp_fusion=False,
    )
