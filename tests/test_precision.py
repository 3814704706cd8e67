"""Master weights, stochastic rounding, compressed averages, and what rounding leaves of a perturbation."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fsam_ext import SAM, FriendlySAM, flatten_parameters
from fsam_ext.state.quantization import dequantize, quantize

from .conformance import identical

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
KWARGS = {SGD: {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}, AdamW: {"lr": 0.01}}
LOW = [torch.bfloat16, torch.float16]
SHAPES = [(300,), (7, 33), (1,), (0,), (4097,)]


def average_of(entry):
    """The float32 values of an average, whatever stores it."""
    ema = entry["fsam_ema"]
    return dequantize(ema, entry["fsam_ema_scale"]) if ema.dtype == torch.int8 else ema.float()


def parameters(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(steps, dtype):
    generator = torch.Generator().manual_seed(1)
    for _ in range(2 * steps):
        yield [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def run(params, optimizer, grads, look=lambda: None):
    """Steps with given gradients; ``look`` is called while the weights are perturbed."""
    grads = iter(grads)
    for first in grads:
        for half, values in ((optimizer.first_step, first), (optimizer.second_step, next(grads))):
            for p, g in zip(params, values, strict=True):
                p.grad = g.to(p.dtype)
            half()
            if half == optimizer.first_step:
                look()


def saved_and_loaded(optimizer, params, base, **options):
    """Another optimizer over copies of the parameters, resumed through a file."""
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = FriendlySAM(twins, base, **KWARGS[base], **options)
    other.load_state_dict(torch.load(stream, weights_only=True))
    return twins, other


# ---- Masters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_masters_train_like_float32_weights_to_the_bit(base, dtype):
    """With the same gradients: masters are the float32 run's weights, and parameters their rounded values."""
    params = parameters(dtype)
    exact = [nn.Parameter(p.detach().float()) for p in params]
    optimizer = FriendlySAM(params, base, rho=0.3, master_weights=True, **KWARGS[base])
    reference = FriendlySAM(exact, base, rho=0.3, **KWARGS[base])
    perturbed = []
    run(params, optimizer, gradients(10, dtype), lambda: perturbed.append([p.detach().clone() for p in params]))
    expected = []
    run(exact, reference, gradients(10, dtype), lambda: expected.append([p.detach().to(dtype) for p in exact]))
    for got, wanted in zip(perturbed, expected, strict=True):
        assert all(map(identical, got, wanted))
    for p, q in zip(params, exact, strict=True):
        assert identical(optimizer.state[p]["fsam_master"], q)
        assert identical(p, q.to(dtype))
        assert identical(optimizer.state[p]["fsam_ema"], reference.state[q]["fsam_ema"])
    assert "backup" not in next(iter(optimizer._passes.layout.flats.values())).names


def test_small_updates_are_lost_without_masters_and_kept_with_them():
    moved = {}
    for masters in (False, True):
        p = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = SAM([p], SGD, rho=0.0, lr=1e-3, master_weights=masters)
        run([p], optimizer, [[torch.ones(64, dtype=torch.bfloat16)]] * 2 * 100)
        moved[masters] = 1 - float(p.detach().float().mean())
    assert moved[False] == 0
    assert abs(moved[True] - 0.1) < 2**-8


def test_an_exception_and_a_restore_bring_the_weights_back():
    params = parameters(torch.bfloat16)
    optimizer = FriendlySAM(params, SGD, rho=3.0, master_weights=True, **KWARGS[SGD])
    run(params, optimizer, gradients(2, torch.bfloat16))
    before = [p.detach().clone() for p in params]
    masters = [optimizer.state[p]["fsam_master"].clone() for p in params]
    optimizer.first_step()
    assert not identical(params[0], before[0])
    optimizer.restore()
    with pytest.raises(KeyError), optimizer.perturbed():
        raise KeyError
    assert all(map(identical, params, before))
    assert all(identical(optimizer.state[p]["fsam_master"], m) for p, m in zip(params, masters, strict=True))


