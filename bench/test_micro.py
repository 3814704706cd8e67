"""Microbenchmarks for pytest-benchmark: ``pytest bench --benchmark-only -k gpt2``, ``--benchmark-compare`` and so on.

Each provider's step, and each half of ours alone. For comparisons between providers ``bench/run.py`` is the better
judge: it runs them alternately.
"""

from __future__ import annotations

import gc

import pytest
import torch

from bench.cases import ONLY_IN_TRAINING
from bench.peers import BASES
from bench.providers import all_providers
from bench.steps import Runner
from bench.workloads import WORKLOADS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROVIDERS = all_providers(DEVICE)
DTYPE = torch.float32
NAMES = [
    name
    for name, kind in PROVIDERS.items()
    if kind.eager and not kind.full_only and name not in ONLY_IN_TRAINING
    if kind.dtypes is None or DTYPE in kind.dtypes
]


@pytest.fixture
def runner(request):
    """A provider that has made its first step, on its own copy of the workload."""
    name, workload = request.param
    work = WORKLOADS[workload]
    made = Runner(PROVIDERS[name], work, work.gradients(DTYPE, DEVICE), BASES["sgd"])
    made()
    yield made
    del made
    gc.collect()


def _cases(names):
    return pytest.mark.parametrize(
        "runner",
        [pytest.param((name, work), id=f"{work}-{name.replace(' ', '-')}") for work in WORKLOADS for name in names],
        indirect=True,
    )


def _wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@_cases(NAMES)
def test_step(benchmark, runner):
    def step():
        runner.step()
        _wait()

    benchmark.pedantic(step, setup=runner.renew_gradients, rounds=7, warmup_rounds=1)


@_cases(["fsam_ext", "fsam_ext flat"])
def test_ascend(benchmark, runner):
    """Passes A and B."""

    def ascend():
        runner.provider.ascend()
        _wait()

    benchmark.pedantic(ascend, setup=runner.provider.optimizer.restore, rounds=7, warmup_rounds=1)


@_cases(["fsam_ext", "fsam_ext flat"])
def test_descend(benchmark, runner):
    """Pass C."""

    def descend():
        runner.provider.descend()
        _wait()

    benchmark.pedantic(descend, setup=runner.provider.ascend, rounds=7, warmup_rounds=1)
