"""The CUDA source run by the emulation, beyond what every backend has to show in the conformance suite."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fsam_ext.backends import resolve

from . import cuda_emulation
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


@pytest.fixture(scope="module")
def emulated():
    return cuda_emulation.load()


@pytest.fixture(scope="module")
def cpu():
    return resolve("cpu", torch.device("cpu"))


def assert_same_bits_as_cpu(emulated, cpu, run, *args, stats=(7.0, 0, 0, 0, 0), **kwargs):
    ours, theirs = Problem(*args, **kwargs), Problem(*args, **kwargs)
    for problem, backend in ((ours, emulated), (theirs, cpu)):
        problem.stats.copy_(torch.tensor(stats, dtype=torch.float64))
        run(problem, backend)
    before = Problem(*args, **kwargs)
    before.stats.copy_(ours.stats)
    assert not same_bits(ours, before), "the op changed nothing"
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
class TestSameBitsAsCpu:
    """No multiplication and addition is contracted, so for the same norm both backends give the same bits."""

    @pytest.mark.parametrize("kind, adaptive", KINDS)
    def test_perturb(self, emulated, cpu, dtype, shift, kind, adaptive):
        run = lambda problem, backend: problem.perturb(backend, kind, adaptive)  # noqa: E731
        assert_same_bits_as_cpu(emulated, cpu, run, dtype, SIZES, shift)

    def test_perturb_with_infinite_norm_only_fills_the_backup(self, emulated, cpu, dtype, shift):
        run = lambda problem, backend: problem.perturb(backend)  # noqa: E731
        assert_same_bits_as_cpu(emulated, cpu, run, dtype, SIZES, shift, stats=(torch.inf, 0, 0, 0, 0))

    def test_restore(self, emulated, cpu, dtype, shift):
        assert_same_bits_as_cpu(emulated, cpu, Problem.restore, dtype, SIZES, shift)

    @pytest.mark.parametrize("with_backup", [True, False])
    @pytest.mark.parametrize("momentum, nesterov, maximize", [(0, 0, 0), (0.9, 0, 0), (0.9, 1, 0), (0.9, 1, 1)])
    def test_sgd(self, emulated, cpu, dtype, shift, momentum, nesterov, maximize, with_backup):
        run = lambda problem, backend: problem.sgd(  # noqa: E731
            backend, momentum, bool(nesterov), bool(maximize), with_backup
        )
        assert_same_bits_as_cpu(emulated, cpu, run, dtype, SIZES, shift)

    @pytest.mark.parametrize("with_backup", [True, False])
    @pytest.mark.parametrize("decoupled, maximize", [(True, False), (False, False), (False, True)])
    def test_adam(self, emulated, cpu, dtype, shift, decoupled, maximize, with_backup):
        run = lambda problem, backend: problem.adam(backend, decoupled, maximize, with_backup)  # noqa: E731
        assert_same_bits_as_cpu(emulated, cpu, run, dtype, SIZES, shift)

    @pytest.mark.parametrize("base", ["sgd", "adam"])
    def test_skipped_update_only_restores(self, emulated, cpu, dtype, shift, base):
        def run(problem, backend):
            problem.found_inf.fill_(1)
            getattr(problem, base)(backend)

        assert_same_bits_as_cpu(emulated, cpu, run, dtype, SIZES, shift)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype, stored", [*PLAIN, *STORED])
@pytest.mark.parametrize("op", [Problem.perturb, Problem.update_ema], ids=["perturb", "update_ema"])
def test_averages_have_the_same_bits_as_on_the_cpu(emulated, cpu, op, dtype, stored, shift):
    assert_same_bits_as_cpu(emulated, cpu, op, dtype, SIZES, shift, stored=stored)


KEEPING = [Problem.perturb_keeping, Problem.reusing_sgd, Problem.reusing_adam]
SUMMING = [Problem.dots, Problem.project, Problem.update_ema_measuring]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype, kept", KEPT)
@pytest.mark.parametrize("op", KEEPING, ids=lambda op: op.__name__)
def test_what_is_kept_and_reused_has_the_same_bits_as_on_the_cpu(emulated, cpu, op, dtype, kept, shift):
    assert_same_bits_as_cpu(emulated, cpu, op, dtype, SIZES, shift, kept=kept)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype, kept", KEPT)
def test_directions_have_the_same_bits_as_on_the_cpu(emulated, cpu, dtype, kept, shift):
    """And so has the average beside a norm: the norms themselves are sums, whose order is each backend's own."""

    def run(problem, backend):
        problem.project(backend)
        problem.update_ema_measuring(backend)
        problem.one_sum.zero_()

    assert_same_bits_as_cpu(emulated, cpu, run, dtype, SIZES, shift, kept=kept)


