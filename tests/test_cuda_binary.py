"""The CUDA library as nvcc built it, checked without a GPU: what it needs, where it loads, what its kernels cost."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from bench import cuda_check, gpu_model
from fsam_ext import _cuda_matrix, _library
from fsam_ext.backends import ops

LIBRARY = _library.LIBRARY_DIR / "_C_cuda.abi3.so"
ARCHITECTURES = {capability.replace(".", "") for capability in _cuda_matrix.ARCHITECTURES}
TABLE = 256  # the one size that every kind of kernel has
# Three sizes of table; norm (plain, adaptive), perturbation, average, restore, SGD, Adam: for float64, for float32
# (averages of three types, or none), for each 16-bit type (masters, too); a sum_slots for each of the four;
# and a count_steps for each type of state. One size of table for what reuses gradients: dots and project, averages that
# give the norm, SGD, Adam.
REUSING = (2 + 1 + 1 + 1) + (2 + 3 + 1 + 1) + 2 * (2 + 3 + 2 + 2)
KERNELS = 3 * ((4 + 2 + 1 + 1 + 2 + 1) + (8 + 4 + 3 + 1 + 2 + 1) + 2 * (8 + 8 + 3 + 2 + 4 + 2)) + 4 + 2 + REUSING

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library was not built")


@pytest.fixture(scope="module")
def kernels():
    if cuda_check.missing_tools():
        pytest.skip(cuda_check.missing_tools())
    found = cuda_check.read_library(LIBRARY, TABLE)
    assert found
    return found


@pytest.fixture(scope="module")
def passes(kernels):
    found = [kernel for kernel in kernels if kernel.is_pass and kernel.is_read]
    # The others are the same code (make cuda-check reads it all).
    kinds = {(kernel.arch, re.sub(r"Table<\d+>", "", kernel.name)) for kernel in kernels if kernel.is_pass}
    assert len(found) == len(kinds)
    return found


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
    narrow = [kernel for kernel in wide if kernel.narrow_accesses]
    assert not narrow, described(narrow)
    for kernel in wide:
        loads = sum(access.startswith("LDG") and ".128" in access for access in kernel.main_loop)
        assert loads >= kernel.bytes_in_flight_per_thread // 16, described([kernel])
        stores = sum(access.startswith("STG") and ".128" in access for access in kernel.main_loop)
        assert (stores > 0) == (kernel.op not in ("noise_norm", "dots")), described([kernel])


def test_library_is_small_enough_to_ship():
    assert LIBRARY.stat().st_size < 17.6e6  # 16.2 MB before reuse, whose 30 kernels an architecture are the rest
