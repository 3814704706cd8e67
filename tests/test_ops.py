"""The ops as torch sees them: schemas, fake kernels, torch.compile, and arguments that do not fit."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from torch.library import opcheck

from fsam_ext import backends
from fsam_ext.backends import ops

from .conformance import BACKENDS, DEVICE, Inputs, copied, identical

# Backends that are registered with torch's dispatcher.
DISPATCHED = [name for name in BACKENDS if name != "reference"]


def calls(inputs: Inputs) -> dict[str, tuple]:
    """A valid call of every op."""
    device = inputs.device
    stats = torch.ones(ops.STATISTICS, dtype=torch.float64, device=device)
    steps = torch.ones(len(inputs.params), device=device)
    index = torch.arange(len(inputs.params), device=device)
    corrections = torch.ones(len(inputs.params), 2, dtype=inputs.state_dtype, device=device)
    params, grads, offsets = inputs.params, inputs.grads, inputs.offsets
    flat, backup, scale = inputs.flat, inputs.flat(dtype=inputs.dtype), torch.ones((), device=device)
    scratch = (inputs.partials, inputs.stats)
    sums, one_sum = (torch.zeros(numel, dtype=torch.float64, device=device) for numel in (2, 1))
    effect = torch.zeros(ops.EFFECT * inputs.chunks, dtype=inputs.state_dtype, device=device)
    journal = torch.zeros(1, dtype=torch.int64)
    forward = ops.FORWARD[None if inputs.dtype == torch.float64 else torch.bfloat16]
    return {
        "noise_norm": (params, grads, offsets, flat(), None, scale, 1.0, 0.9, True, False, *scratch),
        "perturb": (
            *(params, grads, offsets, flat(), None, backup, stats, None),
            *(0.1, None, 1.0, 0.9, 1e-12, False, True, True, forward, effect, journal, None),
        ),
        "update_ema": (params, grads, offsets, flat(), None, stats, scale, None, 0.9, journal, None, None),
        "dots": (params, grads, offsets, flat(), scale, inputs.partials, sums),
        "project": (params, grads, offsets, flat(), sums + 1, stats, scale, None, inputs.partials, one_sum, journal),
        "restore": (params, offsets, backup),
        "restore_sgd": (
            *(params, grads, offsets, backup, flat(), stats, scale, None),
            *(0.1, None, 0.9, 0.0, 0.0, True, False, None, False, journal, None, None, 0.0, 0.0),
        ),
        "count_steps": (steps, index, corrections, stats, None, 0.1, scale, 0.9, 0.99, journal),
        "restore_adam": (
            *(params, grads, offsets, backup, flat(), flat().square_(), corrections, stats, None, scale),
            *(0.1, scale, 0.9, 0.99, 1e-8, 0.0, True, False, None, False, journal, None, None, 0.0, 0.0),
        ),
    }


def reusing_calls(inputs: Inputs, stored: torch.dtype | None) -> dict[str, tuple]:
    """The ops with all that the reuse of the second gradient adds, kept as ``stored`` (None: as the state)."""
    kept = {"kept": inputs.flat(dtype=stored)}
    squares = torch.tensor([2.0, 3.0], dtype=torch.float64, device=inputs.device)
    reused = {"reused": inputs.flat(dtype=stored), "reuse_sq": squares, "reuse": 0.3, "reuse_eps": 1e-12}
    changed = {
        "perturb": kept,
        "update_ema": {"partials": inputs.partials, "grad_sq": torch.zeros_like(squares[:1])},
        "dots": kept,
        "project": kept,
        "restore_sgd": reused,
        "restore_adam": reused,
    }
    plain = calls(inputs)
    return {op: replaced(op, plain[op], changes) for op, changes in changed.items()}


def mixed_calls(inputs: Inputs, stored: torch.dtype) -> dict[str, tuple]:
    """The same for 16-bit parameters, with an average stored as ``stored`` and with masters or stochastic rounding."""
    average = inputs.average(stored, unset=True)
    masters = inputs.masters()
    rounding = torch.tensor([3, 4], dtype=torch.int64, device=inputs.device)
    changed = {
        "noise_norm": {"ema": average.ema, "ema_scale": average.scale},
        "perturb": {"ema": average.ema, "ema_scale": average.scale, "backup": masters},
        "update_ema": {"ema": average.ema, "ema_scale": average.scale},
        "restore": {"backup": masters},
        "restore_sgd": {"rounding": rounding},
        "restore_adam": {"backup": masters, "adopts": True},
    }
    plain = calls(inputs)
    return {op: replaced(op, plain[op], changed.get(op, {})) for op in plain}


def replaced(op: str, call: tuple, changes: dict[str, Any]) -> tuple:
    """The call with other values for the arguments of these names."""
    names = list(inspect.signature(getattr(ops, op)).parameters)[1:]
    assert changes.keys() <= set(names)
    return tuple(changes.get(name, argument) for name, argument in zip(names, call, strict=True))


def call_of(op: str, kind: str, device: str) -> tuple:
    if kind == "mixed":
        return mixed_calls(Inputs("odd", torch.bfloat16, device, alignment=ops.QUANTIZED), torch.int8)[op]
    inputs = Inputs("odd", torch.float32, device)
    return (calls(inputs) if kind == "float32" else reusing_calls(inputs, torch.bfloat16))[op]


REUSING = ("perturb", "update_ema", "dots", "project", "restore_sgd", "restore_adam")
EVERY_CALL = [*itertools.product(ops.NAMES, ("float32", "mixed")), *((op, "reusing") for op in REUSING)]


@pytest.mark.parametrize("op, kind", EVERY_CALL)
@pytest.mark.parametrize("name", DISPATCHED)
def test_opcheck(name, op, kind):
    opcheck(getattr(BACKENDS[name](), op), call_of(op, kind, DEVICE[name]))


@pytest.mark.parametrize("op, kind", EVERY_CALL)
@pytest.mark.parametrize("name", [name for name in DISPATCHED if name != "cuda_emulated"])  # registered as cpu's are
def test_compile_fullgraph(name, op, kind):
    """A compiled function that calls an op mutates the same tensors to the same bits."""
    torch._dynamo.reset()  # its limit of recompilations counts all parametrisations together
    run = getattr(BACKENDS[name](), op)
    eager = call_of(op, kind, DEVICE[name])
    compiled = copied(list(eager))
    names = list(inspect.signature(getattr(ops, op)).parameters)[1:]
    if "offsets" in names:
        compiled[names.index("offsets")] = eager[names.index("offsets")]

    def twice(arguments):
        run(*arguments)
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


def strided(tensor):
    return torch.zeros(2 * tensor.numel(), dtype=tensor.dtype)[::2].view(tensor.shape)


def second(wrong):
    """A change of the second tensor of a list."""
    return lambda tensors: [tensors[0], wrong(tensors[1]), *tensors[2:]]


def int8(average):
    return average.to(torch.int8)


def scales(numel):
    return lambda _: torch.ones(numel)


# what: (op, {argument: what becomes of it}, message, dtype of the parameters where it is not float32)
MISFITS = {
    "params[1] of another dtype": ("perturb", {"params": second(torch.Tensor.double)}, r"params\[1\].*dtype"),
    "params[1] with gaps": ("restore", {"params": second(strided)}, r"params\[1\] has gaps"),
    "a gradient less": ("perturb", {"grads": lambda grads: grads[1:]}, r"7 params but 6 grads"),
    "grads[1] of another shape": ("perturb", {"grads": second(lambda g: g[1:])}, r"grads\[1\] has another shape"),
    "grads[1] of another dtype": ("noise_norm", {"grads": second(torch.Tensor.double)}, r"grads\[1\].*dtype"),
    "integer parameters": (
        "restore",
        {"params": lambda params: [p.int() for p in params]},
        r"params\[0\] must be float64, float32",
    ),
    "an offset less": ("restore", {"offsets": lambda o: o[1:]}, "offsets must be"),
    "int32 offsets": ("restore", {"offsets": torch.Tensor.int}, "offsets must be a contiguous int64"),
    "negative offsets": ("restore", {"offsets": lambda o: o - 10**6}, "offsets must not be negative"),
    "a short backup": ("restore", {"backup": lambda b: b[:100]}, "backup must be a contiguous float32 tensor of at"),
    "a backup of another dtype": ("restore", {"backup": torch.Tensor.double}, "backup must be"),
    "masters of float64": ("restore", {"backup": torch.Tensor.float}, "backup must be", torch.float64),
    "short masters": ("restore_sgd", {"backup": lambda b: b[:100].float()}, "backup must be", torch.bfloat16),
    "masters of the other 16-bit dtype": ("perturb", {"backup": torch.Tensor.half}, "backup must be", torch.bfloat16),
    "a short average": ("noise_norm", {"ema": lambda m: m[:100]}, "ema must be"),
    "a strided average": ("perturb", {"ema": lambda m: m.repeat_interleave(2)[::2]}, "ema must be a contiguous"),
    "an average of another dtype": ("update_ema", {"ema": torch.Tensor.half}, "ema must be float32, bfloat16 or int8"),
    "a compressed average of float64": (
        "perturb",
        {"ema": torch.Tensor.bfloat16},
        r"ema must be float32, bfloat16 or int8 \(float64 for float64",
        torch.float64,
    ),
    "an int8 average of float64": (
        "noise_norm",
        {"ema": int8, "ema_scale": scales(1000)},
        r"\(float64 for float64",
        torch.float64,
    ),
    "an int8 average without scales": ("noise_norm", {"ema": int8}, "an int8 ema needs ema_scale"),
    "an int8 average between blocks": (
        "update_ema",
        {"ema": int8, "ema_scale": scales(1000)},
        "each offset must be a multiple of 128",
    ),
    "few scales": (
        "perturb",
        {"ema": lambda m: int8(m.repeat(4)), "ema_scale": scales(8), "offsets": lambda o: o // 128 * 128},
        "ema_scale must be a contiguous float32",
    ),
    "float64 scales": (
        "perturb",
        {"ema": int8, "ema_scale": lambda _: torch.ones(1000).double(), "offsets": lambda o: o // 128 * 128},
        "ema_scale must be a contiguous float32",
    ),
    "a short momentum buffer": ("restore_sgd", {"momentum_buffer": lambda m: m[:100]}, "momentum_buffer must be"),
    "a short second moment": ("restore_adam", {"exp_avg_sq": lambda v: v[:100]}, "exp_avg_sq must be"),
    "a correction less": ("restore_adam", {"corrections": lambda c: c[1:]}, "corrections must be"),
    "corrections of another dtype": ("restore_adam", {"corrections": torch.Tensor.double}, "corrections must be"),
    "float64 steps": ("count_steps", {"steps": torch.Tensor.double}, "steps must be a contiguous float32"),
    "an int32 index": ("count_steps", {"index": torch.Tensor.int}, "index must be a contiguous int64"),
    "a row without a member": ("count_steps", {"index": lambda i: i[1:]}, r"shape \[rows, 2\] with at most .*, 6"),
    "flat corrections": ("count_steps", {"corrections": torch.Tensor.flatten}, r"corrections must have the shape"),
    "16-bit corrections": ("count_steps", {"corrections": torch.Tensor.half}, "corrections must be a contiguous float"),
    "integer stats": ("count_steps", {"stats": torch.Tensor.int}, "stats must be a contiguous"),
    "an integer learning rate": ("count_steps", {"lr_tensor": torch.Tensor.int}, "lr_tensor must be"),
    "float rounding": ("restore_sgd", {"rounding": scales(2)}, "rounding must be a contiguous int64"),
    "a seed without a step": (
        "restore_adam",
        {"rounding": lambda _: torch.ones(1, dtype=torch.int64)},
        "rounding must be a contiguous int64 tensor of at least 2",
        torch.bfloat16,
    ),
    "a short effect": ("perturb", {"effect": lambda e: e[:2]}, "effect must be"),
    "another forward": ("perturb", {"forward": lambda _: 3}, "forward must be 0"),
    "a narrower forward of float64": ("perturb", {"forward": lambda _: 1}, "and 0 for float64", torch.float64),
    "few partials": ("noise_norm", {"partials": lambda p: p[:5]}, "partials must be"),
    "float32 stats": ("perturb", {"stats": torch.Tensor.float}, "stats must be a contiguous float64"),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("name", DISPATCHED)
def test_arguments_that_do_not_fit_change_nothing(name, misfit):
    op, wrong, message, *dtype = MISFITS[misfit]
    call = calls(Inputs("odd", *(dtype or [torch.float32]), DEVICE[name]))[op]
    assert_refused(name, op, call, wrong, message)


def assert_refused(name, op, call, wrong, message):
    """A backend refuses a call with some arguments changed, and has written nothing."""
    right = dict(zip(list(inspect.signature(getattr(ops, op)).parameters)[1:], call, strict=True))
    call = replaced(op, call, {argument: change(right[argument]) for argument, change in wrong.items()})
    before = copied(list(call))
    with pytest.raises(RuntimeError, match=message):
        getattr(BACKENDS[name](), op)(*call)
    for a, b in zip(_tensors(before), _tensors(call), strict=True):
        assert identical(a, b)


@pytest.mark.parametrize("position", [-1, 7])
def test_a_position_outside_the_counts_changes_nothing_on_the_cpu(position):
    call = calls(Inputs("odd", torch.float32))["count_steps"]
    call[1][3] = position
    before = copied(list(call))
    with pytest.raises(RuntimeError, match=rf"index\[3\] is {position}, which is no position in the 7 steps"):
        BACKENDS["cpu"]().count_steps(*call)
    assert all(map(identical, _tensors(before), _tensors(call)))


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


def test_a_gpu_that_no_backend_serves_is_refused_with_every_reason(monkeypatch):
    monkeypatch.delenv("FSAM_BACKEND", raising=False)
    gpu = torch.device("cuda")
    for name in ("cuda", "triton"):
        monkeypatch.setitem(backends.CANDIDATES, name, lambda device, name=name: (None, f"no {name} here"))
    with pytest.raises(
        RuntimeError, match="no backend serves cuda: .*no cuda here.*no triton here.*backend='reference'"
    ):
        backends.resolve(None, gpu)
    assert backends.resolve("reference", gpu) is backends.reference


def test_a_gpu_that_the_cuda_library_does_not_fit_goes_to_triton(monkeypatch):
    monkeypatch.delenv("FSAM_BACKEND", raising=False)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.fsam_ext, "cuda_driver_problem", lambda: "", raising=False)
    served = backends._compiled("cuda", None, backends._misfit_of_cuda)
    monkeypatch.setitem(backends.CANDIDATES, "cuda", served)
    monkeypatch.setitem(backends.CANDIDATES, "triton", lambda device: ("triton's", None))
    for capability, fits in (((7, 0), False), ((7, 5), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert (backends.resolve(None, gpu) == "triton's") == (not fits)
        if not fits:
            with pytest.raises(RuntimeError, match=r"need compute capability 7\.5, and cuda:0 has 7\.0"):
                backends.resolve("cuda", gpu)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backends.resolve(None, gpu) == "triton's"


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
