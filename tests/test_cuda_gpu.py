"""What only a GPU can show: graphs, streams, synchronisation, launches and allocations, and the CPU's bits.

Run with ``-m gpu``, or with the sanitizers and the benchmark by ``python bench/gpu_check.py``.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fsam_ext import FriendlySAM
from fsam_ext.backends import resolve

from .cuda_problem import (
    DTYPES,
    KEPT,
    KINDS,
    PLAIN,
    SIZES,
    STORED,
    Problem,
    bits,
    same_bits,
    same_values_on_and_off_bounds,
)

pytestmark = pytest.mark.gpu

BASES = ["sgd", "adam"]


@pytest.fixture(scope="module")
def cuda():
    return resolve("cuda", torch.device("cuda"))


@pytest.fixture(scope="module")
def cpu():
    return resolve("cpu", torch.device("cpu"))


def step(problem, backend, base="sgd"):
    problem.noise_norm(backend)
    problem.perturb(backend)
    getattr(problem, base)(backend)


def reusing_steps(problem, backend, base="sgd"):
    """A step that ascends and one between two ascents."""
    problem.noise_norm(backend)
    problem.perturb_keeping(backend)
    problem.dots(backend)
    problem.project(backend)
    getattr(problem, base)(backend)
    problem.update_ema_measuring(backend)
    getattr(problem, f"reusing_{base}")(backend)


def on_cpu(problem):
    return [tensor.cpu() for tensor in problem.tensors()]


def assert_same_bits_as_cpu(cuda, cpu, run, *args, **kwargs):
    ours, theirs = Problem(*args, device="cuda", **kwargs), Problem(*args, **kwargs)
    for problem, backend in ((ours, cuda), (theirs, cpu)):
        problem.stats.copy_(torch.tensor([7.0, 0, 0, 0, 0]))
        run(problem, backend)
    for x, y in zip(on_cpu(ours), theirs.tensors(), strict=True):
        # Where a NaN came out, its payload is the processor's own.
        assert torch.equal(x.isnan(), y.isnan())
        assert torch.equal(bits(x.nan_to_num(nan=0.0)), bits(y.nan_to_num(nan=0.0)))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
class TestSameBitsAsCpu:
    @pytest.mark.parametrize("kind, adaptive", KINDS)
    def test_perturb(self, cuda, cpu, dtype, shift, kind, adaptive):
        run = lambda problem, backend: problem.perturb(backend, kind, adaptive)  # noqa: E731
        assert_same_bits_as_cpu(cuda, cpu, run, dtype, SIZES, shift)

    def test_restore(self, cuda, cpu, dtype, shift):
        assert_same_bits_as_cpu(cuda, cpu, Problem.restore, dtype, SIZES, shift)

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_sgd(self, cuda, cpu, dtype, shift, nesterov):
        run = lambda problem, backend: problem.sgd(backend, nesterov=nesterov)  # noqa: E731
        assert_same_bits_as_cpu(cuda, cpu, run, dtype, SIZES, shift)

    def test_adam(self, cuda, cpu, dtype, shift):
        if dtype == torch.float64:
            pytest.skip("pow() of the bias correction may differ in its last bit, which float64 keeps")
        run = lambda problem, backend: problem.adam(backend)  # noqa: E731
        assert_same_bits_as_cpu(cuda, cpu, run, dtype, SIZES, shift)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype, stored", [*PLAIN, *STORED])
@pytest.mark.parametrize("op", [Problem.perturb, Problem.update_ema], ids=["perturb", "update_ema"])
def test_averages_have_the_same_bits_as_on_the_cpu(cuda, cpu, op, dtype, stored, shift):
    assert_same_bits_as_cpu(cuda, cpu, op, dtype, SIZES, shift, stored=stored)


KEEPING = [Problem.perturb_keeping, Problem.reusing_sgd, Problem.reusing_adam, Problem.project]
SUMMING = [Problem.dots, Problem.project, Problem.update_ema_measuring]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype, kept", KEPT)
@pytest.mark.parametrize("op", KEEPING, ids=lambda op: op.__name__)
def test_what_is_kept_and_reused_has_the_same_bits_as_on_the_cpu(cuda, cpu, op, dtype, kept, shift):
    if op == Problem.reusing_adam and dtype == torch.float64:
        pytest.skip("pow() of the bias correction may differ in its last bit, which float64 keeps")

    def run(problem, backend):
        op(problem, backend)
        problem.one_sum.zero_()  # a norm, whose order of summation is each backend's own

    assert_same_bits_as_cpu(cuda, cpu, run, dtype, SIZES, shift, kept=kept)


@pytest.mark.parametrize("dtype, kept", KEPT)
@pytest.mark.parametrize("op", SUMMING, ids=lambda op: op.__name__)
def test_sums_of_a_reuse_have_the_same_bits_in_every_run(cuda, op, dtype, kept):
    """The conformance suite says that they are right."""

    def sums():
        problem = Problem(dtype, SIZES, device="cuda", kept=kept)
        problem.stats.fill_(1)
        op(problem, cuda)
        return torch.cat([problem.sums, problem.one_sum])

    assert torch.equal(bits(sums()), bits(sums()))


@pytest.mark.parametrize("dtype, stored", [*PLAIN, *STORED])
def test_norm_does_not_depend_on_alignment(cuda, dtype, stored):
    aligned, shifted = same_values_on_and_off_bounds(dtype, stored, device="cuda")
    assert torch.equal(bits(aligned.noise_norm(cuda)), bits(shifted.noise_norm(cuda)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_with_moments_of_every_kind(cuda, cpu, dtype):
    """The division of a group: csrc/cuda/divide.cuh."""
    run = lambda problem, backend: problem.adam_of_hard_cases(backend)  # noqa: E731
    assert_same_bits_as_cpu(cuda, cpu, run, dtype, [1 << 22])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_has_the_same_bits_on_every_stream_and_run(cuda, dtype):
    first = Problem(dtype, SIZES, device="cuda").noise_norm(cuda)
    for _ in range(5):
        with torch.cuda.stream(torch.cuda.Stream()):
            again = Problem(dtype, SIZES, device="cuda").noise_norm(cuda)
        torch.cuda.synchronize()
        assert torch.equal(bits(first), bits(again))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("sizes", [SIZES, [37] * 1000], ids=["one table", "several tables"])
@pytest.mark.parametrize("step", [step, reusing_steps], ids=lambda step: step.__name__)
def test_graph_replays_what_eager_does(cuda, base, sizes, step):
    eager, replayed = (Problem(torch.float32, sizes, device="cuda") for _ in range(2))
    warm_up = Problem(torch.float32, sizes, device="cuda")
    step(warm_up, cuda, base)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(replayed, cuda, base)
    for turn in range(3):
        for problem in (eager, replayed):  # what the graph must read anew in each replay
            problem.rho.fill_(0.05 * (turn + 1))
            problem.lr.fill_(0.1 / (turn + 1))
            problem.grad_scale.fill_(2.0**turn)
            problem.found_inf.fill_(float(turn == 1))
            problem.grads[3].fill_(torch.inf if turn == 2 else 0.5)
            problem.steps.fill_(turn + 1)
        step(eager, cuda, base)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(eager, replayed), f"replay {turn}"


FIRST_CALLS = """
import torch
from fsam_ext.backends import resolve
from tests.cuda_problem import SIZES, Problem, same_bits
from tests.test_cuda_gpu import step

