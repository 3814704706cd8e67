"""What the kernels of the CUDA library execute in the default call of each op, counted without a GPU."""

from __future__ import annotations

import itertools

import pytest

from bench import cuda_check, gpu_model
from bench.sass import figures
from fsam_ext import _library

from .sass_problem import ARCHITECTURES

LIBRARY = _library.LIBRARY_DIR / "_C_cuda.abi3.so"

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library was not built")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def executed(request):
    if cuda_check.missing_tools():
        pytest.skip(cuda_check.missing_tools())
    found = figures.read(LIBRARY, [request.param])
    assert found or request.param != "90", "build for sm_90, too: its calls are counted"
    if not found:
        pytest.skip(f"the library holds no sm_{request.param}")
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


def test_a_lane_asks_for_all_its_groups_before_it_waits(executed):
    """16 parameters, and 8 of Adam's four operands: NOTE [groups of 16 bytes] in csrc/cuda/memory.cuh."""
    for figure in executed:
        if figure.op in gpu_model.MOVED:
            assert figure.under_way >= (8 if figure.op.startswith("restore_adam") else 16), str(figure)


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
    "perturb_keeping": (180, 210), "dots": (140, 170), "project": (140, 170), "update_ema_measuring": (130, 160),
    "restore_sgd_reusing": (190, 220), "restore_adam_reusing": (220, 250),
}  # fmt: skip


def test_first_loads_are_early(executed):
    counts = {str(figure): figure.before_first_load for figure in executed}
    limits = {str(figure): BEFORE_FIRST_LOAD[figure.op][len(figure.model.sizes) > 1] for figure in executed}
    assert not too_high(counts, limits)
