"""Random shapes, strides, alignment and values: hypothesis looks for a call that the reference judges otherwise."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from fsam_ext import FriendlySAM
from fsam_ext.backends import ops, reference
from fsam_ext.state.flat_state import aligned_numel

from .conformance import BACKENDS, DTYPES, SUMMANDS, identical, unit

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 1e-20, 6e-5, 1e4, -3e4, math.inf, -math.inf, math.nan]


@st.composite
def dense_tensors(draw, dtype):
    """A function that makes tensors of one random shape, memory order and misalignment."""
    shape = draw(st.lists(st.integers(0, 40), min_size=0, max_size=3))
    order = draw(st.permutations(range(len(shape))))
    shift = draw(st.integers(0, 7))

    def make(values: Tensor) -> Tensor:
        numel = math.prod(shape)
        storage = torch.zeros(numel + shift + 3, dtype=dtype)
        in_memory = storage[shift : shift + numel].view([shape[d] for d in order])
        inverse = sorted(range(len(order)), key=lambda d: order[d])
        return in_memory.permute(inverse).copy_(values.view(shape))

    return math.prod(shape), make


@st.composite
def problems(draw):
    dtype = draw(st.sampled_from(DTYPES))
    makers = draw(st.lists(dense_tensors(dtype), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    special = draw(st.lists(st.sampled_from(SPECIAL), max_size=3))
    params, grads = [], []
    for numel, make in makers:
        params.append(make(torch.randn(numel, generator=generator)))
        values = torch.randn(numel, generator=generator)
        for value in special:
            if numel:
                values[int(torch.randint(numel, (), generator=generator))] = value
        grads.append(make(values))
    return dtype, params, grads


@settings(max_examples=300, deadline=None)
@given(problems(), st.booleans())
def test_a_whole_step_on_any_input(problem, adaptive):
    """Norm, perturbation and restore: finite inputs agree with the reference, others leave everything as it was."""
    dtype, params, grads = problem
    state_dtype = ops.compute_dtype(dtype)
    positions = [0]
    for p in params:
        positions.append(positions[-1] + aligned_numel(p.numel(), dtype))
    offsets = torch.tensor(positions[:-1], dtype=torch.int64)
    average = torch.randn(positions[-1] + 1, dtype=torch.float64).to(state_dtype)
    before, weights = average.clone(), [p.clone() for p in params]
    exact = torch.zeros(5, dtype=torch.float64)
    doubles = [[t.double() for t in tensors] for tensors in (params, grads)]
    reference.noise_norm(*doubles, offsets, average.double(), None, None, 0.9, 0.9, adaptive, False, None, exact)

    backend = BACKENDS["cpu"]()
    partials = torch.full((ops.count_chunks(p.numel() for p in params) * 5,), math.nan, dtype=state_dtype)
    stats = torch.full((5,), math.nan, dtype=torch.float64)
    ops.noise_norm(backend, params, grads, offsets, average, None, None, 0.9, 0.9, adaptive, False, partials, stats)
    finite = all(g.isfinite().all() for g in grads)
    overflows = not bool(torch.isfinite(exact[0])) or exact[0] > 1e37  # squares beyond float32 count as not finite
    assert stats[4] == sum(int((~g.isfinite()).sum()) for g in grads)
    if not finite:
        assert not stats[0].isfinite()
    elif not overflows:
        magnitude = sum(
            float(
                ((g.double().abs() + 0.9 * average.abs().max().double()) * (p.double().abs() if adaptive else 1))
                .square()
                .sum()
            )
            for p, g in zip(params, grads, strict=True)
        )
        tiny = sum(p.numel() for p in params) * torch.finfo(state_dtype).tiny
        assert abs(stats[0] - exact[0]) <= SUMMANDS * unit(state_dtype) * magnitude + tiny

    backup = torch.full((positions[-1] + 1,), math.nan, dtype=dtype)
    options = (stats, None, 0.1, None, 0.9, 0.9, 1e-12, adaptive, False, True, 0, None)
    ops.perturb(backend, params, grads, offsets, average, None, backup, *options)
    if not stats[0].isfinite():
        assert all(map(identical, params, weights)) and identical(average, before)
    ops.restore(backend, params, offsets, backup)
    assert all(map(identical, params, weights))


@settings(max_examples=50, deadline=None)
@given(
    rho=st.just(0.0) | st.floats(1e-6, 10),
    sigma=st.floats(-2, 2),
    lmbda=st.floats(0, 0.999),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e3]),
)
def test_the_perturbation_has_length_rho(rho, sigma, lmbda, scale):
    """|w' - w| = rho whatever the gradients' size, unless there is no noise at all."""
    p = nn.Parameter(torch.zeros(301, dtype=torch.float64))
    optimizer = FriendlySAM([p], torch.optim.SGD, rho, sigma, lmbda, lr=0.0, perturb_eps=0.0)
    for _ in range(3):
        p.grad = torch.randn(301, dtype=torch.float64) * scale
        optimizer.first_step()
        if optimizer.stats()["noise_norm"] > 1e-150:
            assert math.isclose(p.detach().norm(), rho, rel_tol=1e-12, abs_tol=1e-300)
        optimizer.second_step()
        assert not p.any()