@pytest.mark.parametrize("dtype, kept", KEPT)
@pytest.mark.parametrize("op", SUMMING, ids=lambda op: op.__name__)
def test_sums_of_a_reuse_have_the_same_bits_in_any_order(emulated, monkeypatch, op, dtype, kept):
    def sums():
        problem = Problem(dtype, SIZES, kept=kept)
        problem.stats.fill_(1)
        op(problem, emulated)
        return torch.cat([bits(problem.partials), bits(problem.sums), bits(problem.one_sum)])

    expected = sums()
    for seed, threads in [(1, 1), (0, 2), (3, 4)]:
        monkeypatch.setenv("FSAM_EMULATION_SEED", str(seed))
        monkeypatch.setenv("FSAM_EMULATION_THREADS", str(threads))
        assert torch.equal(sums(), expected)


@pytest.mark.parametrize("kind, adaptive", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_has_the_same_bits_in_any_order(emulated, monkeypatch, dtype, kind, adaptive):
    reference = bits(Problem(dtype, SIZES).noise_norm(emulated, kind, adaptive))
    assert torch.isfinite(reference.view(torch.float64)).all()
    for seed, threads, shift in [(1, 1, 0), (7, 1, 0), (0, 2, 0), (3, 4, 0)]:
        monkeypatch.setenv("FSAM_EMULATION_SEED", str(seed))
        monkeypatch.setenv("FSAM_EMULATION_THREADS", str(threads))
        assert torch.equal(bits(Problem(dtype, SIZES, shift).noise_norm(emulated, kind, adaptive)), reference)


@pytest.mark.parametrize("dtype, stored", [*PLAIN, *STORED])
def test_norm_does_not_depend_on_alignment(emulated, dtype, stored):
    aligned, shifted = same_values_on_and_off_bounds(dtype, stored)
    assert torch.equal(bits(aligned.noise_norm(emulated)), bits(shifted.noise_norm(emulated)))


@pytest.mark.parametrize("seed, threads", [(0, 1), (5, 3)])
def test_more_rows_than_a_table_takes(emulated, cpu, monkeypatch, seed, threads):
    monkeypatch.setenv("FSAM_EMULATION_SEED", str(seed))
    monkeypatch.setenv("FSAM_EMULATION_THREADS", str(threads))
    sizes = [(13 * i) % 97 if i % 50 else 2049 + i for i in range(2000)]
    ours, theirs = Problem(torch.float32, sizes), Problem(torch.float32, sizes)
    torch.testing.assert_close(ours.noise_norm(emulated), theirs.noise_norm(cpu), rtol=1e-5, atol=0)
    ours.stats.copy_(theirs.stats)
    for problem, backend in ((ours, emulated), (theirs, cpu)):
        problem.perturb(backend)
        problem.adam(backend)
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("count", [63, 64, 65, 256, 257, 800, 801])
@pytest.mark.parametrize("op", [Problem.adam, Problem.reusing_adam], ids=lambda op: op.__name__)
def test_tables_filled_to_the_brim(emulated, cpu, op, count):
    assert_same_bits_as_cpu(emulated, cpu, op, torch.float32, [9] * count)


def test_no_rows_give_zero_statistics(emulated):
    for sizes in ([], [0], [0, 0]):
        problem = Problem(torch.bfloat16, sizes)
        assert problem.noise_norm(emulated).tolist() == [0] * 5
        problem.stats.fill_(1)
        for op in (problem.perturb, problem.restore, problem.sgd, problem.adam, problem.reusing_sgd):
            op(emulated)
        problem.one_sum.fill_(1)
        for op in (problem.dots, problem.project, problem.update_ema_measuring):
            op(emulated)
        assert problem.sums.tolist() == [0, 0] and problem.one_sum.tolist() == [0]


def test_zero_dimensional_and_channels_last(emulated, cpu):
    for backend in (emulated, cpu):
        params = [torch.tensor(2.0), torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)]
        grads = [torch.tensor(3.0), torch.arange(120.0).reshape(2, 3, 4, 5)]  # in another order than the parameter
        backend.restore_sgd(
            *(params, grads, torch.tensor([0, 4]), None, None, None, None, None),
            *(0.5, None, 0.0, 0.0, 0.0, False, False, None),
        )
        assert params[0].item() == 0.5
        torch.testing.assert_close(params[1], 1 - 0.5 * torch.arange(120.0).reshape(2, 3, 4, 5))


