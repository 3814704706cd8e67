"""clip_grad_norm_: torch's function, on any mixture of meshes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from fsam_ext import clip_grad_norm_

from .ranks import run
from .training import whole

ORDERS = [1.0, 2.0, 3.0, math.inf]


def full_gradients(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    shapes = [(5, 3), (1,), (4, 6), (7,), ()]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def parameters(dtype=torch.float64):
    """One on each kind of mesh, one whose gradient each rank has an addend of, and a plain one."""
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    places = [(square, (Shard(0), Shard(1))), (square["a"], (Shard(0),)), (square, (Replicate(), Shard(0)))]
    params = []
    for i, grad in enumerate(full_gradients(dtype)):
        if i < 3:
            mesh, placements = places[i]
            param = nn.Parameter(distribute_tensor(torch.zeros_like(grad), mesh, placements))
            param.grad = distribute_tensor(grad, mesh, placements)
        elif i == 3:
            param = nn.Parameter(distribute_tensor(torch.zeros_like(grad), square["b"], [Replicate()]))
            halves = distribute_tensor(grad / 2, square["b"], [Replicate()]).to_local()
            param.grad = torch.distributed.tensor.DTensor.from_local(halves, square["b"], [Partial()])
        else:
            param = nn.Parameter(torch.zeros_like(grad))
            param.grad = grad
        params.append(param)
    return params


def clipped(order, max_norm, dtype, foreach=None):
    params = parameters(dtype)
    norm = clip_grad_norm_(params, max_norm, order, foreach=foreach)
    assert type(norm) is torch.Tensor
    return norm, [whole(param.grad) for param in params]


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("max_norm", [0.5, 1e6], ids=["scales", "leaves"])
@pytest.mark.parametrize("order", ORDERS)
def test_equals_torch_on_one_process(order, max_norm, foreach):
    plain = [nn.Parameter(torch.zeros_like(grad)) for grad in full_gradients()]
    for param, grad in zip(plain, full_gradients()):
        param.grad = grad
    norm = torch.nn.utils.clip_grad_norm_(plain, max_norm, order)
    for mine, grads in run(4, clipped, order, max_norm, torch.float64, foreach):
        assert mine.item() == pytest.approx(norm.item(), rel=1e-14)
        for grad, param in zip(grads, plain):
            torch.testing.assert_close(grad, param.grad, rtol=1e-14, atol=0)


def test_low_precision_gradients_have_a_float32_norm():
    exact = torch.cat([grad.flatten() for grad in full_gradients(torch.bfloat16)]).double().norm()
    for norm, grads in run(4, clipped, 2.0, 0.5, torch.bfloat16):
        assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact.item(), rel=1e-6)
        assert all(grad.dtype == torch.bfloat16 for grad in grads)


def one_rank_only(order, value):
    params = parameters()
    clip_grad_norm_(params, math.inf)  # addends are summed now, for which all ranks are needed
    if torch.distributed.get_rank() > 0:
        for param in params:
            param.grad = None
    elif value is not None:
        params[0].grad.to_local().fill_(value)
    norm = clip_grad_norm_(params, 0.5, order)
    try:
        clip_grad_norm_(params, 0.5, order, error_if_nonfinite=True)
    except RuntimeError as error:
        return norm, str(error)
    return norm, ""


@pytest.mark.parametrize("value", [None, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_ranks_without_gradients_take_part(order, value):
    """And what is not finite on one rank is known to all, so that all of them scale, or raise, alike."""
    results = run(4, one_rank_only, order, value)
    finite = value is None
    assert len({str(norm.item()) for norm, _ in results}) == 1
    for norm, error in results:
        assert bool(norm.isfinite()) == finite
        assert ("cannot be clipped" in error) != finite


def refused(order):
    with pytest.raises(ValueError, match="norm_type must be a positive number"):
        clip_grad_norm_(parameters(), 1.0, order)


def test_bad_order():
    run(4, refused, 0.0)
