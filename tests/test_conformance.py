"""Every backend, op, dtype and memory layout against the float64 reference; bits where bits are promised."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fsam_ext import ops
from fsam_ext.backends import reference

from .conformance import (
    BACKENDS,
    DEVICE,
    DTYPES,
    LAYOUTS,
    SUMMANDS,
    Inputs,
    assert_close,
    copied,
    doubled,
    identical,
    outside,
    slices,
    unit,
)

SIGMA, LMBDA, RHO, EPS = 0.8, 0.9, 0.3, 1e-12

pytestmark = [
    pytest.mark.parametrize("layout", LAYOUTS),
    pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch.")),
]


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request):
    loaded = BACKENDS[request.param]()
    loaded_device = DEVICE[request.param]
    return loaded, loaded_device


def ascent(
    layout: str, dtype: torch.dtype, device: str, ema: str, scaled: bool
) -> tuple[Inputs, Tensor | None, Tensor | None]:
    """Inputs, flat EMA and loss scale; `ema` is none, previous, updated, or unset (no gradient seen yet)."""
    inputs = Inputs(layout, dtype, device)
    average = None if ema == "none" else inputs.flat(0.1)
    if ema == "unset":
        for part in slices(average, inputs)[::2]:  # every other parameter meets its first gradient
            part.fill_(math.nan)
    scale = torch.tensor(64.0, device=device) if scaled else None
    if scaled:
        for grad in inputs.grads:
            grad.mul_(64)
    return inputs, average, scale


def unscaled(inputs: Inputs, scale: Tensor | None) -> list[Tensor]:
    return [g.cpu().double() / (1.0 if scale is None else scale.item()) for g in inputs.grads]


def averages(average: Tensor | None, inputs: Inputs) -> list[Tensor]:
    """The float64 value of each row's EMA; an unset one counts as zero."""
    if average is None:
        return [torch.zeros(p.shape, dtype=torch.float64) for p in inputs.params]
    return [part.cpu().double().nan_to_num(nan=0.0) for part in slices(average, inputs)]


EMA_KINDS = pytest.mark.parametrize("ema", ["none", "previous", "updated", "unset"])
ADAPTIVE = pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "adaptive"])


@EMA_KINDS
@ADAPTIVE
def test_noise_norm(backend, layout, dtype, ema, adaptive):
    backend, device = backend
    inputs, average, scale = ascent(layout, dtype, device, ema, scaled=adaptive)
    options = (SIGMA, LMBDA, adaptive, ema == "updated")
    before = copied([inputs.params, inputs.grads, average])

    ops.noise_norm(
        backend, inputs.params, inputs.grads, inputs.offsets, average, scale, *options, inputs.partials, inputs.stats
    )

    exact = torch.zeros(ops.STATISTICS, dtype=torch.float64)
    args = doubled([inputs.params, inputs.grads, inputs.offsets, average, scale])
    reference.noise_norm(*args, *options, None, exact)
    bound = torch.zeros(ops.STATISTICS, dtype=torch.float64)
    for w, g, m in zip(inputs.params, unscaled(inputs, scale), averages(average, inputs), strict=True):
        d = g.abs() + SIGMA * (m.abs() + g.abs())
        d = d * w.cpu().double().abs() if adaptive else d
        bound += torch.stack([(d * d).sum(), (g * g).sum(), (g * m).abs().sum(), (m * m).sum(), torch.zeros(())])
    bound *= SUMMANDS * unit(inputs.state_dtype)
    assert ((inputs.stats.cpu() - exact).abs() <= bound).all(), (inputs.stats, exact, bound)
    after = [inputs.params, inputs.grads, average]
    assert all(map(identical, *(list(_tensors(x)) for x in (before, after)))), "pass A wrote to its inputs"
    if not isinstance(backend, type(reference)):
        assert inputs.partials[inputs.chunks * ops.STATISTICS :].isnan().all()


