"""What 16-bit parameters have of their own on every backend: float32 masters, and stochastic rounding without them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fsam_ext.backends import ops, reference

from .conformance import (
    BACKENDS,
    DTYPES,
    HALVES,
    LAYOUTS,
    Inputs,
    copied,
    dtype_id,
    every_pair,
    identical,
    load,
    outside,
    slices,
)

HALF = pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)

# numpy, in Triton's interpreter, warns of what a GPU does without a word.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request):
    return load(request.param)


# ---- Masters ---------------------------------------------------------------------------------------------------------


class Call:
    """The arguments of every op for some parameters, with state of its own."""

    def __init__(self, inputs: Inputs, params: list[Tensor], grads: list[Tensor], backup: Tensor | None) -> None:
        device = inputs.device
        self.params, self.grads, self.backup = params, grads, backup
        self.where = (params, grads, inputs.offsets)
        self.state = [inputs.flat(0.1), inputs.flat(0.1), inputs.flat(0.1).square_()]  # average or momentum; Adam's
        self.stats = torch.full((ops.STATISTICS,), 2.0, dtype=torch.float64, device=device)
        self.found_inf = torch.zeros((), device=device)
        self.corrections = torch.full((len(params), 2), 0.3, dtype=inputs.state_dtype, device=device)
        self.scale = torch.tensor(3.0, device=device)

    def run(self, backend: Any, op: str, rounding: Tensor | None = None, adopts: bool = False) -> None:
        average, first, second = self.state
        if op in ("perturb", "perturb_adaptive"):
            options = (0.3, None, 0.8, 0.9, 1e-12, op != "perturb", False, True, 0, None)
            ops.perturb(backend, *self.where, average, None, self.backup, self.stats, self.scale, *options)
        elif op == "restore":
            ops.restore(backend, self.params, self.where[2], self.backup)
        elif op == "restore_sgd":
            rest = (self.stats, self.scale, self.found_inf, 0.05, None, 0.9, 0.1, 0.1, True, False, rounding, adopts)
            ops.restore_sgd(backend, *self.where, self.backup, average, *rest)
        else:
            numbers = (0.05, None, 0.9, 0.99, 1e-8, 0.1, True, False)
            rest = (self.corrections, self.stats, self.scale, self.found_inf, *numbers, rounding, adopts)
            ops.restore_adam(backend, *self.where, self.backup, first, second, *rest)


UPDATES = ("restore_sgd", "restore_adam")


def like(tensors: list[Tensor], values: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Tensors of another dtype with the shapes and strides of ``tensors``."""
    return [torch.empty_like(t, dtype=dtype).copy_(value) for t, value in zip(tensors, values, strict=True)]


@every_pair(layout=LAYOUTS, dtype=HALVES, op=["perturb", "perturb_adaptive", "restore", *UPDATES])
def test_with_masters_parameters_are_those_of_float32_rounded(backend, layout, dtype, op):
    """Bit for bit: float32 parameters that hold the masters take the same step.

    In pass C parameters are perturbed, and do not matter.
    """
    backend, device = backend
    inputs = Inputs(layout, dtype, device)
    masters = inputs.masters()
    wide = like(inputs.params, slices(masters, inputs), torch.float32)
    if not op.startswith("perturb"):
        for param in inputs.params:
            param.fill_(math.nan)
    mine = Call(inputs, inputs.params, inputs.grads, masters)
    float32 = Call(inputs, wide, like(inputs.params, inputs.grads, torch.float32), masters.clone())
    float32.state = copied(mine.state)
    before, room = masters.clone(), outside(masters, inputs).clone()

    for call in (mine, float32):
        call.run(backend, op)

    assert all(map(identical, inputs.params, [w.to(dtype) for w in wide]))
    assert all(map(identical, mine.state, float32.state))
    if op in UPDATES:
        assert all(map(identical, slices(masters, inputs), wide))
        assert identical(outside(masters, inputs), room), "wrote outside its slices"
    else:
        assert identical(masters, before)


@every_pair(layout=LAYOUTS, dtype=HALVES, op=["perturb", *UPDATES])
def test_a_skipped_step_leaves_masters(backend, layout, dtype, op):
    """The perturbation changes nothing at all; the updates give the rounded masters back."""
    backend, device = backend
    inputs = Inputs(layout, dtype, device)
    masters = inputs.masters()
    rounded = copied(inputs.params)
    if op != "perturb":
        for param in inputs.params:
            param.fill_(7.0)
    call = Call(inputs, inputs.params, inputs.grads, masters)
    if op == "restore_sgd":
        call.found_inf.fill_(1.0)
    else:
        call.stats[0] = math.inf
    for grad in inputs.grads:
        grad.fill_(math.nan)
    before = copied([masters, *call.state])

    call.run(backend, op)

    assert all(map(identical, [masters, *call.state], before))
    assert all(map(identical, inputs.params, rounded))


