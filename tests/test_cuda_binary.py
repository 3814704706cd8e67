"""The CUDA library as nvcc built it, checked without a GPU: what it needs, where it loads, what its kernels cost."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch

from bench import cuda_check, gpu_model
from bench.sass import figures
from fsam_ext import _library
from fsam_ext.backends import ops

LIBRARY = _library.LIBRARY_DIR / "_C_cuda.abi3.so"
ARCHITECTURES = {"75", "80", "86", "90", "100", "120"}
# Three sizes of table; norm (plain, adaptive), perturbation, average, restore, SGD, Adam: for float64, for float32
# (averages of three types, or none), for each 16-bit type (masters, too); a sum_slots for each of the four;
# and a count_steps for each type of state.
KERNELS = 3 * ((4 + 2 + 1 + 1 + 2 + 1) + (8 + 4 + 3 + 1 + 2 + 1) + 2 * (8 + 8 + 3 + 2 + 4 + 2)) + 4 + 2

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library was not built")


@pytest.fixture(scope="module")
def kernels():
    if cuda_check.missing_tools():
        pytest.skip(cuda_check.missing_tools())
    found = cuda_check.read_library(LIBRARY)
    assert found
    return found


@pytest.fixture(scope="module")
def passes(kernels):
    return [kernel for kernel in kernels if kernel.is_pass]


def described(kernels) -> str:
    return "; ".join(f"sm_{kernel.arch} {kernel.name}: {kernel}" for kernel in kernels)[:2000]


def test_loads_and_registers_in_any_torch():
    assert _library.CUDA_REASON is None
    for name in ops.NAMES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fsam_ext::{name}", "CUDA"), name


def stable_shim_names(newest: tuple[int, int]) -> set[str]:
    """The functions of torch's stable C shim that a torch of that version has."""
    include = Path(torch.__file__).parent / "include/torch/csrc"
    names = set()
    for header in (include / "stable/c/shim.h", include / "inductor/aoti_torch/c/shim.h"):
        hidden, depth = [], 0
        for line in header.read_text().splitlines():
            if re.match(r"\s*#\s*if", line):
                depth += 1
                since = re.search(r"FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)", line)
                if since and (int(since[1]), int(since[2])) > newest:
                    hidden.append(depth)
            elif re.match(r"\s*#\s*endif", line):
                if hidden and hidden[-1] == depth:
                    hidden.pop()
                depth -= 1
            elif not hidden:
                names.update(re.findall(r"\b(?:aoti_)?torch_\w+", line))
    return names


def test_needs_only_the_stable_shim_of_the_oldest_torch():
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", LIBRARY], text=True, capture_output=True, check=True
    ).stdout
    undefined = {line.split()[-1].partition("@")[0] for line in symbols.splitlines()}
    undefined -= {"_ZNK3c1010TensorImpl4gradEv"}  # weak: csrc/held.h, NOTE [symbols outside the stable ABI]
    of_torch = {name for name in undefined if name.startswith(("aoti_torch", "torch_"))}
    assert "aoti_torch_get_current_stream" in of_torch
    assert of_torch <= stable_shim_names((2, 10))
    assert not {name for name in undefined if re.search(r"c10|at6Tensor|5torch|cuda|^cu[A-Z]", name)}


def test_holds_every_architecture_and_ptx_for_later_ones(kernels):
    assert {kernel.arch for kernel in kernels} == ARCHITECTURES
    assert cuda_check.has_ptx(LIBRARY)
    for arch in ARCHITECTURES:
        assert sum(kernel.arch == arch for kernel in kernels) == KERNELS


def test_nothing_spills(kernels):
    spilled = [kernel for kernel in kernels if kernel.spills or kernel.stack or kernel.local]
    assert not spilled, described(spilled)


def test_registers_leave_room_for_full_bandwidth(passes):
    """See NOTE [bytes in flight] in bench/gpu_model.py."""
    starved = [
        kernel
        for kernel in passes
        if kernel.bytes_in_flight_per_sm < gpu_model.GPUS[kernel.arch].bytes_in_flight_per_sm
    ]
    assert not starved, described(starved)