def test_division_of_a_group_is_ieee_division():
    result = subprocess.run([cuda_emulation.build_program("division")], text=True, capture_output=True, timeout=120)
    assert result.stdout == "0 differences\n", result.stdout + result.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_with_moments_of_every_kind(emulated, cpu, dtype):
    """Zeros, subnormals, huge ones, inf and NaN among ordinary ones, in one group and alone."""
    run = lambda problem, backend: problem.adam_of_hard_cases(backend)  # noqa: E731
    assert_same_bits_as_cpu(emulated, cpu, run, dtype, [1 << 13])


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_have_the_same_sums_in_blocks_of_any_number(emulated, dtype):
    """A row of many chunks, of which a block takes several, and the same chunks as rows of their own."""
    chunks = 37
    whole, cut = Problem(dtype, [chunks * 4096 - 5]), Problem(dtype, [4096] * (chunks - 1) + [4091])
    for name in ("params", "grads"):
        for part, source in zip(getattr(cut, name), getattr(whole, name)[0].split(4096), strict=True):
            part.copy_(source)
    cut.ema.copy_(whole.ema)
    cut.kept.copy_(whole.kept)
    for op in (Problem.noise_norm, *SUMMING):
        for problem in (whole, cut):
            problem.partials.fill_(torch.nan)
            op(problem, emulated)
        for name in ("partials", "stats", "sums", "one_sum"):
            assert torch.equal(bits(getattr(whole, name)), bits(getattr(cut, name))), (op.__name__, name)


# ---- The emulator itself: each planted bug has to be caught ---------------------------------------


@pytest.fixture(scope="module")
def planted():
    return {sanitize: cuda_emulation.build_program("planted_bugs", sanitize) for sanitize in (False, True)}


def run_planted(program: Path, bug: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, bug], text=True, capture_output=True, env={**os.environ, **environment}, timeout=60)


@pytest.mark.parametrize("seed", ["1", "2", "3"])
@pytest.mark.parametrize(
    "bug, message",
    [
        ("none", "as expected"),
        ("barrier in a branch", "divergent barrier: __syncthreads of line"),
        ("two different barriers", "divergent barrier: "),
        ("barrier after an early return", "divergent barrier: __syncthreads of line"),
        ("lane outside the mask reads", "a lane calls a warp operation whose mask leaves it out"),
        ("shuffle from outside the mask", "a shuffle reads a lane that is not in its mask"),
        ("lanes with different masks", "lanes meet in a warp operation with different masks"),
        ("lane missing from a shuffle", "divergent warp operation: line"),
        ("missing barrier", "unexpected values"),
        ("uninitialised shared memory", "unexpected values"),
        ("blocks that expect an order", "unexpected values"),
        ("misaligned hinted access", "misaligned access of 16 bytes"),
        ("too much shared memory", "more than 48 KiB of shared memory"),
        ("too many parameters", "invalid argument"),
        ("no blocks", "invalid configuration argument"),
    ],
)
def test_planted_bug_is_caught(planted, bug, message, seed):
    result = run_planted(planted[False], bug, FSAM_EMULATION_SEED=seed)
    assert message in result.stdout, result.stdout + result.stderr
    assert result.returncode == (bug != "none")


@pytest.mark.parametrize(
    "bug, message",
    [
        ("none", "as expected"),
        ("out of bounds", "AddressSanitizer: heap-buffer-overflow"),
        ("misaligned vector access", "misaligned address"),
    ],
)
def test_planted_bug_is_caught_by_a_sanitizer(planted, bug, message):
    result = run_planted(planted[True], bug, ASAN_OPTIONS="detect_leaks=0")
    assert message in result.stdout + result.stderr
    assert (result.returncode != 0) == (bug != "none")


@pytest.mark.sanitizers
def test_kernels_are_clean_under_sanitizers():
    """Runs this file's comparisons, whose tensors end where their rows end, in a sanitized process."""
    library = cuda_emulation.build(sanitize=True)
    linked = subprocess.run(["ldd", library], text=True, capture_output=True, check=True).stdout
    runtimes = [part[2] for part in map(str.split, linked.splitlines()) if part[0].startswith(("libasan", "libubsan"))]
    assert any("asan" in runtime for runtime in runtimes)
    # libstdc++ comes with them: they look for its exception functions when they start.
    libstdcxx = next(part[2] for part in map(str.split, linked.splitlines()) if part[0].startswith("libstdc++"))
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "TestSameBitsAsCpu or kept or directions or any_order or alignment or brim or zero",
        ],  # fmt: skip
        text=True,
        capture_output=True,
        env={
            **os.environ,
            "FSAM_EMULATED_LIBRARY": str(library),
            "LD_PRELOAD": " ".join([*runtimes, libstdcxx]),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "FSAM_EMULATION_SEED": "11",
        },
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert " passed" in result.stdout
