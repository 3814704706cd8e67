"""The updates that reuse a second gradient, on every backend; and the calls of all ops of the reuse."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fsam_ext.backends import ops, reference
from fsam_ext.step import held

from .conformance import BACKENDS, DEVICE, HALVES, LAYOUTS, Inputs, copied, every_pair, identical, load, slices
from .test_mixed_precision import identical_but_nan, like, positions, written_by_others
from .test_ops import DISPATCHED, REUSING, _tensors, assert_refused, replaced, reusing_calls
from .test_reuse_ops import FEW_LAYOUTS, KEPT, numbers, project, scaled_inputs, unscaled

# numpy, in Triton's interpreter, warns of what a GPU does without a word.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request):
    return load(request.param)


# ---- The updates -----------------------------------------------------------------------------------------------------

UPDATES = ("sgd", "momentum", "adam", "adamw")
REUSE, EPS = 0.3, 0.25  # so large that it shows
LENGTH = REUSE * math.sqrt(2.0) / (math.sqrt(3.0) + EPS)


class Update:
    """A call of a fused base, with state of its own."""

    def __init__(self, inputs: Inputs, params: list[Tensor], grads: list[Tensor], backup: Tensor | None) -> None:
        self.params, self.backup, self.device = params, backup, inputs.device
        self.where = (params, grads, inputs.offsets)
        self.state = [inputs.flat(0.1), inputs.flat(0.1).square_()]
        self.corrections = torch.full((len(params), 2), 0.3, dtype=inputs.state_dtype, device=inputs.device)
        self.stats = numbers(self.device, 1, 1, 1, 1, 0)
        self.found_inf = torch.zeros((), device=self.device)
        self.scale: Tensor | None = None
        self.rounding: Tensor | None = None
        self.adopts = False
        self.reuse: tuple = (None, None, 0.0, 0.0)
        self.journal = torch.zeros(1, dtype=torch.int64)

    def reusing(self, v: Tensor, grad_sq: float = 2.0, v_sq: float = 3.0) -> Update:
        self.reuse = (v, numbers(self.device, grad_sq, v_sq), REUSE, EPS)
        return self

    def run(self, backend: Any, op: str) -> None:
        predicates = (self.stats, self.scale, self.found_inf)
        rest = (self.rounding, self.adopts, self.journal, *self.reuse)
        first, second = self.state
        if op in ("sgd", "momentum"):
            buffer, momentum = (None, 0.0) if op == "sgd" else (first, 0.9)
            options = (0.05, None, momentum, 0.1 * (op == "momentum"), 0.1, False, op == "sgd")
            ops.restore_sgd(backend, *self.where, self.backup, buffer, *predicates, *options, *rest)
        else:
            options = (0.05, None, 0.9, 0.99, 1e-8, 0.1, op == "adamw", op == "adamw")
            where = (*self.where, self.backup, first, second, self.corrections)
            ops.restore_adam(backend, *where, *predicates, *options, *rest)

    def written(self) -> list[Tensor]:
        return [*self.params, *self.state, *([] if self.backup is None else [self.backup]), self.journal]


def pair(inputs: Inputs, params: list[Tensor], grads: list[Tensor], backup: Tensor | None) -> list[Update]:
    """Two calls that begin alike, each with tensors of its own; the first works on ``params``."""
    calls = [Update(inputs, params, inputs.grads, backup), Update(inputs, copied(params), grads, copied(backup))]
    calls[1].state = copied(calls[0].state)
    return calls


@every_pair(
    layout=LAYOUTS,
    dtype__stored=[(torch.float64, None), (torch.float32, None), (torch.float32, torch.bfloat16)],
    with_backup=[True, False],
    op=UPDATES,
)
def test_an_update_is_of_the_gradient_and_its_share_of_the_direction(backend, layout, dtype, stored, with_backup, op):
    """Bit for bit the plain update of g + length v."""
    backend, device = backend
    inputs, scale = scaled_inputs(layout, dtype, device)
    v = inputs.flat(0.1, dtype=stored)
    length = torch.tensor(LENGTH, dtype=dtype, device=device)
    summed = [
        torch.empty_like(p).copy_(g + length * part.to(dtype))
        for p, g, part in zip(inputs.params, unscaled(inputs), slices(v, inputs), strict=True)
    ]
    backup = inputs.flat(dtype=dtype) if with_backup else None
    reusing, plain = pair(inputs, inputs.params, summed, backup)
    reusing.scale = scale
    before = copied([v, *inputs.grads])

    reusing.reusing(v).run(backend, op)
    plain.run(backend, op)

    assert all(map(identical, reusing.written(), plain.written()))
    assert all(map(identical, before, [v, *inputs.grads])), "wrote to what it reuses"


@every_pair(layout=LAYOUTS, dtype=HALVES, stored=[None, torch.bfloat16], op=UPDATES)
def test_with_masters_an_update_is_that_of_float32(backend, layout, dtype, stored, op):
    """Bit for bit, after the masters have adopted what others wrote."""
    backend, device = backend
    inputs, scale = scaled_inputs(layout, dtype, device)
    v, masters = inputs.flat(0.1, dtype=stored), inputs.masters()
    expected = written_by_others(inputs, masters)
    wide = like(inputs.params, slices(expected, inputs), torch.float32)
    mine, float32 = pair(inputs, inputs.params, like(inputs.params, inputs.grads, torch.float32), masters)
    float32.params, float32.backup, float32.where = wide, None, (wide, *float32.where[1:])
    for call in (mine, float32):
        call.scale, call.adopts = scale, True
        call.reusing(v).run(backend, op)
    assert all(map(identical_but_nan, inputs.params, [w.to(dtype) for w in wide]))
    assert all(map(identical_but_nan, slices(masters, inputs), wide))
    assert all(map(identical_but_nan, mine.state, float32.state))


@every_pair(layout=LAYOUTS, dtype=HALVES, stored=[None, torch.bfloat16], stochastic=[False, True], op=UPDATES)
def test_without_masters_an_update_is_rounded_once(backend, layout, dtype, stored, stochastic, op):
    """What a call with masters leaves in them, rounded to nearest or with storage.h's random bits."""
    backend, device = backend
    inputs, scale = scaled_inputs(layout, dtype, device)
    v = inputs.flat(0.1, dtype=stored)
    masters = torch.zeros(inputs.numel, device=device)
    for part, param in zip(slices(masters, inputs), inputs.params, strict=True):
        part.copy_(param)
    mine, exact = pair(inputs, inputs.params, inputs.grads, None)
    exact.backup = masters
    mine.rounding = torch.tensor([5, 2**33], dtype=torch.int64, device=device) if stochastic else None
    for call in (mine, exact):
        call.scale = scale
        call.reusing(v).run(backend, op)
    for w, x, at in zip(inputs.params, slices(masters, inputs), positions(inputs), strict=True):
        rounded = x.to(dtype)
        if stochastic:
            bits = reference.random_bits(at, mine.rounding.cpu())
            rounded = reference.stochastically_rounded(x.cpu(), dtype, bits)
        assert identical(w, rounded)
    assert all(map(identical, mine.state, exact.state))


