"""The reuse of second gradients on every backend: what is kept of the first, and the direction that becomes of it."""

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
    SUMMANDS,
    Average,
    Inputs,
    assert_close,
    copied,
    doubled,
    every_pair,
    identical,
    load,
    outside,
    slices,
    unit,
)
from .test_mixed_precision import identical_but_nan, written_by_others

# numpy, in Triton's interpreter, warns of what a GPU does without a word.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

FEW_LAYOUTS = ["empty", "odd", "misaligned"]
# (dtype of the parameters, dtype of what is kept or None for the state's)
KEPT = [*((dtype, None) for dtype in DTYPES), *((dtype, torch.bfloat16) for dtype in DTYPES[1:])]
SCALE = 64.0  # a power of two: a gradient times its inverse is the gradient divided by it


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request):
    return load(request.param)


def scaled_inputs(layout: str, dtype: torch.dtype, device: str, alignment: int = 1) -> tuple[Inputs, Tensor]:
    """Inputs whose gradients are scaled, and the scale."""
    inputs = Inputs(layout, dtype, device, alignment=alignment)
    for grad in inputs.grads:
        grad.mul_(SCALE)
    return inputs, torch.tensor(SCALE, device=device)


def unscaled(inputs: Inputs) -> list[Tensor]:
    """Gradients in the dtype of the arithmetic."""
    return [grad.to(inputs.state_dtype) / SCALE for grad in inputs.grads]


