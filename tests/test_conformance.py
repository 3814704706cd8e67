"""Every backend, op, dtype and memory layout against the float64 reference; bits where bits are promised.

In each backend any two values of a test's axes meet; FSAM_EVERY_COMBINATION=1 runs all combinations.

What 16-bit parameters have of their own (masters, stochastic rounding) is in test_mixed_precision.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fsam_ext.backends import ops, reference

from .conformance import (
    BACKENDS,
    COMPRESSED,
    DTYPES,
    LAYOUTS,
    SUMMANDS,
    Average,
    Inputs,
    assert_average_close,
    assert_close,
    copied,
    doubled,
    every_pair,
    identical,
    load,
    outside,
    outside_scales,
    slices,
    unit,
)

SIGMA, LMBDA, RHO, EPS = 0.8, 0.9, 0.3, 1e-12

# numpy, in Triton's interpreter, warns of what a GPU does without a word.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

# The dtype of the parameters, and that of the average, or None for the state's.
STORED = [(dtype, None) for dtype in DTYPES] + [(dtype, stored) for dtype in DTYPES[1:] for stored in COMPRESSED]
STORED_OF_FLOAT32 = [None, *COMPRESSED]


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request):
    return load(request.param)


def ascent(
    layout: str, dtype: torch.dtype, device: str, ema: str, stored: torch.dtype | None, scaled: bool
) -> tuple[Inputs, Average, Tensor | None]:
    """Inputs, average and loss scale; `ema` is none, previous, updated, or unset (no gradient seen yet)."""
    inputs = Inputs(layout, dtype, device, alignment=ops.QUANTIZED if stored == torch.int8 else 1)
    average = Average() if ema == "none" else inputs.average(stored, unset=ema == "unset")
    scale = torch.tensor(64.0, device=device) if scaled else None
    if scaled:
        for grad in inputs.grads:
            grad.mul_(64)
    return inputs, average, scale


def unscaled(inputs: Inputs, scale: Tensor | None) -> list[Tensor]:
    return [g.cpu().double() / (1.0 if scale is None else scale.item()) for g in inputs.grads]


def known(flat: Tensor | None, inputs: Inputs) -> list[Tensor]:
    """The float64 value of each row's part of a flat state; an unset one counts as zero."""
    if flat is None:
        return [torch.zeros(p.shape, dtype=torch.float64) for p in inputs.params]
    return [part.cpu().double().nan_to_num(nan=0.0) for part in slices(flat, inputs)]


AVERAGES = every_pair(
    layout=LAYOUTS, dtype__stored=STORED, ema=["none", "previous", "updated", "unset"], adaptive=[False, True]
)


@AVERAGES
def test_noise_norm(backend, layout, dtype, stored, ema, adaptive):
    backend, device = backend
    inputs, average, scale = ascent(layout, dtype, device, ema, stored, scaled=adaptive)
    options = (SIGMA, LMBDA, adaptive, ema == "updated")
    before = copied([inputs.params, inputs.grads, average.tensors()])

    ops.noise_norm(
        *(backend, inputs.params, inputs.grads, inputs.offsets, average.ema, average.scale, scale),
        *(*options, inputs.partials, inputs.stats),
    )

    exact = torch.zeros(ops.STATISTICS, dtype=torch.float64)
    args = doubled([inputs.params, inputs.grads, inputs.offsets, average.exact(), None, scale])
    reference.noise_norm(*args, *options, None, exact)
    bound = torch.zeros(ops.STATISTICS, dtype=torch.float64)
    for w, g, m in zip(inputs.params, unscaled(inputs, scale), known(average.exact(), inputs), strict=True):
        d = g.abs() + SIGMA * (m.abs() + g.abs())
        d = d * w.cpu().double().abs() if adaptive else d
        bound += torch.stack([(d * d).sum(), (g * g).sum(), (g * m).abs().sum(), (m * m).sum(), torch.zeros(())])
    bound *= SUMMANDS * unit(inputs.state_dtype)
    assert ((inputs.stats.cpu() - exact).abs() <= bound).all(), (inputs.stats, exact, bound)
    after = [inputs.params, inputs.grads, average.tensors()]
    assert all(map(identical, *(list(_tensors(x)) for x in (before, after)))), "pass A wrote to its inputs"
    if not isinstance(backend, type(reference)):
        assert inputs.partials[inputs.chunks * ops.STATISTICS :].isnan().all()