@every_pair(
    layout=FEW_LAYOUTS,
    dtype__stored=KEPT,
    squares=[(math.inf, 3.0), (math.nan, 3.0), (2.0, math.inf), (2.0, math.nan), (2.0, 0.0), (0.0, 0.0)],
    op=["momentum", "adamw"],
)
def test_without_a_direction_an_update_is_the_plain_one(backend, layout, dtype, stored, squares, op):
    """Whatever lies where the direction would: `project` may have left anything."""
    backend, device = backend
    inputs = Inputs(layout, dtype, device)
    v = torch.full_like(inputs.flat(dtype=stored), math.nan)
    for part in slices(v, inputs)[::2]:
        part.fill_(math.inf)
    inputs.grads[-1].fill_(-0.0)
    reusing, plain = pair(inputs, inputs.params, inputs.grads, inputs.flat(dtype=dtype))
    reusing.reusing(v, *squares).run(backend, op)
    plain.run(backend, op)
    assert all(map(identical, reusing.written(), plain.written()))


@every_pair(layout=FEW_LAYOUTS, dtype__stored=KEPT, reason=["stats", "found_inf"], op=["momentum", "adamw"])
def test_a_skipped_update_reuses_nothing(backend, layout, dtype, stored, reason, op):
    backend, device = backend
    inputs = Inputs(layout, dtype, device)
    backup = inputs.flat(dtype=dtype)
    reusing, plain = pair(inputs, inputs.params, inputs.grads, backup)
    for call in (reusing, plain):
        call.stats[0] = math.nan if reason == "stats" else 1.0
        call.found_inf.fill_(reason == "found_inf")
    state = copied(reusing.state)
    reusing.reusing(inputs.flat(dtype=stored)).run(backend, op)
    plain.run(backend, op)
    assert all(map(identical, reusing.written(), plain.written())) and all(map(identical, state, reusing.state))
    assert all(map(identical, inputs.params, slices(backup, inputs)))


