"""The ops as torch sees them: schemas, fake kernels, torch.compile, and arguments that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fsam_ext import backends, ops

from .conformance import BACKENDS, DEVICE, Inputs, copied, identical

# Backends that are registered with torch's dispatcher.
DISPATCHED = [name for name in BACKENDS if name != "reference"]


def calls(inputs: Inputs) -> dict[str, tuple]:
    """A valid call of every op."""
    device = inputs.device
    stats = torch.ones(ops.STATISTICS, dtype=torch.float64, device=device)
    steps = torch.ones(len(inputs.params), device=device)
    params, grads, offsets = inputs.params, inputs.grads, inputs.offsets
    flat, backup, scale = inputs.flat, inputs.flat(dtype=inputs.dtype), torch.ones((), device=device)
    scratch = (inputs.partials, inputs.stats)
    return {
        "noise_norm": (params, grads, offsets, flat(), scale, 1.0, 0.9, True, False, *scratch),
        "perturb": (params, grads, offsets, flat(), backup, stats, None, 0.1, None, 1.0, 0.9, 1e-12, False, True),
        "restore": (params, offsets, backup),
        "restore_sgd": (
            *(params, grads, offsets, backup, flat(), stats, scale, None),
            *(0.1, None, 0.9, 0.0, 0.0, True, False),
        ),
        "restore_adam": (
            *(params, grads, offsets, backup, flat(), flat().square_(), steps, stats, None, scale),
            *(0.1, scale, 0.9, 0.99, 1e-8, 0.0, True, False),
        ),
    }


@pytest.mark.parametrize("op", ops.NAMES)
@pytest.mark.parametrize("name", DISPATCHED)
def test_opcheck(name, op):
    overload = getattr(BACKENDS[name](), op)
    opcheck(overload, calls(Inputs("odd", torch.float32, DEVICE[name]))[op])


@pytest.mark.parametrize("op", ops.NAMES)
@pytest.mark.parametrize("name", DISPATCHED)
def test_compile_fullgraph(name, op):
    """A compiled function that calls an op mutates the same tensors to the same bits."""
    torch._dynamo.reset()  # its limit of recompilations counts all parametrisations together
    overload = getattr(BACKENDS[name](), op)
    eager = calls(Inputs("odd", torch.float32, DEVICE[name]))[op]
    compiled = copied(list(eager))
    compiled[2 if op != "restore" else 1] = eager[2 if op != "restore" else 1]

    def twice(arguments):
        overload(*arguments)
        return arguments[0][0] * 2

    expected = twice(list(eager))
    result = torch.compile(twice, fullgraph=True, backend="aot_eager")(compiled)
    assert identical(result, expected)
    for a, b in zip(_tensors(list(eager)), _tensors(compiled), strict=True):
        assert identical(a, b)


def _tensors(arguments):
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, list):
            yield from argument


def replaced(call: tuple, position: int, value) -> list:
    return [value if i == position else argument for i, argument in enumerate(call)]


def strided(tensor):
    return torch.zeros(2 * tensor.numel(), dtype=tensor.dtype)[::2].view(tensor.shape)


MISFITS = {
    "params[1] of another dtype": (
        "perturb",
        0,
        lambda c: [c[0][0], c[0][1].double(), *c[0][2:]],
        r"params\[1\].*dtype",
    ),
    "params[1] with gaps": ("restore", 0, lambda c: [c[0][0], strided(c[0][1]), *c[0][2:]], r"params\[1\] has gaps"),
    "a gradient less": ("perturb", 1, lambda c: c[1][1:], r"7 params but 6 grads"),
    "grads[1] of another shape": (
        "perturb",
        1,
        lambda c: [c[1][0], c[1][2], *c[1][2:]],
        r"grads\[1\] has another shape",
    ),
    "grads[0] of another dtype": ("noise_norm", 1, lambda c: [c[1][0].double(), *c[1][1:]], r"grads\[0\].*dtype"),
    "integer parameters": ("restore", 0, lambda c: [p.int() for p in c[0]], r"params\[0\] must be float64, float32"),
    "an offset less": ("restore", 1, lambda c: c[1][1:], "offsets must be"),
    "int32 offsets": ("restore", 1, lambda c: c[1].int(), "offsets must be a contiguous int64"),
    "negative offsets": ("restore", 1, lambda c: c[1] - 10**6, "offsets must not be negative"),
    "a short backup": ("restore", 2, lambda c: c[2][:100], "backup must be a contiguous buffer of at least"),
    "a backup of another dtype": ("restore", 2, lambda c: c[2].double(), "backup must be"),
    "a short average": ("noise_norm", 3, lambda c: c[3][:100], "ema must be"),
    "a strided average": ("perturb", 3, lambda c: c[3].repeat_interleave(2)[::2], "ema must be a contiguous"),
    "a short momentum buffer": ("restore_sgd", 4, lambda c: c[4][:100], "momentum_buffer must be"),
    "a short second moment": ("restore_adam", 5, lambda c: c[5][:100], "exp_avg_sq must be"),
    "a step count less": ("restore_adam", 6, lambda c: c[6][1:], "steps must be"),
    "few partials": ("noise_norm", 9, lambda c: c[9][:5], "partials must be"),
    "float32 stats": ("perturb", 5, lambda c: c[5].float(), "stats must be a contiguous float64"),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("name", DISPATCHED)
def test_arguments_that_do_not_fit_change_nothing(name, misfit):
    op, position, wrong, message = MISFITS[misfit]
    call = calls(Inputs("odd", torch.float32, DEVICE[name]))[op]
    call = replaced(call, position, wrong(call))
    before = copied(list(call))
    with pytest.raises(RuntimeError, match=message):
        getattr(BACKENDS[name](), op)(*call)
    for a, b in zip(_tensors(before), _tensors(call), strict=True):
        assert identical(a, b)


@pytest.mark.parametrize("name", DISPATCHED)
def test_no_rows_at_all(name):
    inputs = Inputs("odd", torch.float32, DEVICE[name])
    inputs.params, inputs.grads, inputs.offsets = [], [], inputs.offsets[:0]
    for op, call in calls(inputs).items():
        if op == "noise_norm":
            continue  # without a row no tensor tells the dispatcher a device; the optimizer makes no such call
        getattr(BACKENDS[name](), op)(*call)


def test_backend_choice(monkeypatch):
    cpu = torch.device("cpu")
    assert backends.resolve(None, cpu) is not backends.reference
    assert backends.resolve("reference", cpu) is backends.reference
    monkeypatch.setenv("FSAM_BACKEND", "reference")
    assert backends.resolve(None, cpu) is backends.reference
    assert backends.resolve("cpu", cpu) is not backends.reference
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot serve cuda:0: it serves cpu tensors only"):
        backends.resolve("cpu", torch.device("cuda:0"))
    monkeypatch.setenv("FSAM_BACKEND", "abacus")
    with pytest.raises(ValueError, match="must be one of"):
        backends.resolve(None, cpu)


def test_falling_back_to_the_reference_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_logged", set())
    for name in ("cpu", "triton"):
        monkeypatch.setitem(backends.CANDIDATES, name, lambda device: (None, "it was not built"))
    for _ in range(2):
        assert backends.resolve(None, torch.device("cpu")) is backends.reference
    assert [record.message for record in caplog.records] == [
        record.message for record in caplog.records if "backend 'cpu': it was not built" in record.message
    ]
    assert len(caplog.records) == 1