def _tensors(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _tensors(item)


def not_mine(average: Average, inputs: Inputs) -> list[Tensor]:
    """What an update of the average must leave alone."""
    tensors = [] if average.ema is None else [outside(average.ema, inputs)]
    return tensors if average.scale is None else [*tensors, outside_scales(average, inputs)]


@AVERAGES
def test_perturb(backend, layout, dtype, stored, ema, adaptive):
    backend, device = backend
    inputs, average, scale = ascent(layout, dtype, device, ema, stored, scaled=adaptive)
    stats = torch.tensor([2.0, 1, 1, 1, 0], dtype=torch.float64, device=device)
    rho_tensor = torch.tensor(RHO, device=device) if adaptive else None
    rho = math.nan if adaptive else RHO  # the tensor must win
    options = (stats, scale, rho, rho_tensor, SIGMA, LMBDA, EPS, adaptive, ema == "updated", True, 0, None)
    backup = inputs.poisoned_backup()
    original = copied(inputs.params)
    exact_average = average.exact()
    args = doubled([inputs.params, inputs.grads, inputs.offsets, exact_average, None, backup, *options])
    length = RHO / (math.sqrt(2.0) + EPS)
    sizes, average_sizes = [], []
    for w, g, m in zip(original, unscaled(inputs, scale), known(exact_average, inputs), strict=True):
        w = w.cpu().double().abs()
        d = g.abs() + SIGMA * (m.abs() + g.abs())
        sizes.append(w + (w * w if adaptive else 1) * length * d)
        average_sizes.append(LMBDA * m.abs() + (1 - LMBDA) * g.abs())
    untouched = copied([outside(backup, inputs), *not_mine(average, inputs)])
    start = copied(average.tensors())

    where = (inputs.params, inputs.grads, inputs.offsets)
    ops.perturb(backend, *where, average.ema, average.scale, backup, *options)

    reference.perturb(*args)
    for i, (w, exact, size) in enumerate(zip(inputs.params, args[0], sizes, strict=True)):
        assert_close(w, exact, size, inputs.state_dtype, f"parameter {i}")
    if average.ema is not None:
        assert_average_close(average, args[3], average_sizes, inputs)
        # In the arithmetic of the backends, whose bits it shares here: the loss scale is a power of two.
        mirror = Average(*start)
        reference.perturb(copied(original), *where[1:], mirror.ema, mirror.scale, inputs.poisoned_backup(), *options)
        assert all(map(identical, average.tensors(), mirror.tensors())), "other bits than the reference"
    assert all(map(identical, slices(backup, inputs), original)), "the backup is not the parameter, bit for bit"
    assert all(map(identical, untouched, [outside(backup, inputs), *not_mine(average, inputs)])), (
        "wrote outside its slices"
    )


@every_pair(layout=LAYOUTS, stored=STORED_OF_FLOAT32)
def test_perturb_that_feeds_nothing_leaves_the_average(backend, layout, stored):
    """The parameters go where they go with an average that is fed."""
    backend, device = backend
    inputs, average, _ = ascent(layout, torch.float32, device, "unset", stored, scaled=False)
    stats = torch.tensor([2.0, 1, 1, 1, 0], dtype=torch.float64, device=device)
    fed = [copied(inputs.params), copied(average.tensors())]
    before = copied(average.tensors())
    for params, tensors, feeds in ((inputs.params, average.tensors(), False), (*fed, True)):
        where = (params, inputs.grads, inputs.offsets, *(tensors if len(tensors) == 2 else (*tensors, None)))
        options = (stats, None, RHO, None, SIGMA, LMBDA, EPS, False, True, feeds, 0, None)
        ops.perturb(backend, *where, inputs.poisoned_backup(), *options)
    assert all(map(identical, inputs.params, fed[0]))
    assert all(map(identical, average.tensors(), before))


@every_pair(layout=LAYOUTS, dtype__stored=STORED, noise_sq=[math.inf, math.nan])
def test_perturb_with_a_nonfinite_norm_only_fills_the_backup(backend, layout, dtype, stored, noise_sq):
    backend, device = backend
    inputs, average, _ = ascent(layout, dtype, device, "unset", stored, scaled=False)
    for grad in inputs.grads:
        grad.fill_(math.inf)
    stats = torch.tensor([noise_sq, 1, 1, 1, 0], dtype=torch.float64, device=device)
    backup = inputs.poisoned_backup()
    effect = torch.full((inputs.chunks * ops.EFFECT + 2,), math.nan, dtype=inputs.state_dtype, device=device)
    weights, before = copied(inputs.params), copied(average.tensors())

    where = (inputs.params, inputs.grads, inputs.offsets, average.ema, average.scale)
    options = (stats, None, RHO, None, SIGMA, LMBDA, EPS, False, False, True, 0, effect)
    ops.perturb(backend, *where, backup, *options)

    assert all(map(identical, inputs.params, weights))
    assert all(map(identical, average.tensors(), before))
    assert all(map(identical, slices(backup, inputs), weights))
    assert (effect[:-2] == 0).all() and effect[-2:].isnan().all()


@every_pair(layout=LAYOUTS, dtype=DTYPES)
def test_perturb_with_a_zero_norm_moves_nothing(backend, layout, dtype):
    backend, device = backend
    inputs, average, _ = ascent(layout, dtype, device, "previous", None, scaled=False)
    for tensor in [*inputs.grads, average.ema]:
        tensor.zero_()
    stats = torch.zeros(ops.STATISTICS, dtype=torch.float64, device=device)
    weights = copied(inputs.params)
    where = (inputs.params, inputs.grads, inputs.offsets, average.ema, None)
    options = (stats, None, RHO, None, SIGMA, LMBDA, 0.0, False, False, True, 0, None)  # eps = 0: hides no 0 / 0
    ops.perturb(backend, *where, inputs.poisoned_backup(), *options)
    assert all(map(torch.equal, inputs.params, weights))


# What the forward pass sees weights in; and whether they are rounded copies of masters.
EFFECTS = [
    (torch.float64, None, False),
    (torch.float32, None, False),
    (torch.float32, torch.bfloat16, False),
    (torch.float32, torch.float16, False),
    (torch.bfloat16, None, False),
    (torch.bfloat16, torch.float16, True),
    (torch.float16, None, True),
    (torch.float16, torch.bfloat16, False),
]


@every_pair(layout=LAYOUTS, dtype__forward__masters=EFFECTS, adaptive=[False, True])
def test_effect_of_a_perturbation(backend, layout, dtype, forward, masters, adaptive):
    """The sums are those of what lies in the parameters afterwards."""
    backend, device = backend
    inputs, average, scale = ascent(layout, dtype, device, "unset", None, scaled=adaptive)
    backup = inputs.masters() if masters else inputs.poisoned_backup()
    starts = doubled(slices(backup, inputs) if masters else inputs.params)
    before = copied(inputs.params)
    stats = torch.tensor([40.0, 1, 1, 1, 0], dtype=torch.float64, device=device)  # a part of the elements rounds away
    effect = torch.full((inputs.chunks * ops.EFFECT + 2,), math.nan, dtype=inputs.state_dtype, device=device)
    averages = known(average.exact(), inputs)

    where = (inputs.params, inputs.grads, inputs.offsets, average.ema, None)
    options = (stats, scale, RHO, None, SIGMA, LMBDA, EPS, adaptive, False, True, ops.FORWARD[forward], effect)
    ops.perturb(backend, *where, backup, *options)

    seen = lambda w: (w if forward is None else w.to(forward)).cpu().double()  # noqa: E731
    length = RHO / (math.sqrt(40.0) + EPS)
    exact, bound = [], []
    rows = zip(inputs.params, before, starts, unscaled(inputs, scale), averages, strict=True)
    for after, old, start, g, m in rows:
        factor = (start * start if adaptive else 1) * length
        e, i, size = seen(after) - seen(old), factor * (g - SIGMA * m), factor * (g.abs() + SIGMA * m.abs())
        exact.append(torch.stack([chunked(x, after) for x in (e * e, e * i, i * i)], 1))
        bound.append(torch.stack([chunked(x, after) for x in (e * e, e.abs() * size, size * size)], 1))
    error = (effect[:-2].cpu().double().view(-1, ops.EFFECT) - torch.cat(exact)).abs()
    # A sum, and what the intended perturbation (at most squared) was rounded before.
    assert (error <= (SUMMANDS + 2 * 12) * unit(inputs.state_dtype) * torch.cat(bound)).all()
    assert effect[-2:].isnan().all(), "wrote behind the last chunk"


def chunked(x: Tensor, like: Tensor) -> Tensor:
    """The sum of each chunk of a row, whose elements lie in memory like those of ``like``."""
    in_memory = torch.empty_like(like, dtype=x.dtype, device="cpu").copy_(x).as_strided((x.numel(),), (1,))
    return torch.stack([chunk.sum() for chunk in in_memory.split(ops.CHUNK)]) if x.numel() else x.new_zeros(0)


# ---- The average on its own ------------------------------------------------------------------------------------------


@every_pair(layout=LAYOUTS, dtype__stored=STORED, predicates=[False, True])
def test_update_ema(backend, layout, dtype, stored, predicates):
    """Elements whose gradient is not finite keep their value, the others get theirs."""
    backend, device = backend
    inputs, average, scale = ascent(layout, dtype, device, "unset", stored, scaled=predicates)
    for grad in inputs.grads:  # in an int8 block with a scale, in one without, and a row of nothing else
        if grad.numel() > 2:
            grad.copy_(torch.where(torch.rand(grad.shape).to(device) < 0.1, math.inf, grad))
            grad[(0,) * grad.dim()] = math.nan
    inputs.grads[-1].fill_(math.nan)
    stats = torch.ones(ops.STATISTICS, dtype=torch.float64, device=device) if predicates else None
    found_inf = torch.zeros((), device=device) if predicates else None
    rest = (stats, scale, found_inf, LMBDA)
    exact = average.exact()
    args = doubled([inputs.params, inputs.grads, inputs.offsets, exact, None, *rest])
    sizes = [
        LMBDA * m.abs() + (1 - LMBDA) * g.nan_to_num(0.0, 0.0, 0.0).abs() + m.abs() * ~g.isfinite()
        for g, m in zip(unscaled(inputs, scale), known(exact, inputs), strict=True)
    ]
    read_only = copied([inputs.params, inputs.grads])
    untouched = copied(not_mine(average, inputs))
    start = copied(average.tensors())

    where = (inputs.params, inputs.grads, inputs.offsets)
    ops.update_ema(backend, *where, average.ema, average.scale, *rest)

    reference.update_ema(*args)
    if stored == torch.int8:  # where there was no value and no finite gradient
        args[3].nan_to_num_(nan=0.0)
    else:
        for m, exact in zip(slices(average.ema, inputs), slices(args[3], inputs), strict=True):
            assert torch.equal(m.isnan().cpu(), exact.isnan())
            m.nan_to_num_(nan=0.0), exact.nan_to_num_(nan=0.0)
    assert_average_close(average, args[3], sizes, inputs)
    mirror = Average(*start)
    reference.update_ema(*where, mirror.ema, mirror.scale, *rest)
    if stored != torch.int8:
        for part in slices(mirror.ema, inputs):
            part.nan_to_num_(nan=0.0)
    assert all(map(identical, average.tensors(), mirror.tensors())), "other bits than the reference"
    assert all(map(identical, untouched, not_mine(average, inputs))), "wrote outside its slices"
    assert all(map(identical, *(list(_tensors(x)) for x in (read_only, [inputs.params, inputs.grads]))))


def skipping(reason: str, norm_sq: float, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(stats, found_inf) of which ``reason`` has an update left out; of the ascent, because of its squared norm."""
    stats = torch.ones(ops.STATISTICS, dtype=torch.float64, device=device)
    found_inf = torch.zeros((), device=device)
    if reason == "stats":
        stats[0] = norm_sq
    else:
        found_inf.fill_(1.0)
    return stats, found_inf


@every_pair(layout=LAYOUTS, stored=STORED_OF_FLOAT32, reason=["stats", "found_inf"])
def test_a_skipped_step_leaves_the_average(backend, layout, stored, reason):
    backend, device = backend
    inputs, average, _ = ascent(layout, torch.float32, device, "unset", stored, scaled=False)
    stats, found_inf = skipping(reason, math.nan, device)
    before = copied(average.tensors())
    where = (inputs.params, inputs.grads, inputs.offsets, average.ema, average.scale)
    ops.update_ema(backend, *where, stats, None, found_inf, LMBDA)
    assert all(map(identical, average.tensors(), before))


@every_pair(layout=LAYOUTS, size=[1.0, 2.0**-110])
def test_an_int8_average_does_not_wear_off(backend, layout, size):
    """What is stored again without a finite gradient keeps its bits; a block below 2^-100 is zero, not unset."""
    backend, device = backend
    inputs = Inputs(layout, torch.float32, device, alignment=ops.QUANTIZED)
    average = inputs.average(torch.int8)
    average.scale.fill_(math.nan)
    nothing = [torch.full_like(grad, math.nan) for grad in inputs.grads]
    small = [grad * size for grad in inputs.grads]
    stored = []
    for grads in (small, nothing, nothing, inputs.grads):
        mirror = Average(*copied(average.tensors()))
        for feed, m in ((backend, average), (reference, mirror)):
            ops.update_ema(feed, inputs.params, grads, inputs.offsets, m.ema, m.scale, None, None, None, LMBDA)
        assert all(map(identical, average.tensors(), mirror.tensors()))
        stored.append(copied(average.tensors()))
    assert all(map(identical, stored[0] * 2, stored[1] + stored[2]))
    scales = stored[0][1][~stored[0][1].isnan()]  # of the rows
    assert (scales > 0).all() if size == 1.0 else (scales == 0).all()


# ---- The restore and the base updates --------------------------------------------------------------------------------


@every_pair(layout=LAYOUTS, dtype=DTYPES)
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


@every_pair(layout=LAYOUTS, dtype=DTYPES, options=SGD_OPTIONS, by_tensor=[False, True], with_backup=[False, True])
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
    rest = (stats, scale, found_inf, *lr, *options, None)
    args = doubled([inputs.params, inputs.grads, inputs.offsets, backup, buffer, *rest])
    magnitudes = []
    for w, g, b in zip(starts, unscaled(inputs, scale), known(buffer, inputs), strict=True):
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


@every_pair(layout=LAYOUTS, dtype=DTYPES, options=ADAM_OPTIONS, by_tensor=[False, True], with_backup=[False, True])
def test_restore_adam(backend, layout, dtype, options, by_tensor, with_backup):
    backend, device = backend
    (beta1, beta2), weight_decay, decoupled, maximize = options
    inputs, backup, scale, lr, starts = descent(layout, dtype, device, by_tensor, with_backup)
    exp_avg, exp_avg_sq = inputs.flat(0.1), inputs.flat(0.1).square_()
    steps, index = (
        torch.arange(float(len(inputs.params)), device=device),
        torch.arange(len(inputs.params), device=device),
    )
    corrections = torch.full((len(inputs.params), 2), math.nan, dtype=inputs.state_dtype, device=device)
    stats = torch.ones(ops.STATISTICS, dtype=torch.float64, device=device)
    counting, betas = (stats, None), (*lr, beta1, beta2)
    exact_corrections = doubled(corrections)
    reference.count_steps(doubled(steps), index.cpu(), exact_corrections, *doubled([*counting, *betas]))
    ops.count_steps(backend, steps, index, corrections, *counting, *betas)
    rest = (stats, scale, None, *betas, 1e-8, weight_decay, decoupled, maximize, None)
    args = doubled([inputs.params, inputs.grads, inputs.offsets, backup, exp_avg, exp_avg_sq, None, *rest])
    args[6] = exact_corrections
    magnitudes = []
    firsts, seconds = slices(exp_avg, inputs), slices(exp_avg_sq, inputs)
    for w, g, m, v in zip(starts, unscaled(inputs, scale), firsts, seconds, strict=True):
        g = g.abs() + (0 if decoupled else weight_decay * w)
        m, v = m.cpu().double().abs(), v.cpu().double()
        magnitudes.append([w, m + (1 - beta1) * (g + m), beta2 * v + (1 - beta2) * g * g])
    untouched = copied([outside(flat, inputs) for flat in (backup, exp_avg, exp_avg_sq) if flat is not None])

    state = (exp_avg, exp_avg_sq, corrections)
    ops.restore_adam(backend, inputs.params, inputs.grads, inputs.offsets, backup, *state, *rest)

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


@every_pair(
    layout=LAYOUTS, dtype=DTYPES, reason=["stats", "found_inf"], base=["sgd", "adam"], with_backup=[False, True]
)
def test_a_skipped_update_only_restores(backend, layout, dtype, reason, base, with_backup):
    backend, device = backend
    inputs = Inputs(layout, dtype, device)
    for grad in inputs.grads:
        grad.fill_(math.nan)
    backup = inputs.flat(dtype=dtype) if with_backup else None
    expected = copied(slices(backup, inputs)) if with_backup else copied(inputs.params)
    state = [inputs.flat(), inputs.flat()]
    before = copied(state)
    stats, found_inf = skipping(reason, math.inf, device)
    common = (inputs.params, inputs.grads, inputs.offsets, backup)
    if base == "sgd":
        ops.restore_sgd(backend, *common, state[0], stats, None, found_inf, 0.1, None, 0.9, 0.0, 0.1, True, False, None)
    else:
        corrections = torch.ones(len(inputs.params), 2, dtype=inputs.state_dtype, device=device)
        rest = (stats, None, found_inf, 0.1, None, 0.9, 0.99, 1e-8, 0.1, True, False, None)
        ops.restore_adam(backend, *common, *state, corrections, *rest)
    assert all(map(identical, inputs.params, expected))
    assert all(map(identical, state, before))