# ---- Calls -----------------------------------------------------------------------------------------------------------


@every_pair(op=[op for op in REUSING if op != "dots"], skipped=[False, True])
def test_the_journal_counts_a_call(backend, op, skipped):
    backend, device = backend
    call = reusing_calls(Inputs("odd", torch.float32, device), None)[op]
    names = list(inspect.signature(getattr(ops, op)).parameters)[1:]
    stats = numbers(device, math.nan if skipped else 1.0, 1, 1, 1, 0)
    call = replaced(op, call, {"stats": stats})
    getattr(backend, op)(*call)
    assert call[names.index("journal")].item() == 1


def test_no_rows_have_no_sums(backend):
    backend, device = backend
    inputs = Inputs("odd", torch.float32, device)
    inputs.params, inputs.grads, inputs.offsets = [], [], inputs.offsets[:0]
    ema, kept, sums, one = inputs.flat(), inputs.flat(), numbers(device, 5, 5), numbers(device, 5)
    where = (inputs.params, inputs.grads, inputs.offsets)
    ops.update_ema(backend, *where, ema, None, None, None, None, 0.9, None, inputs.partials, one)
    ops.dots(backend, *where, kept, None, inputs.partials, sums)
    assert one.item() == 0 and sums.tolist() == [0, 0]
    assert project(backend, inputs, kept, sums, None, None, None) == 0
    assert project(backend, inputs, kept, sums, numbers(device, math.nan, 1, 1, 1, 0), None, None).isnan()