def test_aligned_main_loops_move_16_bytes_at_once(passes):
    wide = [kernel for kernel in passes if not kernel.narrow_average]
    narrow = [kernel for kernel in wide if not all(".128" in access for access in kernel.main_loop)]
    assert not narrow, described(narrow)
    for kernel in wide:
        loads = sum(access.startswith("LDG") for access in kernel.main_loop)
        assert loads >= kernel.bytes_in_flight_per_thread // 16, described([kernel])
        stores = sum(access.startswith("STG") for access in kernel.main_loop)
        assert (stores > 0) == (kernel.op != "noise_norm"), described([kernel])


def test_library_is_small_enough_to_ship():
    assert LIBRARY.stat().st_size < 16.5e6


# ---- What a call executes


@pytest.fixture(scope="module")
def executed():
    if cuda_check.missing_tools():
        pytest.skip(cuda_check.missing_tools())
    found = figures.read(LIBRARY)
    assert "90" in {figure.arch for figure in found}, "build for sm_90, too: its calls are counted"
    return found


def too_high(values: dict, limits: dict) -> str:
    return "; ".join(
        f"{name}: {value:.1f}, not {limits[name]:.1f}" for name, value in values.items() if value > limits[name]
    )


def test_default_calls_of_every_op_are_counted(executed):
    counted = {(figure.op, figure.dtype) for figure in executed}
    assert counted == {("count_steps", "fp32"), *itertools.product(gpu_model.MOVED, gpu_model.STORAGE_BYTES)}


def test_executed_main_loops_move_16_bytes_at_once(executed):
    for figure in executed:
        assert figure.narrow == 0, str(figure)
        if figure.op in gpu_model.MOVED:
            assert figure.moved_bytes == gpu_model.bytes_per_parameter(figure.op, figure.dtype), str(figure)


def test_no_pass_is_near_the_issue_limit(executed):
    """Half of what there is time for on an H200 at 4.3 TB/s: NOTE [issue limit] in bench/gpu_model.py.

    For models that are large enough for several chunks a block: the others are no matter of throughput.
    """
    passes = [figure for figure in executed if figure.op in gpu_model.MOVED and figure.model.span > 1]
    limits = {
        str(figure): gpu_model.H200.issue_limit(gpu_model.bytes_per_parameter(figure.op, figure.dtype), 4.3e12) / 2
        for figure in passes
    }
    assert not too_high({str(figure): figure.per_parameter for figure in passes}, limits)


def test_every_pass_leaves_issue_slots_on_the_gpu_of_its_binary(executed):
    """A quarter of them at what a copy reaches of the bandwidth; the tightest is bf16's norm on a B200."""
    passes = [figure for figure in executed if figure.op in gpu_model.MOVED and figure.model.span > 1]
    counts, limits = {}, {}
    for figure in passes:
        gpu, nbytes = gpu_model.GPUS[figure.arch], gpu_model.bytes_per_parameter(figure.op, figure.dtype)
        counts[str(figure)] = figure.per_parameter
        limits[str(figure)] = 0.75 * gpu.issue_limit(nbytes, gpu_model.SHARE_OF_BANDWIDTH * gpu.bandwidth)
    assert not too_high(counts, limits)


# Of the warp that issues most of them, for a flattened model and for one of 148 tensors. The bounds are some tenths
# above what nvcc 13.0 makes of the kernels.
BEFORE_FIRST_LOAD = {
    "noise_norm": (140, 170), "perturb": (170, 200), "update_ema": (130, 160), "restore": (120, 150),
    "restore_sgd": (170, 200), "restore_adam": (200, 230), "count_steps": (30, 30),
}  # fmt: skip


def test_first_loads_are_early(executed):
    counts = {str(figure): figure.before_first_load for figure in executed}
    limits = {str(figure): BEFORE_FIRST_LOAD[figure.op][len(figure.model.sizes) > 1] for figure in executed}
    assert not too_high(counts, limits)