def written_by_others(inputs: Inputs, masters: Tensor) -> Tensor:
    """Writes into some parameters, other values and their own; returns what the masters become, NaN aside.

    Some masters are NaN before, of odd bits, some with parameters that are NaN of other bits.
    """
    expected = masters.clone()
    for param, master, after in zip(inputs.params, slices(masters, inputs), slices(expected, inputs), strict=True):
        kind = torch.randint(0, 40, param.shape, device=param.device)
        odd = torch.tensor(0x7FC12345, dtype=torch.int32, device=param.device).view(torch.float32)
        master.copy_(torch.where((kind == 1) | (kind == 2), odd, torch.where(kind == 3, -1e-30, master)))
        param.copy_(master)
        values = {2: 0.5, 3: 0.0, 4: math.nan, 5: math.inf, 6: -0.0, 7: torch.finfo(param.dtype).smallest_normal / 4}
        for number, value in values.items():
            param.masked_fill_(kind == number, value)
        param.copy_(torch.where(kind > 30, torch.randn_like(param), param))  # and the others are what they were
        copy = master.to(param.dtype)
        after.copy_(torch.where((copy == param) | (copy.isnan() & param.isnan()), master, param.float()))
    return expected


def identical_but_nan(a: Tensor, b: Tensor) -> bool:
    """The same bits, but that a NaN may have any."""
    return torch.equal(a.isnan(), b.isnan()) and identical(
        a.nan_to_num(0.0, math.inf, -math.inf), b.nan_to_num(0.0, math.inf, -math.inf)
    )


@every_pair(layout=LAYOUTS, dtype=HALVES, op=["perturb", "perturb_adaptive", *UPDATES])
def test_what_others_wrote_into_parameters_becomes_the_masters(backend, layout, dtype, op):
    """Bit for bit what comes out where the masters have been told."""
    backend, device = backend
    inputs = Inputs(layout, dtype, device)
    masters = inputs.masters()
    expected = written_by_others(inputs, masters)
    told = expected.clone()
    mine = Call(inputs, inputs.params, inputs.grads, masters)
    other = Call(inputs, like(inputs.params, slices(told, inputs), dtype), inputs.grads, told)
    other.state = copied(mine.state)
    room = outside(masters, inputs).clone()

    mine.run(backend, op, adopts=True)
    other.run(backend, op)

    assert all(map(identical_but_nan, inputs.params, other.params))
    assert all(map(identical_but_nan, [masters, *mine.state], [told, *other.state]))
    assert identical(outside(masters, inputs), room), "wrote outside its slices"
    if op not in UPDATES:
        assert identical_but_nan(masters, expected)


@every_pair(layout=LAYOUTS, dtype=HALVES, op=["perturb", *UPDATES])
def test_what_others_wrote_outlives_a_skipped_step(backend, layout, dtype, op):
    """Parameters keep their bits and masters adopt them; a NaN that is the copy of a NaN leaves it its bits."""
    backend, device = backend
    inputs = Inputs(layout, dtype, device)
    masters = inputs.masters()
    expected = written_by_others(inputs, masters)
    kept = masters.isnan() & expected.isnan()
    before, odd = copied(inputs.params), masters[kept].clone()
    call = Call(inputs, inputs.params, inputs.grads, masters)
    call.stats[0] = math.nan if op == "restore_sgd" else call.stats[0]
    call.stats[0] = math.inf if op == "perturb" else call.stats[0]
    call.found_inf.fill_(op == "restore_adam")
    state = copied(call.state)

    call.run(backend, op, adopts=True)

    assert all(map(identical, inputs.params, before)) and all(map(identical, call.state, state))
    assert identical_but_nan(masters, expected) and identical(masters[kept], odd)


@HALF
@pytest.mark.parametrize("op", UPDATES)
@pytest.mark.parametrize("with_backup", [True, False])
def test_without_masters_nothing_is_adopted(backend, dtype, op, with_backup):
    backend, device = backend
    inputs = Inputs("odd", dtype, device)
    backup = inputs.flat(dtype=dtype) if with_backup else None
    calls = [Call(inputs, copied(inputs.params), inputs.grads, copied(backup)) for _ in range(2)]
    calls[1].state = copied(calls[0].state)
    for adopts, call in enumerate(calls):
        call.run(backend, op, adopts=bool(adopts))
    for one, other in zip(*([*call.params, *call.state, *([backup] if with_backup else [])] for call in calls)):
        assert identical(one, other)