cuda = resolve("cuda", torch.device("cuda"))
eager, replayed = (Problem(torch.float32, SIZES, device="cuda") for _ in range(2))
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    step(replayed, cuda, "adam")
graph.replay()
step(eager, cuda, "adam")
torch.cuda.synchronize()
assert same_bits(eager, replayed)
"""


def test_the_first_calls_of_a_process_are_captured():
    """csrc/cuda/driver.cpp, NOTE [the first launch in a capture]."""
    environment = {**os.environ, "CUDA_MODULE_LOADING": "LAZY"}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALLS], text=True, capture_output=True, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stderr


def model_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10)).cuda()
    return model, torch.randn(32, 20, device="cuda"), torch.randint(0, 10, (32,), device="cuda")


def train(model, optimizer, x, y):
    """One step, forward and backward included; gradients are zeroed in place, so that their addresses stay."""
    for finish in (optimizer.first_step, optimizer.second_step):
        nn.functional.cross_entropy(model(x), y).backward()
        finish()
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize(
    "base, options",
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.AdamW, {"lr": torch.tensor(1e-2), "weight_decay": 0.1}),
    ],
    ids=["SGD", "AdamW"],
)
def test_whole_training_step_in_a_graph(base, options):
    options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    model, x, y = model_and_data()
    twin = copy.deepcopy(model)
    optimizers = [
        FriendlySAM(m.parameters(), base, rho=torch.tensor(0.05, device="cuda"), capturable=True, **options)
        for m in (model, twin)
    ]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train(model, optimizers[0], x, y)
            train(twin, optimizers[1], x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(twin, optimizers[1], x, y)
    for _ in range(4):
        train(model, optimizers[0], x, y)
        graph.replay()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(bits(ours.detach()), bits(theirs.detach()))


def test_nothing_waits_for_the_device():
    model, x, y = model_and_data()
    optimizer = FriendlySAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=1e-2)
    train(model, optimizer, x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            train(model, optimizer, x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "step, launches, updates", [(step, 4, 1), (reusing_steps, 11, 2)], ids=["step", "reusing_steps"]
)
def test_launches_and_allocations(cuda, base, step, launches, updates):
    """Two launches for each sum (its chunks, their sum), one for each other op; nothing allocated."""
    problem = Problem(torch.bfloat16, SIZES, device="cuda")
    step(problem, cuda, base)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(problem, cuda, base)
        torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    counts = updates if base == "adam" else 0  # of its steps
    assert len(kernels) == launches + counts, kernels


def test_streams_do_not_mix(cuda):
    alone = [Problem(torch.float32, [100000], seed=seed, device="cuda") for seed in range(4)]
    together = [Problem(torch.float32, [100000], seed=seed, device="cuda") for seed in range(4)]
    for problem in alone:
        step(problem, cuda)
        torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in together]
    for problem, stream in zip(together, streams, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(problem, cuda)
    torch.cuda.synchronize()
    assert all(same_bits(a, b) for a, b in zip(alone, together, strict=True))


def test_waits_for_what_its_stream_has_queued(cuda):
    """The ops run on the current stream: a gradient that is still being written there is seen finished."""
    problem, expected = (Problem(torch.float32, [1 << 20], device="cuda") for _ in range(2))
    expected.grads[0].fill_(3.0)
    expected.noise_norm(cuda)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        problem.grads[0].fill_(3.0)
        problem.noise_norm(cuda)
    torch.cuda.synchronize()
    assert torch.equal(bits(problem.stats), bits(expected.stats))


def test_second_device_is_not_the_current_one(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here, there = Problem(torch.float32, SIZES, device="cuda:0"), Problem(torch.float32, SIZES, device="cuda:1")
    with torch.cuda.device(0):
        step(here, cuda)
        step(there, cuda)
        assert torch.cuda.current_device() == 0
    for x, y in zip(on_cpu(here), on_cpu(there), strict=True):
        assert torch.equal(bits(x), bits(y))


@pytest.mark.large
def test_a_row_of_more_than_two_to_the_31_elements(cuda):
    numel = (1 << 31) + 4097
    if torch.cuda.mem_get_info()[0] < 10 * numel:
        pytest.skip("needs 22 GB of free GPU memory")
    w = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    g = torch.ones(numel, dtype=torch.bfloat16, device="cuda")
    offsets = torch.zeros(1, dtype=torch.int64)
    cuda.restore_sgd([w], [g], offsets, None, None, None, None, None, 1.0, None, 0.0, 0.0, 0.0, False, False, None)
    assert (w[:4096] == -1).all() and (w[-8192:] == -1).all() and int((w != -1).sum()) == 0