def _tensors(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _tensors(item)


@EMA_KINDS
@ADAPTIVE
def test_perturb(backend, layout, dtype, ema, adaptive):
    backend, device = backend
    inputs, average, scale = ascent(layout, dtype, device, ema, scaled=adaptive)
    stats = torch.tensor([2.0, 1, 1, 1, 0], dtype=torch.float64, device=device)
    rho_tensor = torch.tensor(RHO, device=device) if adaptive else None
    rho = math.nan if adaptive else RHO  # the tensor must win
    options = (stats, scale, rho, rho_tensor, SIGMA, LMBDA, EPS, adaptive, ema == "updated")
    backup = inputs.poisoned_backup()
    original = copied(inputs.params)
    args = doubled([inputs.params, inputs.grads, inputs.offsets, average, backup, *options])
    length = RHO / (math.sqrt(2.0) + EPS)
    magnitudes = []
    for w, g, m in zip(original, unscaled(inputs, scale), averages(average, inputs), strict=True):
        w = w.cpu().double().abs()
        d = g.abs() + SIGMA * (m.abs() + g.abs())
        magnitudes.append((w + (w * w if adaptive else 1) * length * d, LMBDA * m.abs() + (1 - LMBDA) * g.abs()))
    untouched = copied([outside(flat, inputs) for flat in (backup, average) if flat is not None])

    ops.perturb(backend, inputs.params, inputs.grads, inputs.offsets, average, backup, *options)

    reference.perturb(*args)
    exact_w, exact_average = args[0], args[3]
    for i, (w, (size, _)) in enumerate(zip(inputs.params, magnitudes, strict=True)):
        assert_close(w, exact_w[i], size, inputs.state_dtype, f"parameter {i}")
    if average is not None:
        pairs = zip(slices(average, inputs), slices(exact_average, inputs), magnitudes, strict=True)
        for i, (m, exact, (_, size)) in enumerate(pairs):
            assert_close(m, exact, size, inputs.state_dtype, f"average {i}")
    assert all(map(identical, slices(backup, inputs), original)), "the backup is not the parameter, bit for bit"
    after = [outside(flat, inputs) for flat in (backup, average) if flat is not None]
    assert all(map(identical, untouched, after)), "wrote outside its slices"


@pytest.mark.parametrize("noise_sq", [math.inf, math.nan])
def test_perturb_with_a_nonfinite_norm_only_fills_the_backup(backend, layout, dtype, noise_sq):
    backend, device = backend
    inputs, average, _ = ascent(layout, dtype, device, "unset", scaled=False)
    for grad in inputs.grads:
        grad.fill_(math.inf)
    stats = torch.tensor([noise_sq, 1, 1, 1, 0], dtype=torch.float64, device=device)
    backup = inputs.poisoned_backup()
    weights, before = copied(inputs.params), average.clone()

    options = (stats, None, RHO, None, SIGMA, LMBDA, EPS, False, False)
    ops.perturb(backend, inputs.params, inputs.grads, inputs.offsets, average, backup, *options)

    assert all(map(identical, inputs.params, weights))
    assert identical(average, before)
    assert all(map(identical, slices(backup, inputs), weights))


def test_perturb_with_a_zero_norm_moves_nothing(backend, layout, dtype):
    backend, device = backend
    inputs, average, _ = ascent(layout, dtype, device, "previous", scaled=False)
    for tensor in [*inputs.grads, average]:
        tensor.zero_()
    stats = torch.zeros(ops.STATISTICS, dtype=torch.float64, device=device)
    weights = copied(inputs.params)
    options = (stats, None, RHO, None, SIGMA, LMBDA, 0.0, False, False)  # eps = 0: nothing hides a 0 / 0
    ops.perturb(backend, inputs.params, inputs.grads, inputs.offsets, average, inputs.poisoned_backup(), *options)
    assert all(map(torch.equal, inputs.params, weights))


def test_restore_is_a_copy_of_bits(backend, layout, dtype):
    backend, device = backend
    inputs = Inputs(layout, dtype, device)
    backup = inputs.flat(dtype=dtype)
    for part in slices(backup, inputs):  # values that arithmetic would not bring through
        if part.numel() > 3:
            part.flatten()[0:1].copy_(torch.tensor([-0.0]))
            part.reshape(-1)[1:2].fill_(math.nan)
    before = backup.clone()
    ops.restore(backend, inputs.params, inputs.offsets, backup)
    assert all(map(identical, inputs.params, slices(backup, inputs)))
    assert identical(backup, before)


# (momentum, dampening, weight decay, nesterov, maximize)
SGD_OPTIONS = [
    (0.0, 0.0, 0.0, False, False),
    (0.0, 0.0, 0.1, False, True),
    (0.9, 0.0, 0.1, False, False),
    (0.9, 0.5, 0.0, False, True),
    (0.9, 0.0, 0.1, True, False),
]
# (lr tensor given, loss scale given, backup given)
CALLS = pytest.mark.parametrize("by_tensor,with_backup", [(False, True), (True, False)], ids=["plain", "by_tensor"])


def descent(layout, dtype, device, by_tensor: bool, with_backup: bool):
    inputs = Inputs(layout, dtype, device)
    scale = torch.tensor(64.0, device=device) if by_tensor else None
    if by_tensor:
        for grad in inputs.grads:
            grad.mul_(64)
    backup = inputs.flat(dtype=dtype) if with_backup else None
    lr = (math.nan, torch.tensor(0.05, device=device, dtype=torch.float64)) if by_tensor else (0.05, None)
    starts = slices(backup, inputs) if with_backup else copied(inputs.params)
    return inputs, backup, scale, lr, [s.cpu().double().abs() for s in starts]


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=lambda o: "-".join(map(str, o)))
@CALLS
def test_restore_sgd(backend, layout, dtype, options, by_tensor, with_backup):
    backend, device = backend
    momentum, dampening, weight_decay, nesterov, maximize = options
    inputs, backup, scale, lr, starts = descent(layout, dtype, device, by_tensor, with_backup)
    buffer = inputs.flat() if momentum else None
    if momentum:
        for part in slices(buffer, inputs)[::2]:
            part.fill_(math.nan)  # first gradient: the buffer becomes g whatever the dampening
    stats = torch.ones(ops.STATISTICS, dtype=torch.float64, device=device)
    found_inf = torch.zeros((), device=device)
    rest = (stats, scale, found_inf, *lr, *options)
    args = doubled([inputs.params, inputs.grads, inputs.offsets, backup, buffer, *rest])
    magnitudes = []
    for w, g, b in zip(starts, unscaled(inputs, scale), averages(buffer, inputs), strict=True):
        g = g.abs() + weight_decay * w
        new = momentum * b.abs() + g if momentum else g
        magnitudes.append((w + 0.05 * ((g if nesterov else 0) + (momentum * new if nesterov else new)), new))
    untouched = copied([outside(flat, inputs) for flat in (backup, buffer) if flat is not None])

    ops.restore_sgd(backend, inputs.params, inputs.grads, inputs.offsets, backup, buffer, *rest)

    reference.restore_sgd(*args)
    for i, (w, (size, _)) in enumerate(zip(inputs.params, magnitudes, strict=True)):
        assert_close(w, args[0][i], size, inputs.state_dtype, f"parameter {i}")
    if momentum:
        pairs = zip(slices(buffer, inputs), slices(args[4], inputs), magnitudes, strict=True)
        for i, (b, exact, (_, size)) in enumerate(pairs):
            assert_close(b, exact, size, inputs.state_dtype, f"momentum buffer {i}")
    after = [outside(flat, inputs) for flat in (backup, buffer) if flat is not None]
    assert all(map(identical, untouched, after)), "wrote outside its slices"