def test_a_non_finite_ascent_leaves_masters_alone():
    params = parameters(torch.bfloat16)
    optimizer = FriendlySAM(params, AdamW, master_weights=True, **KWARGS[AdamW])
    run(params, optimizer, gradients(2, torch.bfloat16))
    before = copy.deepcopy([optimizer.state[p] for p in params])
    weights = [p.detach().clone() for p in params]
    params[1].grad[2, 2] = torch.inf
    optimizer.first_step()
    params[1].grad[2, 2] = 1
    optimizer.second_step()
    assert all(map(identical, params, weights))
    for p, state in zip(params, before, strict=True):
        assert all(identical(optimizer.state[p][name], value) for name, value in state.items())


def test_weights_that_others_write_reach_the_masters():
    """A model's load_state_dict after the optimizer has masters: the next step must not bring the old weights back."""
    params = parameters(torch.bfloat16)
    optimizer = FriendlySAM(params, SGD, master_weights=True, **KWARGS[SGD])
    run(params, optimizer, gradients(2, torch.bfloat16))
    kept = optimizer.state[params[1]]["fsam_master"].clone()
    with torch.no_grad():
        params[0].fill_(5.0)
    optimizer.first_step()
    optimizer.restore()
    assert (params[0] == 5).all() and (optimizer.state[params[0]]["fsam_master"] == 5).all()
    assert identical(optimizer.state[params[1]]["fsam_master"], kept)  # bits that weights lack


def test_only_some_parameters_have_gradients_in_the_second_pass():
    params = parameters(torch.bfloat16)
    twins = parameters(torch.bfloat16)
    optimizer = FriendlySAM(params, SGD, rho=1.0, master_weights=True, **KWARGS[SGD])
    other = FriendlySAM(twins, SGD, rho=1.0, master_weights=True, **KWARGS[SGD])
    run(params, optimizer, gradients(1, torch.bfloat16))
    run(twins, other, gradients(1, torch.bfloat16))
    first, second = gradients(1, torch.bfloat16)
    for which, (ps, one) in enumerate(((params, optimizer), (twins, other))):
        for p, g in zip(ps, first, strict=True):
            p.grad = g
        one.first_step(zero_grad=True)
        for p, g in zip(ps, second, strict=True):
            p.grad = g
        if which == 0:
            ps[1].grad = None
        one.second_step()
    assert all(identical(p, q) for i, (p, q) in enumerate(zip(params, twins, strict=True)) if i != 1)
    assert identical(params[1], optimizer.state[params[1]]["fsam_master"].bfloat16())