def short(tensor: Tensor) -> Tensor:
    return tensor[: tensor.numel() // 4]


def strided(flat: Tensor) -> Tensor:
    return flat.repeat_interleave(2)[::2]


def without(_: Any) -> None:
    return None


# what: (op, {argument: what becomes of it}, message, dtype of the parameters where it is not float32)
MISFITS = {
    "a short buffer": ("perturb", {"kept": short}, "kept must be a contiguous float32 tensor of at least"),
    "a strided buffer": ("dots", {"kept": strided}, "kept must be a contiguous float32"),
    "a buffer of half": ("project", {"kept": Tensor.half}, r"kept must be float32 or bfloat16 \(float64 for float64"),
    "a buffer of double": ("perturb", {"kept": Tensor.double}, "kept must be float32 or bfloat16"),
    "a bfloat16 buffer of float64": ("dots", {"kept": Tensor.bfloat16}, "kept must be float32 or", torch.float64),
    "a short bfloat16 buffer": (
        "project",
        {"kept": lambda k: short(k).bfloat16()},
        "kept must be a contiguous bfloat16 tensor of at least",
    ),
    "a norm without partials": ("update_ema", {"partials": without}, "grad_sq needs partials"),
    "few partials of a norm": ("update_ema", {"partials": lambda p: p[:2]}, "partials must be"),
    "a float32 norm": ("update_ema", {"grad_sq": Tensor.float}, "grad_sq must be a contiguous float64"),
    "an empty norm": ("update_ema", {"grad_sq": lambda s: s[:0]}, "grad_sq must be .* of at least 1"),
    "few partials of products": ("dots", {"partials": lambda p: p[:9]}, "partials must be"),
    "float64 partials": ("dots", {"partials": Tensor.double}, "partials must be a contiguous float32"),
    "float32 sums": ("dots", {"sums": Tensor.float}, "sums must be a contiguous float64"),
    "one sum": ("dots", {"sums": lambda s: s[:1]}, "sums must be .* of at least 2"),
    "float32 sums to read": ("project", {"sums": Tensor.float}, "sums must be a contiguous float64"),
    "one sum to read": ("project", {"sums": lambda s: s[:1]}, "sums must be .* of at least 2"),
    "few partials of a direction": ("project", {"partials": lambda p: p[:2]}, "partials must be"),
    "a float32 square": ("project", {"kept_sq": Tensor.float}, "kept_sq must be a contiguous float64"),
    "integer stats": ("project", {"stats": Tensor.int}, "stats must be a contiguous"),
    "an int32 journal": ("project", {"journal": Tensor.int}, "journal must be a contiguous int64"),
    "a gradient of another shape": (
        "dots",
        {"grads": lambda gs: [gs[0], gs[1][1:], *gs[2:]]},
        r"grads\[1\] has another",
    ),
    "a short direction": ("restore_sgd", {"reused": short}, "reused must be a contiguous float32 tensor of at least"),
    "a direction of half": ("restore_adam", {"reused": Tensor.half}, "reused must be float32 or bfloat16"),
    "a bfloat16 direction of float64": (
        "restore_sgd",
        {"reused": Tensor.bfloat16},
        "reused must be float32 or bfloat16",
        torch.float64,
    ),
    "a direction without squares": ("restore_adam", {"reuse_sq": without}, "reused needs reuse_sq"),
    "one square": ("restore_sgd", {"reuse_sq": lambda s: s[:1]}, "reuse_sq must be .* of at least 2"),
    "float32 squares": ("restore_adam", {"reuse_sq": Tensor.float}, "reuse_sq must be a contiguous float64"),
}


@every_pair(misfit=MISFITS, name=DISPATCHED)
def test_arguments_that_do_not_fit_change_nothing(name, misfit):
    op, wrong, message, *dtype = MISFITS[misfit]
    call = reusing_calls(Inputs("odd", *(dtype or [torch.float32]), DEVICE[name]), None)[op]
    assert_refused(name, op, call, wrong, message)


@every_pair(op=REUSING, name=["cpu", "cuda_emulated"])
def test_parameters_may_be_held(name, op, monkeypatch):
    """csrc/held.h, NOTE [held parameters]."""
    monkeypatch.setattr(held, "FEWEST", 1)
    inputs = Inputs("odd", torch.float32)
    listed = reusing_calls(inputs, torch.bfloat16)[op]
    holding = copied(list(listed))
    holding[2] = listed[2].clone()
    params = [Parameter(param) for param in holding[0]]
    for param, grad in zip(params, holding[1], strict=True):
        param.grad = grad
    look = held.look_at(params, holding[2])
    assert type(look) is held.Held
    run = getattr(BACKENDS[name](), op)
    run(*listed)
    with torch.no_grad():
        run([], [], *holding[2:])
    assert all(map(identical, listed[0], params))
    for a, b in zip(_tensors(list(listed[2:])), _tensors(holding[2:]), strict=True):
        assert identical(a, b)
    del look