# (betas, weight decay, decoupled, maximize)
ADAM_OPTIONS = [
    ((0.9, 0.999), 0.0, False, False),
    ((0.9, 0.999), 0.1, False, True),
    ((0.8, 0.95), 0.1, True, False),
    ((0.0, 0.9), 0.1, True, True),
]


@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=lambda o: "-".join(map(str, o)))
@CALLS
def test_restore_adam(backend, layout, dtype, options, by_tensor, with_backup):
    backend, device = backend
    (beta1, beta2), weight_decay, decoupled, maximize = options
    inputs, backup, scale, lr, starts = descent(layout, dtype, device, by_tensor, with_backup)
    exp_avg, exp_avg_sq = inputs.flat(0.1), inputs.flat(0.1).square_()
    steps = torch.arange(1.0, len(inputs.params) + 1, device=device)
    stats = torch.ones(ops.STATISTICS, dtype=torch.float64, device=device)
    rest = (stats, scale, None, *lr, beta1, beta2, 1e-8, weight_decay, decoupled, maximize)
    args = doubled([inputs.params, inputs.grads, inputs.offsets, backup, exp_avg, exp_avg_sq, steps, *rest])
    magnitudes = []
    firsts, seconds = slices(exp_avg, inputs), slices(exp_avg_sq, inputs)
    for w, g, m, v in zip(starts, unscaled(inputs, scale), firsts, seconds, strict=True):
        g = g.abs() + (0 if decoupled else weight_decay * w)
        m, v = m.cpu().double().abs(), v.cpu().double()
        magnitudes.append([w, m + (1 - beta1) * (g + m), beta2 * v + (1 - beta2) * g * g])
    untouched = copied([outside(flat, inputs) for flat in (backup, exp_avg, exp_avg_sq) if flat is not None])

    ops.restore_adam(backend, inputs.params, inputs.grads, inputs.offsets, backup, exp_avg, exp_avg_sq, steps, *rest)

    reference.restore_adam(*args)
    exact_firsts, exact_seconds = slices(args[4], inputs), slices(args[5], inputs)
    for i, (w, first, second) in enumerate(magnitudes):
        step = i + 1
        denominator = exact_seconds[i].sqrt() / math.sqrt(1 - beta2**step) + 1e-8
        # The error of the second moment reaches the update divided by twice the second moment.
        sensitivity = 1 + second / exact_seconds[i].clamp_min(1e-300)
        update = 0.05 / (1 - beta1**step) * first / denominator * sensitivity
        assert_close(inputs.params[i], args[0][i], w + update, inputs.state_dtype, f"parameter {i}")
        assert_close(firsts[i], exact_firsts[i], first, inputs.state_dtype, f"exp_avg {i}")
        assert_close(seconds[i], exact_seconds[i], second, inputs.state_dtype, f"exp_avg_sq {i}")
    after = [outside(flat, inputs) for flat in (backup, exp_avg, exp_avg_sq) if flat is not None]
    assert all(map(identical, untouched, after)), "wrote outside its slices"