@pytest.mark.parametrize("ema_dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_flattened_masters_have_the_bits_of_unflattened_ones(base, ema_dtype):
    """With given gradients nothing depends on the norm, whose sum runs over other chunks, but the perturbed weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 33), nn.Linear(33, 3)).bfloat16()
    twin = copy.deepcopy(model)
    flatten_parameters(model, grads=True)
    optimizers = []
    for one in (model, twin):
        optimizer = FriendlySAM(
            one.parameters(), base, rho=0.3, master_weights=True, ema_dtype=ema_dtype, **KWARGS[base]
        )
        generator = torch.Generator().manual_seed(3)
        for _ in range(5):
            for half in (optimizer.first_step, optimizer.second_step):
                for p in one.parameters():
                    g = torch.randn(p.shape, generator=generator).bfloat16()
                    p.grad = g if one is twin else p.grad.copy_(g)
                half(zero_grad=True)
        optimizers.append(optimizer)
    flattened, plain = optimizers
    rows = [len(segment.offsets) for segment in flattened._passes.layout.segments_of(0)]
    assert sum(rows) < len(list(model.parameters()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert identical(p, q)
        assert all(identical(value, plain.state[q][name]) for name, value in flattened.state[p].items())


# ---- Stochastic rounding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_stochastic_rounding_keeps_small_updates_in_the_mean(base, dtype):
    """An update of a quarter of a unit in the last place: to nearest it is lost, in the mean it must not be."""
    n, steps = 20_000, 8
    unit = torch.finfo(dtype).eps
    p = nn.Parameter(torch.full((n,), 1.25, dtype=dtype))
    optimizer = SAM([p], base, rho=0.0, lr=unit / 4, stochastic_rounding=True, weight_decay=0.0)
    run([p], optimizer, [[torch.ones(n, dtype=dtype)]] * 2 * steps)
    moved = (1.25 - p.detach().double()) / unit
    assert {float(m) for m in moved.unique()} <= set(range(steps + 1))
    # Each step moves an element by one unit with probability 1/4: the mean of n * steps draws, within 5 sigma.
    assert abs(float(moved.mean()) - steps / 4) < 5 * (steps * 3 / 16 / n) ** 0.5
    assert abs(float(moved.var()) - steps * 3 / 16) < 0.1  # independent from step to step


def test_stochastic_rounding_depends_on_the_seed_and_resumes_bit_for_bit():
    def trained(seed, steps):
        params = parameters(torch.bfloat16)
        options = {"stochastic_rounding": True, "rounding_seed": seed}
        optimizer = FriendlySAM(params, AdamW, **options, **KWARGS[AdamW])
        run(params, optimizer, list(gradients(10, torch.bfloat16))[: 2 * steps])
        return params, optimizer, options

    whole, _, _ = trained(3, 10)
    other, _, _ = trained(4, 10)
    assert not identical(whole[0], other[0])
    params, optimizer, options = trained(3, 5)
    twins, resumed = saved_and_loaded(optimizer, params, AdamW, **options)
    run(twins, resumed, list(gradients(10, torch.bfloat16))[10:])
    assert all(map(identical, whole, twins))


@pytest.mark.parametrize("base", (SGD, AdamW))
@pytest.mark.parametrize("order", [((1,), (0, 1)), ((2,), (0, 2), (1, 0, 2)), ((0, 1, 2), (2,))], ids=str)
def test_a_resumed_run_draws_the_same_bits_whatever_gradient_came_first(base, order):
    """It lays its state out anew, and an element draws by where it lies."""

    def run(resume):
        params = [nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (64, 7, 130)]
        optimizer = FriendlySAM(params, base, lr=0.001, stochastic_rounding=True)
        for number, with_gradient in enumerate([*order, (0, 1, 2), (0, 1, 2), (1,), (0, 1, 2)]):
            if resume and number >= len(order):
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = FriendlySAM(params, base, lr=0.001, stochastic_rounding=True)
                optimizer.load_state_dict(saved)
            for half in (optimizer.first_step, optimizer.second_step):
                for i, param in enumerate(params):
                    param.grad = torch.ones_like(param) if i in with_gradient else None
                half()
        return params

    whole, resumed = run(False), run(True)
    assert all(map(identical, whole, resumed))
    assert all(len(param.unique()) > 1 for param in whole)  # draws were made


# ---- Compressed averages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lmbda", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("ema_dtype", [torch.bfloat16, torch.int8])
def test_the_error_of_a_compressed_average_stays_bounded(ema_dtype, lmbda):
    """Each step rounds once and keeps lmbda of what is off already: a geometric series of the largest rounding."""
    exact, compressed = (parameters(torch.float32) for _ in range(2))
    one = FriendlySAM(exact, SGD, lmbda=lmbda, rho=0.1, lr=0.0)
    other = FriendlySAM(compressed, SGD, lmbda=lmbda, rho=0.1, lr=0.0, ema_dtype=ema_dtype)
    largest = [torch.zeros_like(p) for p in exact]
    for first in gradients(60, torch.float32):
        for optimizer, params in ((one, exact), (other, compressed)):
            for p, g in zip(params, first, strict=True):
                p.grad = g + 0.1  # an average that is not around zero
            optimizer.first_step()
            optimizer.restore()
        for p, q, most in zip(exact, compressed, largest, strict=True):
            state = other.state[q]
            if ema_dtype == torch.int8:
                average = dequantize(state["fsam_ema"], state["fsam_ema_scale"])
                rounding = state["fsam_ema_scale"].repeat_interleave(128)[: p.numel()].view(p.shape) / 2
            else:
                average = state["fsam_ema"].float()
                rounding = average.abs() * 2**-8  # half a unit in the last place is at most this
            torch.maximum(most, rounding, out=most)
            # 1 %: for the rounding of the rounding, and of the float32 arithmetic.
            assert bool(((average - one.state[p]["fsam_ema"]).abs() <= 1.01 * most / (1 - lmbda) + 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("ema_dtype", [torch.bfloat16, torch.int8])
def test_compressed_averages_resume_bit_for_bit(ema_dtype, dtype):
    options = {"ema_dtype": ema_dtype, "rho": 0.2}
    params = parameters(dtype)
    optimizer = FriendlySAM(params, SGD, **options, **KWARGS[SGD])
    data = list(gradients(10, dtype))
    run(params, optimizer, data[:10])
    twins, resumed = saved_and_loaded(optimizer, params, SGD, **options)
    for p, q in zip(params, twins, strict=True):
        assert optimizer.state[p]["fsam_ema"].dtype == resumed.state[q]["fsam_ema"].dtype == ema_dtype
    run(params, optimizer, data[10:])
    run(twins, resumed, data[10:])
    assert all(map(identical, params, twins))
    for p, q in zip(params, twins, strict=True):
        assert all(identical(value, resumed.state[q][name]) for name, value in optimizer.state[p].items())


@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("after", [torch.float32, torch.bfloat16, torch.int8])
def test_a_checkpoint_of_another_average_is_converted(before, after):
    params = parameters(torch.float32)
    optimizer = FriendlySAM(params, SGD, ema_dtype=before, **KWARGS[SGD])
    run(params, optimizer, gradients(3, torch.float32))
    twins, other = saved_and_loaded(optimizer, params, SGD, ema_dtype=after)
    for p, q in zip(params, twins, strict=True):
        kept, loaded = optimizer.state[p], other.state[q]
        assert loaded["fsam_ema"].dtype == after and ("fsam_ema_scale" in loaded) == (after == torch.int8)
        values = (
            dequantize(kept["fsam_ema"], kept["fsam_ema_scale"]) if before == torch.int8 else kept["fsam_ema"].float()
        )
        result = (
            dequantize(loaded["fsam_ema"], loaded["fsam_ema_scale"])
            if after == torch.int8
            else loaded["fsam_ema"].float()
        )
        if p.numel():
            largest = float(values.abs().max())
            step = {torch.float32: 0, torch.bfloat16: 2**-8, torch.int8: 0.501 / 127}[after]
            assert float((values - result).abs().max()) <= step * largest
    run(twins, other, gradients(2, torch.float32))  # and goes on


def test_an_average_that_has_seen_nothing_stays_unset_through_a_checkpoint():
    params = parameters(torch.float32)
    optimizer = FriendlySAM(params, SGD, ema_dtype=torch.int8, **KWARGS[SGD])
    params[0].grad = torch.full((300,), torch.nan)
    optimizer.first_step()
    optimizer.second_step()
    for dtype in (torch.int8, torch.float32):
        twins, other = saved_and_loaded(optimizer, params, SGD, ema_dtype=dtype)
        twins[0].grad = torch.full((300,), 2.0)
        other.first_step()
        state = other.state[twins[0]]
        ema = dequantize(state["fsam_ema"], state["fsam_ema_scale"]) if dtype == torch.int8 else state["fsam_ema"]
        assert torch.allclose(ema, torch.full((300,), 2.0), rtol=2e-5)  # a scale has 17 bits


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 700), st.sampled_from([1e-37, 1e-20, 1e-3, 1.0, 1e30]), st.integers(0, 2**31))
def test_what_was_quantized_is_quantized_to_the_same(numel, scale, seed):
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * scale
    codes, scales = quantize(values)
    again, same = quantize(dequantize(codes, scales))
    assert identical(codes, again) and identical(scales, same)
    blocks = scales.repeat_interleave(128)[:numel]
    assert ((values - dequantize(codes, scales)).abs() <= 0.5001 * blocks + 2.0**-100).all()


def test_quantization_outside_the_kernels_is_that_of_the_kernels():
    params = [nn.Parameter(torch.zeros(1000))]
    optimizer = FriendlySAM(params, SGD, ema_dtype=torch.int8, **KWARGS[SGD])
    run(params, optimizer, [[torch.randn(1000) * 10.0 ** torch.randint(-6, 6, (1000,))]] * 2)
    first = params[0].grad  # the first gradient is the average
    codes, scales = quantize(first)
    assert identical(optimizer.state[params[0]]["fsam_ema"], codes)
    assert identical(optimizer.state[params[0]]["fsam_ema_scale"], scales)


def test_channels_last_parameters_with_int8_averages():
    p = nn.Parameter(torch.randn(4, 6, 3, 5).to(memory_format=torch.channels_last))
    optimizer = FriendlySAM([p], SGD, ema_dtype=torch.int8, **KWARGS[SGD])
    p.grad = torch.randn_like(p)
    optimizer.first_step()
    state = optimizer.state[p]
    step = state["fsam_ema_scale"].max() / 2
    assert ((dequantize(state["fsam_ema"], state["fsam_ema_scale"]) - p.grad).abs() <= step).all()
    optimizer.restore()
    q = nn.Parameter(p.detach().contiguous())  # a checkpoint that meets another memory order
    other = FriendlySAM([q], SGD, ema_dtype=torch.int8, **KWARGS[SGD])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loaded = other.state[q]
    assert loaded["fsam_ema"].stride() == q.stride()
    assert ((dequantize(loaded["fsam_ema"], loaded["fsam_ema_scale"]) - p.grad).abs() <= 2 * step).all()


@pytest.mark.parametrize("source", ["ascent", "descent"])
@pytest.mark.parametrize("ema_dtype", [None, torch.int8])
def test_the_average_of_the_second_gradients(source, ema_dtype):
    params = parameters(torch.float32)
    optimizer = FriendlySAM(params, SGD, lmbda=0.5, ema_source=source, ema_dtype=ema_dtype, **KWARGS[SGD])
    data = list(gradients(3, torch.float32))
    run(params, optimizer, data)
    of = data[0 if source == "ascent" else 1 :: 2]
    for i, p in enumerate(params):
        expected = 0.5 * (0.5 * of[0][i] + 0.5 * of[1][i]) + 0.5 * of[2][i]
        state = optimizer.state[p]
        ema = dequantize(state["fsam_ema"], state["fsam_ema_scale"]) if ema_dtype else state["fsam_ema"]
        assert torch.allclose(ema, expected, atol=0.03 if ema_dtype else 1e-6)


# ---- What rounding leaves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"master_weights": True}, {"adaptive": True}])
@pytest.mark.parametrize("dtype", LOW)
def test_the_effective_perturbation_is_the_one_that_was_made(dtype, options):
    params = parameters(dtype)
    exact = [nn.Parameter(p.detach().double()) for p in params]
    optimizer = FriendlySAM(params, SGD, rho=0.5, **options, **KWARGS[SGD])
    reference = FriendlySAM(exact, SGD, rho=0.5, adaptive="adaptive" in options, **KWARGS[SGD])
    before = torch.cat([p.detach().flatten() for p in params]).double()
    grads = next(gradients(1, dtype))
    for p, q, g in zip(params, exact, grads, strict=True):
        p.grad, q.grad = g, g.double()
    optimizer.first_step()
    reference.first_step()
    effective = torch.cat([p.detach().flatten() for p in params]).double() - before
    intended = torch.cat([p.detach().flatten() for p in exact]) - before
    stats = optimizer.stats()
    assert torch.isclose(stats["effective_norm"], effective.norm(), rtol=1e-5)
    cosine = torch.cosine_similarity(effective, intended, dim=0)
    assert torch.isclose(stats["effective_cosine"], cosine, rtol=1e-4)
    assert cosine < 0.9999


def test_the_effective_perturbation_under_autocast():
    params = [nn.Parameter(torch.randn(5000) * 0.02)]
    optimizer = SAM(params, SGD, rho=0.001, lr=0.1, forward_dtype=torch.bfloat16)
    low = params[0].detach().bfloat16().double()
    params[0].grad = torch.randn(5000)
    optimizer.first_step()
    effective = params[0].detach().bfloat16().double() - low
    assert torch.isclose(optimizer.stats()["effective_norm"], effective.norm(), rtol=1e-5)
    with pytest.warns(UserWarning, match="rounding to bfloat16 leaves little of the perturbation"):
        optimizer.second_step()


@pytest.mark.parametrize("options", [{}, {"adaptive": True}], ids=["sam", "adaptive"])
@pytest.mark.parametrize(
    "dtype,forward", [(torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16)]
)
def test_a_perturbation_that_rounding_swallows_wholly_has_a_cosine_of_zero(dtype, forward, options):
    p = nn.Parameter(torch.ones(5000, dtype=dtype))
    optimizer = SAM([p], SGD, rho=1e-3, lr=0.0, forward_dtype=forward, **options)
    p.grad = torch.ones_like(p)
    optimizer.first_step()
    assert optimizer.stats()["effective_norm"] == 0 and optimizer.stats()["effective_cosine"] == 0
    p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="the cosine of what is left with what was meant is 0.00"):
        optimizer.second_step()


@pytest.mark.parametrize("dtype,forward", [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("rho,gradient", [(0.0, 1.0), (0.1, 0.0), (0.1, torch.inf)])
@pytest.mark.filterwarnings("error")
def test_where_no_perturbation_is_meant_there_is_no_cosine_and_no_warning(dtype, forward, rho, gradient):
    p = nn.Parameter(torch.ones(3000, dtype=dtype))
    optimizer = SAM([p], SGD, rho=rho, lr=0.0, forward_dtype=forward)
    for half in (optimizer.first_step, optimizer.second_step):
        p.grad = torch.full_like(p, gradient)
        half()
    assert optimizer.stats()["effective_norm"] == 0 and optimizer.stats()["effective_cosine"].isnan()


def test_no_effect_is_counted_where_nothing_is_rounded():
    params = [nn.Parameter(torch.randn(50))]
    optimizer = SAM(params, SGD, lr=0.1)
    params[0].grad = torch.randn(50)
    optimizer.first_step()
    assert "effective_cosine" not in optimizer.stats()


def test_a_swallowed_perturbation_is_reported_once_and_a_larger_radius_is_not():
    def step(rho, optimizer=None):
        params = [nn.Parameter((torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16())]
        optimizer = SAM(params, SGD, rho=rho, lr=0.0)
        for _ in range(12):
            params[0].grad = torch.randn(100_000).bfloat16()
            optimizer.first_step()
            optimizer.second_step()

    with pytest.warns(UserWarning, match="leaves little") as caught:
        step(0.005)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(0.5)


# ---- Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, options, message",
    [
        (
            torch.float32,
            {"master_weights": True},
            "master_weights is for bfloat16 and float16 parameters, but parameter 0",
        ),
        (torch.float32, {"stochastic_rounding": True}, "stochastic_rounding is for bfloat16 and float16"),
        (torch.bfloat16, {"master_weights": True, "stochastic_rounding": True}, "two answers to the same rounding"),
        (torch.bfloat16, {"master_weights": True, "base_optimizer": torch.optim.RMSprop}, "needs SGD, Adam or AdamW"),
        (torch.bfloat16, {"ema_dtype": torch.float16}, "ema_dtype must be torch.float32, torch.bfloat16 or torch.int8"),
        (torch.bfloat16, {"ema_dtype": "int8"}, "ema_dtype must be"),
        (torch.float32, {"ema_dtype": torch.int8, "lmbda": 0.9995}, "use lmbda <= 0.999"),
        (torch.float64, {"ema_dtype": torch.bfloat16}, "is float64, which ema_dtype=torch.bfloat16 does not go with"),
        (torch.float64, {"forward_dtype": torch.bfloat16}, "is float64, which forward_dtype"),
        (torch.float32, {"forward_dtype": torch.float32}, "forward_dtype must be torch.bfloat16 or torch.float16"),
        (torch.float32, {"ema_source": "both"}, "ema_source must be 'ascent'"),
        (torch.float32, {"ema_source": "descent", "ema": "updated"}, "use ema='previous'"),
    ],
)
def test_bad_precision_options(dtype, options, message):
    options = dict(options)
    base = options.pop("base_optimizer", SGD)
    with pytest.raises((TypeError, ValueError), match=message):
        FriendlySAM([nn.Parameter(torch.ones(3, dtype=dtype))], base, lr=0.1, **options)
    optimizer = FriendlySAM([nn.Parameter(torch.ones(3, dtype=dtype))], base, lr=0.1)
    with pytest.raises((TypeError, ValueError), match=message.replace("parameter 0", "parameter 0 of group 1")):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=dtype))], **options})
    assert len(optimizer.param_groups) == 1


def test_an_int8_average_without_its_scales_is_refused_by_load():
    params = parameters(torch.float32)
    optimizer = FriendlySAM(params, SGD, ema_dtype=torch.int8, **KWARGS[SGD])
    run(params, optimizer, gradients(1, torch.float32))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    del checkpoint["state"][0]["fsam_ema_scale"]
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="'fsam_ema_scale' of parameter 0 .* is missing"):
        optimizer.load_state_dict(checkpoint)
    for name, value in before["state"][0].items():
        assert identical(optimizer.state_dict()["state"][0][name], value)


# ---- Memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base, own", [(SGD, 4), (AdamW, 8)])
@pytest.mark.parametrize(
    "dtype, options, over",
    [
        (torch.float32, {}, 8),
        (torch.float32, {"ema_dtype": torch.bfloat16}, 6),
        (torch.float32, {"ema_dtype": torch.int8}, 5 + 4 / 128),
        (torch.bfloat16, {"master_weights": True}, 4),
        (torch.bfloat16, {"master_weights": True, "ema_dtype": torch.bfloat16}, 2),
        (torch.bfloat16, {"master_weights": True, "ema_dtype": torch.int8}, 1 + 4 / 128),
    ],
)
def test_bytes_per_parameter(base, own, dtype, options, over):
    """Every buffer that is left after a step: what docs/mixed-precision.md says, and next to nothing beside it."""
    numel = 1 << 20
    p = nn.Parameter(torch.zeros(numel, dtype=dtype))
    optimizer = FriendlySAM([p], base, **options, **KWARGS[base])
    for half in (optimizer.first_step, optimizer.second_step):
        p.grad = torch.ones_like(p)
        half()
    (flat,) = optimizer._passes.layout.flats.values()
    (segment,) = optimizer._passes.layout.segments_of(0)
    sums = (optimizer._passes.norm.totals[flat.device], *optimizer._passes._effects)
    tensors = [*map(flat.buffer, flat.names), segment.partials, *sums]
    held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    masters = 4 if flat.masters else 0
    assert abs(held / numel - own - masters - over) < 0.02