# ---- Stochastic rounding ---------------------------------------------------------------------------------------------

# (seed, step): both are any 64 bits.
ROUNDINGS = [(0, 0), (1234, 7), (-3, 2**40), (2**63 - 1, -1)]


def rounding_of(numbers: tuple[int, int], device: str) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def positions(inputs: Inputs) -> list[Tensor]:
    """Where each element lies in the flat state."""
    return slices(torch.arange(inputs.numel), inputs)


@every_pair(layout=LAYOUTS, dtype=HALVES, op__with_backup=[("restore_sgd", True), ("restore_adam", False)])
def test_every_backend_draws_the_same_bits(backend, layout, dtype, op, with_backup):
    """The float32 update is what a call with masters leaves in them; it is rounded with storage.h's random bits."""
    backend, device = backend
    inputs = Inputs(layout, dtype, device)
    backup = inputs.flat(dtype=dtype) if with_backup else None
    starts = slices(backup, inputs) if with_backup else inputs.params
    masters = torch.zeros(inputs.numel, device=device)
    for part, start in zip(slices(masters, inputs), starts, strict=True):
        part.copy_(start)
    exact = Call(inputs, copied(inputs.params), inputs.grads, masters)
    rounded = Call(inputs, inputs.params, inputs.grads, backup)
    rounded.state = copied(exact.state)
    numbers = ROUNDINGS[torch.randint(len(ROUNDINGS), ()).item()]
    rounding, before = rounding_of(numbers, device), copied([backup] if with_backup else [])

    exact.run(backend, op)
    rounded.run(backend, op, rounding)

    for w, x, at in zip(inputs.params, slices(masters, inputs), positions(inputs), strict=True):
        bits = reference.random_bits(at, rounding.cpu())
        assert identical(w, reference.stochastically_rounded(x.cpu(), dtype, bits))
    assert all(map(identical, exact.state, rounded.state))
    assert all(map(identical, [backup] if with_backup else [], before))
    assert identical(rounding, rounding_of(numbers, device))


@HALF
def test_a_skipped_update_is_not_rounded(backend, dtype):
    backend, device = backend
    inputs = Inputs("odd", dtype, device)
    backup = inputs.flat(dtype=dtype)
    for op in UPDATES:
        call = Call(inputs, inputs.params, inputs.grads, backup)
        call.found_inf.fill_(1.0)
        call.run(backend, op, rounding_of((1, 1), device))
        assert all(map(identical, inputs.params, slices(backup, inputs)))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("op", UPDATES)
def test_wide_parameters_and_masters_are_rounded_to_nearest(backend, dtype, op):
    backend, device = backend
    inputs = Inputs("odd", dtype, device)
    backup = inputs.masters() if dtype in HALVES else inputs.flat(dtype=dtype)
    calls = [Call(inputs, copied(inputs.params), inputs.grads, backup.clone()) for _ in range(2)]
    calls[1].state = copied(calls[0].state)
    for call, rounding in zip(calls, (None, rounding_of((1, 1), device)), strict=True):
        call.run(backend, op, rounding)
    assert all(map(identical, calls[0].params, calls[1].params))
    assert all(map(identical, [calls[0].backup, *calls[0].state], [calls[1].backup, *calls[1].state]))


def rounded_by(backend: Any, x: Tensor, dtype: torch.dtype, rounding: Tensor) -> Tensor:
    """float32 ``x`` as an op rounds it: w = 0 - (-1) * (1 * x + 0 * g), each product and sum exact."""
    w, g = torch.zeros_like(x, dtype=dtype), torch.zeros_like(x, dtype=dtype)
    offsets = torch.tensor([0], dtype=torch.int64)
    where = ([w], [g], offsets, None, x.clone(), None, None, None)
    ops.restore_sgd(backend, *where, -1.0, None, 1.0, 1.0, 0.0, False, False, rounding)
    return w


@HALF
def test_positions_beyond_32_bits(backend, dtype):
    """Without any flat state an offset is only a position: rows may lie anywhere."""
    backend, device = backend
    w, g = (torch.randn(5000, device=device).to(dtype) for _ in range(2))
    start, rounding = 2**32 - 2048, rounding_of((5, 6), device)
    x = (w.float() - torch.tensor(0.3, device=device) * g.float()).cpu()  # two roundings, as in the op
    where = ([w], [g], torch.tensor([start], dtype=torch.int64), None, None, None, None, None)
    ops.restore_sgd(backend, *where, 0.3, None, 0.0, 0.0, 0.0, False, False, rounding)
    bits = reference.random_bits(torch.arange(start, start + 5000), rounding.cpu())
    assert identical(w, reference.stochastically_rounded(x, dtype, bits))


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of the two numbers of ``dtype`` around each x, in float64."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(x.double().abs().clamp_min(info.smallest_normal)))
    return torch.exp2(exponent) * info.eps