@pytest.mark.parametrize("reason", ["stats", "found_inf"])
@pytest.mark.parametrize("base", ["sgd", "adam"])
@pytest.mark.parametrize("with_backup", [True, False], ids=["restore", "in_place"])
def test_a_skipped_update_only_restores(backend, layout, dtype, reason, base, with_backup):
    backend, device = backend
    inputs = Inputs(layout, dtype, device)
    for grad in inputs.grads:
        grad.fill_(math.nan)
    backup = inputs.flat(dtype=dtype) if with_backup else None
    expected = copied(slices(backup, inputs)) if with_backup else copied(inputs.params)
    state = [inputs.flat(), inputs.flat()]
    before = copied(state)
    stats = torch.ones(ops.STATISTICS, dtype=torch.float64, device=device)
    found_inf = torch.zeros((), device=device)
    if reason == "stats":
        stats[0] = math.inf
    else:
        found_inf.fill_(1.0)
    common = (inputs.params, inputs.grads, inputs.offsets, backup)
    if base == "sgd":
        ops.restore_sgd(backend, *common, state[0], stats, None, found_inf, 0.1, None, 0.9, 0.0, 0.1, True, False)
    else:
        steps = torch.ones(len(inputs.params), device=device)
        rest = (stats, None, found_inf, 0.1, None, 0.9, 0.99, 1e-8, 0.1, True, False)
        ops.restore_adam(backend, *common, *state, steps, *rest)
    assert all(map(identical, inputs.params, expected))
    assert all(map(identical, state, before))