def numbers(device: str, *values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


def total(products: list[Tensor]) -> Tensor:
    return sum((product.cpu().double().sum() for product in products), torch.zeros((), dtype=torch.float64))


def assert_sum(actual: Tensor, factors: list[tuple[Tensor, Tensor]], inputs: Inputs) -> None:
    """The sum of the products of these factors: see NOTE [where the tolerances come from]."""
    products = [a.cpu().double() * b.cpu().double() for a, b in factors]
    bound = SUMMANDS * unit(inputs.state_dtype) * total([product.abs() for product in products])
    assert (actual.cpu() - total(products)).abs() <= bound, (actual, total(products), bound)


def assert_room_behind(partials: Tensor, used: int, backend: Any) -> None:
    if not isinstance(backend, type(reference)):
        assert partials[used:].isnan().all(), "wrote behind the last chunk"


# ---- What pass B keeps -----------------------------------------------------------------------------------------------


def perturb(
    backend: Any, inputs: Inputs, average: Average, scale: Tensor, noise_sq: float, kept: Tensor | None
) -> tuple:
    """All that a call writes beside ``kept``."""
    backup = inputs.poisoned_backup()
    effect = torch.zeros(inputs.chunks * ops.EFFECT, dtype=inputs.state_dtype, device=inputs.device)
    stats, journal = numbers(inputs.device, noise_sq, 1, 1, 1, 0), torch.zeros(1, dtype=torch.int64)
    where = (inputs.params, inputs.grads, inputs.offsets, average.ema, average.scale, backup, stats, scale)
    ops.perturb(backend, *where, 0.3, None, 0.8, 0.9, 1e-12, False, False, True, 0, effect, journal, kept)
    return (*inputs.params, *average.tensors(), backup, effect, journal)


@every_pair(layout=LAYOUTS, dtype__stored=KEPT, ema=["none", "full", "compressed"])
def test_perturb_keeps_the_gradient(backend, layout, dtype, stored, ema):
    """And changes nothing in what it does beside."""
    backend, device = backend
    inputs, scale = scaled_inputs(layout, dtype, device, alignment=ops.QUANTIZED)
    compressed = None if dtype == torch.float64 else torch.bfloat16 if stored is None else torch.int8
    average = Average() if ema == "none" else inputs.average(compressed if ema == "compressed" else None, unset=True)
    kept = torch.full_like(inputs.flat(dtype=stored), 7.0)
    others = (copied(inputs.params), Average(*copied(average.tensors())))

    written = perturb(backend, inputs, average, scale, 2.0, kept)

    inputs.params, without = others
    assert all(map(identical, written, perturb(backend, inputs, without, scale, 2.0, None)))
    for k, g in zip(slices(kept, inputs), unscaled(inputs), strict=True):
        assert identical(k, g.to(kept.dtype))
    assert (outside(kept, inputs) == 7.0).all()


@every_pair(layout=FEW_LAYOUTS, dtype__stored=KEPT, noise_sq=[math.inf, math.nan])
def test_perturb_keeps_nothing_where_the_norm_is_not_finite(backend, layout, dtype, stored, noise_sq):
    backend, device = backend
    inputs, scale = scaled_inputs(layout, dtype, device)
    kept = inputs.flat(dtype=stored)
    before = kept.clone()
    perturb(backend, inputs, Average(inputs.flat()), scale, noise_sq, kept)
    assert identical(kept, before)


@every_pair(layout=LAYOUTS, dtype=HALVES, stored=[None, torch.bfloat16])
def test_perturb_with_masters_keeps_the_gradient(backend, layout, dtype, stored):
    backend, device = backend
    inputs, scale = scaled_inputs(layout, dtype, device)
    masters = inputs.masters()
    expected = written_by_others(inputs, masters)
    kept = inputs.flat(dtype=stored)
    stats = numbers(device, 2, 1, 1, 1, 0)
    where = (inputs.params, inputs.grads, inputs.offsets, inputs.flat(0.1), None, masters, stats, scale)
    ops.perturb(backend, *where, 0.3, None, 0.8, 0.9, 1e-12, False, False, True, 0, None, None, kept)
    assert identical_but_nan(masters, expected)
    for k, g in zip(slices(kept, inputs), unscaled(inputs), strict=True):
        assert identical(k, g.to(kept.dtype))


# ---- The norm of the gradient beside the average ---------------------------------------------------------------------

AVERAGES = [*KEPT, *((dtype, torch.int8) for dtype in DTYPES[1:])]


def feed(backend: Any, inputs: Inputs, average: Average, scale: Tensor, rest: tuple, *sums: Tensor) -> None:
    where = (inputs.params, inputs.grads, inputs.offsets, average.ema, average.scale)
    stats, found_inf = rest
    ops.update_ema(backend, *where, stats, scale, found_inf, 0.9, None, *sums)


@every_pair(layout=LAYOUTS, dtype__stored=AVERAGES, skipped=[None, "stats", "found_inf"])
def test_update_ema_gives_the_squared_norm(backend, layout, dtype, stored, skipped):
    """In the same pass, with the bits of the average unchanged; where it leaves the average, too."""
    backend, device = backend
    inputs, scale = scaled_inputs(layout, dtype, device, alignment=ops.QUANTIZED)
    average = inputs.average(stored, unset=True)
    without = Average(*copied(average.tensors()))
    stats = numbers(device, math.nan if skipped == "stats" else 1, 1, 1, 1, 0)
    found_inf = torch.tensor(float(skipped == "found_inf"), device=device)
    grad_sq = numbers(device, math.nan)

    feed(backend, inputs, average, scale, (stats, found_inf), inputs.partials, grad_sq)

    feed(backend, inputs, without, scale, (stats, found_inf))
    assert all(map(identical, average.tensors(), without.tensors()))
    assert_sum(grad_sq[0], [(g, g) for g in unscaled(inputs)], inputs)
    assert_room_behind(inputs.partials, inputs.chunks, backend)


@every_pair(
    layout=[name for name in LAYOUTS if name != "empty"],
    stored=[None, torch.bfloat16, torch.int8],
    value=[math.inf, -math.inf, math.nan],
)
def test_a_gradient_that_is_not_finite_is_in_the_squared_norm(backend, layout, stored, value):
    """Its element of the average keeps its value; the norm must tell."""
    backend, device = backend
    inputs, scale = scaled_inputs(layout, torch.float32, device, alignment=ops.QUANTIZED)
    last = inputs.grads[-1]
    last[(-1,) * last.dim()] = value
    average = inputs.average(stored, unset=True)
    without = Average(*copied(average.tensors()))
    grad_sq = numbers(device, 5.0)
    feed(backend, inputs, average, scale, (None, None), inputs.partials, grad_sq)
    feed(backend, inputs, without, scale, (None, None))
    assert all(map(identical, average.tensors(), without.tensors()))
    assert grad_sq.isnan() if math.isnan(value) else grad_sq == math.inf


# ---- From what is kept to a direction --------------------------------------------------------------------------------


@every_pair(layout=LAYOUTS, dtype__stored=KEPT)
def test_dots(backend, layout, dtype, stored):
    backend, device = backend
    inputs, scale = scaled_inputs(layout, dtype, device)
    kept = inputs.flat(0.1, dtype=stored)
    sums = numbers(device, math.nan, math.nan)
    before = copied([*inputs.params, *inputs.grads, kept])

    ops.dots(backend, inputs.params, inputs.grads, inputs.offsets, kept, scale, inputs.partials, sums)

    rows = slices(kept, inputs)
    assert_sum(sums[0], list(zip(unscaled(inputs), rows, strict=True)), inputs)
    assert_sum(sums[1], list(zip(rows, rows, strict=True)), inputs)
    assert all(map(identical, before, [*inputs.params, *inputs.grads, kept]))
    assert_room_behind(inputs.partials, 2 * inputs.chunks, backend)


@every_pair(value=[math.inf, math.nan], dtype=DTYPES)
def test_dots_of_what_is_not_finite(backend, dtype, value):
    backend, device = backend
    inputs = Inputs("odd", dtype, device)
    kept = inputs.flat().fill_(1.0)
    inputs.grads[2][3, 77] = value
    sums = numbers(device, 0, 0)
    ops.dots(backend, inputs.params, inputs.grads, inputs.offsets, kept, None, inputs.partials, sums)
    assert not sums[0].isfinite()
    assert sums[1].item() == sum(p.numel() for p in inputs.params)


def project(
    backend: Any,
    inputs: Inputs,
    kept: Tensor,
    sums: Tensor,
    stats: Any,
    scale: Any,
    found_inf: Any,
    journal: Any = None,
) -> Tensor:
    """What ``kept_sq`` gets."""
    kept_sq = numbers(inputs.device, 123.0)
    where = (inputs.params, inputs.grads, inputs.offsets, kept, sums)
    ops.project(backend, *where, stats, scale, found_inf, inputs.partials, kept_sq, journal)
    return kept_sq[0]


@every_pair(layout=LAYOUTS, dtype__stored=KEPT, predicates=[False, True])
def test_project(backend, layout, dtype, stored, predicates):
    """Of any sums: the bits of the reference, close to float64, and the norm of what is stored."""
    backend, device = backend
    inputs, scale = scaled_inputs(layout, dtype, device)
    kept = inputs.flat(0.1, dtype=stored)
    sums = numbers(device, -0.7, 1.3)
    stats = numbers(device, 1, 1, 1, 1, 0) if predicates else None
    found_inf = torch.zeros((), device=device) if predicates else None
    before, untouched = kept.clone(), outside(kept, inputs).clone()
    read_only = copied([*inputs.params, *inputs.grads, sums])
    exact, mirror = doubled(kept), kept.clone()

    kept_sq = project(backend, inputs, kept, sums, stats, scale, found_inf)

    where = doubled([inputs.params, inputs.grads, inputs.offsets, exact, sums, stats, scale, found_inf])
    reference.project(*where, None, numbers("cpu", 0))
    rows = (slices(flat, inputs) for flat in (kept, where[3], before))
    for i, (k, value, old, g) in enumerate(zip(*rows, unscaled(inputs), strict=True)):
        size = g.cpu().double().abs() + 0.7 / 1.3 * old.cpu().double().abs()
        assert_close(k, value, size, inputs.state_dtype, f"direction {i}")
    project(reference, inputs, mirror, sums, stats, scale, found_inf)
    assert identical(kept, mirror), "other bits than the reference"
    assert_sum(kept_sq, [(k, k) for k in slices(kept, inputs)], inputs)
    assert identical(outside(kept, inputs), untouched), "wrote outside its slices"
    assert all(map(identical, read_only, [*inputs.params, *inputs.grads, sums]))
    assert_room_behind(inputs.partials, inputs.chunks, backend)


@every_pair(layout=LAYOUTS, dtype__stored=KEPT)
def test_project_of_nothing_kept_is_the_gradient(backend, layout, dtype, stored):
    """sums[1] is 0: no share of what is kept, and no 0 / 0."""
    backend, device = backend
    inputs, scale = scaled_inputs(layout, dtype, device)
    kept = torch.zeros_like(inputs.flat(dtype=stored))
    kept_sq = project(backend, inputs, kept, numbers(device, 0, 0), None, scale, None)
    for k, g in zip(slices(kept, inputs), unscaled(inputs), strict=True):
        assert torch.equal(k, g.to(kept.dtype))
    assert_sum(kept_sq, [(k, k) for k in slices(kept, inputs)], inputs)


@every_pair(layout=FEW_LAYOUTS, dtype__stored=KEPT, noise_sq=[math.inf, math.nan], found_inf=[None, 0.0, 1.0])
def test_an_ascent_that_is_not_finite_leaves_the_direction(backend, layout, dtype, stored, noise_sq, found_inf):
    """And says so with NaN, whatever else is not finite."""
    backend, device = backend
    inputs, scale = scaled_inputs(layout, dtype, device)
    for grad in inputs.grads:
        grad.fill_(math.nan)
    kept = inputs.flat(dtype=stored)
    before = kept.clone()
    found_inf = None if found_inf is None else torch.tensor(found_inf, device=device)
    sums = numbers(device, math.nan, 1.0)
    kept_sq = project(backend, inputs, kept, sums, numbers(device, noise_sq, 1, 1, 1, 0), scale, found_inf)
    assert kept_sq.isnan() and identical(kept, before)


@every_pair(
    layout=FEW_LAYOUTS,
    dtype__stored=KEPT,
    reason=["found_inf", "product is inf", "product is NaN", "square is inf", "square is NaN"],
    with_stats=[False, True],
)
def test_a_second_gradient_that_is_not_finite_leaves_no_direction(backend, layout, dtype, stored, reason, with_stats):
    backend, device = backend
    inputs, scale = scaled_inputs(layout, dtype, device)
    for grad in inputs.grads:
        grad.fill_(math.inf)
    kept = inputs.flat(dtype=stored)
    untouched = outside(kept, inputs).clone()
    value = math.nan if "NaN" in reason else math.inf
    sums = numbers(device, value if "product" in reason else 1.0, value if "square" in reason else 2.0)
    found_inf = torch.ones((), device=device) if reason == "found_inf" else None
    stats = numbers(device, 1, 1, 1, 1, 0) if with_stats else None
    assert project(backend, inputs, kept, sums, stats, scale, found_inf) == 0
    assert identical(outside(kept, inputs), untouched)


@every_pair(dtype__stored=KEPT)
def test_a_direction_is_orthogonal_to_the_first_gradient(backend, dtype, stored):
    """The ops one after another, as a step calls them."""
    backend, device = backend
    inputs, scale = scaled_inputs("odd", dtype, device)
    kept, sums = inputs.flat(dtype=stored), numbers(device, 0, 0)
    perturb(backend, inputs, Average(), scale, 2.0, kept)
    first = doubled(slices(kept, inputs))
    for grad in inputs.grads:
        grad.add_(torch.randn_like(grad) * SCALE)
    ops.dots(backend, inputs.params, inputs.grads, inputs.offsets, kept, scale, inputs.partials, sums)
    kept_sq = project(backend, inputs, kept, sums, None, scale, None)
    v = [k.cpu().double() for k in slices(kept, inputs)]
    sizes = [total([a * a for a in rows]).sqrt() for rows in (first, v)]
    # The share is off by what its sums are, and each element of v by its own roundings and by how it is stored.
    second = total([g.double() ** 2 for g in unscaled(inputs)]).sqrt()
    bound = (2 * SUMMANDS + 12) * unit(inputs.state_dtype) * 2 * second + unit(kept.dtype) * sizes[1]
    assert total([a * b for a, b in zip(first, v, strict=True)]).abs() <= bound * sizes[0]
    assert (kept_sq.cpu().sqrt() - sizes[1]).abs() <= SUMMANDS * unit(inputs.state_dtype) * sizes[1]
