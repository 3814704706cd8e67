"""The step counts and bias corrections of Adam, on every backend: against the same powers in Python's float64."""

from __future__ import annotations

import math

import pytest
import torch

from fsam_ext.backends import ops

from .conformance import BACKENDS, identical, load

# A bias correction of float64 may be off by what a last bit of the power becomes in 1 - beta^t.
LAST_BITS = 4 * 2.0**-53


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request):
    return load(request.param)


def exact(steps: list[float], lr: float, beta1: float, beta2: float) -> torch.Tensor:
    """The corrections of rows at these counts."""
    return torch.tensor([[lr / (1 - beta1**t), math.sqrt(1 - beta2**t)] for t in steps], dtype=torch.float64)


def call(backend, steps, index, corrections, stats=None, found_inf=None, lr=0.1, lr_tensor=None, betas=(0.9, 0.999)):
    ops.count_steps(backend, steps, index, corrections, stats, found_inf, lr, lr_tensor, *betas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("lr_dtype", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.95, 0.98)], ids=str)
def test_counts_and_corrects(backend, dtype, lr_dtype, betas):
    """Rows come first in the index; the others are counted only, and those outside it are left alone."""
    backend, device = backend
    members, rows = 300, 131
    steps = torch.randint(0, 50, (400,), device=device).float()
    steps[7] = 2.0**20
    index = torch.randperm(400)[:members].to(device)
    index[3] = 7 if 7 not in index else index[3]
    corrections = torch.full((rows, 2), math.nan, dtype=dtype, device=device)
    before, stats = steps.tolist(), torch.ones(ops.STATISTICS, dtype=torch.float64, device=device)
    lr_tensor = None if lr_dtype is None else torch.tensor(0.3, dtype=lr_dtype, device=device)
    lr = 0.1 if lr_dtype is None else math.nan

    found_inf = torch.zeros((), device=device)
    call(backend, steps, index, corrections, stats, found_inf, lr, lr_tensor, betas)

    counted = set(index.tolist())
    assert steps.tolist() == [count + (i in counted) for i, count in enumerate(before)]
    rate = 0.1 if lr_dtype is None else lr_tensor.item()
    expected = exact([before[i] + 1 for i in index.tolist()[:rows]], rate, *betas)
    if dtype == torch.float32:
        assert identical(corrections, expected.float())
    else:
        amplified = torch.stack([1 / (1 - betas[0] ** torch.ones(rows)), 1 / expected[:, 1] ** 2], 1)
        assert ((corrections.cpu() - expected).abs() <= LAST_BITS * amplified * expected).all()


@pytest.mark.parametrize("reason", ["stats", "nan", "found_inf"])
def test_a_step_that_is_skipped_is_not_counted(backend, reason):
    backend, device = backend
    steps = torch.arange(1.0, 6.0, device=device)
    stats = torch.ones(ops.STATISTICS, dtype=torch.float64, device=device)
    found_inf = torch.zeros((), device=device)
    if reason == "found_inf":
        found_inf.fill_(1.0)
    else:
        stats[0] = math.inf if reason == "stats" else math.nan
    corrections = torch.full((5, 2), math.nan, device=device)
    call(backend, steps, torch.arange(5, device=device), corrections, stats, found_inf)
    assert steps.tolist() == [1, 2, 3, 4, 5]
    assert identical(corrections, exact([1, 2, 3, 4, 5], 0.1, 0.9, 0.999).float())


def test_counts_go_on_from_call_to_call(backend):
    """Also where no row starts, and where a run of many parameters is one row."""
    backend, device = backend
    steps, index = torch.zeros(1000, device=device), torch.arange(1000, device=device).flip(0)
    corrections = torch.empty(1, 2, device=device)
    for step in range(1, 4):
        call(backend, steps, index, corrections)
        assert (steps == step).all()
        assert identical(corrections, exact([step], 0.1, 0.9, 0.999).float())
    call(backend, steps, index[:10], corrections[:0])
    assert steps.sum().item() == 3010