@HALF
def test_the_edges_of_the_range(backend, dtype):
    """Every finite number stays; between two numbers it is one of them; beyond the largest, inf and NaN."""
    backend, device = backend
    info = torch.finfo(dtype)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].float()
    between = torch.cat([every, -every]) * (1 + torch.rand(2 * every.numel()) * info.eps)
    between = between[between.abs() < info.max]
    tiny = torch.tensor([1e-45, -1e-45, 1e-40, -1e-40, 2.0**-25, -(2.0**-25), 3 * 2.0**-26])
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])
    beyond = torch.nextafter(torch.tensor(info.max), torch.tensor(math.inf)) * torch.tensor([1.0, -1.0])
    x = torch.cat([every, between, tiny, special, beyond]).to(device)
    rounding = rounding_of((9, 9), device)
    w = rounded_by(backend, x, dtype, rounding).cpu()
    x = x.cpu()

    # The buffer of a NaN counts as unset, so the op sees the gradient: zero.
    known = x.nan_to_num(0.0, math.inf, -math.inf)
    bits = reference.random_bits(torch.arange(x.numel()), rounding.cpu())
    assert torch.equal(w, reference.stochastically_rounded(known, dtype, bits))
    parts = w.split([len(every), len(between), len(tiny), len(special), len(beyond)])
    assert torch.equal(parts[0].float(), every)
    for rounded, value in ((parts[1], between), (parts[2], tiny)):
        assert ((rounded.double() - value.double()).abs() < spacing(value, dtype)).all()
    assert parts[3][2:4].tolist() == [math.inf, -math.inf]
    if dtype == torch.float16:  # it has numbers up to 65504, and rounds to nearest from there
        assert parts[4].tolist() == [info.max, -info.max]
        high = torch.tensor([65519.99, 65520.0, 3e38], device=device)
        assert rounded_by(backend, high, dtype, rounding).tolist() == [info.max, math.inf, math.inf]
    else:
        assert set(parts[4].abs().tolist()) <= {info.max, math.inf}


@HALF
def test_not_a_number_stays_one(backend, dtype):
    backend, device = backend
    w = torch.full((64,), math.inf, dtype=dtype, device=device)
    where = ([w], [w.clone()], torch.zeros(1, dtype=torch.int64), None, None, None, None, None)
    ops.restore_sgd(backend, *where, 1.0, None, 0.0, 0.0, 0.0, False, False, rounding_of((1, 1), device))
    assert w.isnan().all()


STEPS, ELEMENTS = 64, 1000


def allowed_mean(samples: int, comparisons: int, width: float = 1.0) -> float:
    """Hoeffding: the mean of independent numbers from an interval of this width, whose expectation is zero, lies beyond
    this with a probability of at most 1e-9 in all of so many comparisons together."""
    return width * math.sqrt(math.log(2 * comparisons / 1e-9) / (2 * samples))


@HALF
@pytest.mark.parametrize("scale", ["normal", "subnormal"])
def test_the_mean_is_kept(backend, dtype, scale):
    """In units of the spacing an error is -f or 1 - f for the cut-off part f, and its expectation is zero; it depends
    neither on the element nor on the step, nor on the errors beside it."""
    backend, device = backend
    seed = int(torch.randint(2**62, ()))
    x = torch.randn(ELEMENTS)
    if scale == "subnormal":
        x = x * torch.finfo(dtype).smallest_normal / 16
    errors = torch.empty(STEPS, ELEMENTS, dtype=torch.float64)
    for step in range(STEPS):
        w = rounded_by(backend, x.to(device), dtype, rounding_of((seed, step), device)).cpu()
        errors[step] = (w.double() - x.double()) / spacing(x, dtype)
    assert (errors.abs() < 1).all()
    # The fraction that is added has 13 bits in float16; the part that is cut off of a subnormal number has more.
    bias = 2.0**-13 if dtype == torch.float16 and scale == "subnormal" else 0.0
    samples = errors.numel()
    assert errors.mean().abs() <= allowed_mean(samples, 1) + bias
    assert (errors.mean(0).abs() <= allowed_mean(STEPS, ELEMENTS) + bias).all(), "an element has a bias"
    assert (errors.mean(1).abs() <= allowed_mean(ELEMENTS, STEPS) + bias).all(), "a step has a bias"
    for pairs in (errors[:, ::2] * errors[:, 1::2], errors[::2] * errors[1::2]):
        assert pairs.mean().abs() <= allowed_mean(samples // 2, 1, width=2.0) + 2 * bias, "errors are correlated"
