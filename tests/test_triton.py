"""The Triton backend beyond conformance: its ops in torch's eyes, its tables, its errors, and the code it compiles to.

Without a GPU the kernels run in Triton's interpreter (see conftest.py), which executes the same lines of Python that
the compiler sees, and the compiler itself runs ahead of time for GPUs that are not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from bench.sass import binary  # noqa: E402
from fsam_ext import _library, ops  # noqa: E402
from fsam_ext.backends import reference  # noqa: E402
from fsam_ext.backends import triton as backend  # noqa: E402
from fsam_ext.backends.triton import kernels, launch, passes, rows, tables  # noqa: E402

DEVICE = "cpu" if backend.INTERPRETED else "cuda"
NAMESPACE = getattr(torch.ops, backend.NAMESPACE)
NEEDS_SASS = pytest.mark.skipif(binary.missing_tools() is not None, reason=str(binary.missing_tools()))
NEEDS_CPU_LIBRARY = pytest.mark.skipif(_library.CPU_REASON is not None, reason=str(_library.CPU_REASON))

# numpy, in the interpreter, warns of what a GPU does without a word.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")


def overload(name: str):
    return getattr(NAMESPACE, name).default


class Case:
    """Rows of given shapes, with all the state that the ops want."""

    def __init__(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, alignment: int = 32) -> None:
        self.params = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
        self.grads = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
        numels = [p.numel() for p in self.params]
        slices = [-(-numel // alignment) * alignment for numel in numels]
        self.offsets = torch.tensor([sum(slices[:i]) for i in range(len(slices))], dtype=torch.int64)
        self.numel = sum(slices)
        state = {"dtype": ops.compute_dtype(dtype), "device": DEVICE}
        self.ema, self.momentum, self.exp_avg = (torch.randn(self.numel, **state) for _ in range(3))
        self.exp_avg_sq = torch.rand(self.numel, **state)
        self.backup = torch.randn(self.numel, device=DEVICE).to(dtype)
        self.steps = torch.arange(float(len(shapes)), device=DEVICE)
        self.index = torch.arange(len(shapes), device=DEVICE)
        self.corrections = torch.rand(len(shapes), 2, **state) + 0.5
        self.partials = torch.full((ops.count_chunks(numels) * ops.STATISTICS,), torch.nan, **state)
        self.stats = torch.ones(ops.STATISTICS, dtype=torch.float64, device=DEVICE)
        self.one = torch.ones((), device=DEVICE)
        self.ema_scale = self.effect = self.rounding = None
        self.forward = 0

    def arguments(self, name: str) -> tuple:
        p, g, o = self.params, self.grads, self.offsets
        rate = (0.1, None)
        after = (self.stats, self.one, None, *rate)
        return {
            "noise_norm": (
                p,
                g,
                o,
                self.ema,
                self.ema_scale,
                self.one,
                0.8,
                0.9,
                True,
                False,
                self.partials,
                self.stats,
            ),
            "perturb": (
                *(p, g, o, self.ema, self.ema_scale, self.backup, self.stats, self.one),
                *(0.1, None, 0.8, 0.9, 0.0, False, True, True, self.forward, self.effect),
            ),
            "update_ema": (p, g, o, self.ema, self.ema_scale, self.stats, self.one, None, 0.9),
            "restore": (p, o, self.backup),
            "restore_sgd": (p, g, o, self.backup, self.momentum, *after, 0.9, 0.0, 0.01, True, False, self.rounding),
            "count_steps": (self.steps, self.index, self.corrections, self.stats, None, *rate, 0.9, 0.999),
            "restore_adam": (
                *(p, g, o, self.backup, self.exp_avg, self.exp_avg_sq, self.corrections, *after),
                *(0.9, 0.999, 1e-8, 0.01, True, False, self.rounding),
            ),
        }[name]

    def run(self, name: str) -> None:
        overload(name)(*self.arguments(name))


def clones(arguments):
    if isinstance(arguments, torch.Tensor):
        return arguments.clone()
    if isinstance(arguments, list | tuple):
        return type(arguments)(map(clones, arguments))
    return arguments


# ---- The ops in torch's eyes -----------------------------------------------------------------------------------------


@NEEDS_CPU_LIBRARY
@pytest.mark.parametrize("name", ops.NAMES)
def test_the_schema_is_that_of_the_compiled_ops(name):
    ours, compiled = (
        str(packet.default._schema) for packet in (getattr(NAMESPACE, name), getattr(torch.ops.fsam_ext, name))
    )
    assert ours.replace(backend.NAMESPACE, "fsam_ext") == compiled


@pytest.mark.parametrize("name", ops.NAMES)
def test_opcheck(name):
    torch.library.opcheck(overload(name), Case((5, 3), (7,)).arguments(name))


def step(params, grads, offsets, ema, backup, momentum, partials, stats):
    overload("noise_norm")(params, grads, offsets, ema, None, None, 1.0, 0.9, False, False, partials, stats)
    overload("perturb")(
        *(params, grads, offsets, ema, None, backup, stats, None),
        *(0.1, None, 1.0, 0.9, 0.0, False, False, True, 0, None),
    )
    doubled = [2 * grad for grad in grads]
    overload("restore_sgd")(
        params, doubled, offsets, backup, momentum, stats, None, None, 0.1, None, 0.9, 0.0, 0.0, False, False, None
    )
    return [param.square().sum() for param in params]


@pytest.mark.parametrize("shapes", [[(33,)], [(5, 3), (7,)]], ids=["one_row", "table"])
def test_compiled_with_fullgraph_gives_the_bits_of_eager(shapes):
    case = Case(*shapes)
    eager = (
        *(case.params, case.grads, case.offsets, case.ema, case.backup),
        *(case.momentum, case.partials, case.stats),
    )
    compiled = clones(eager)
    expected = step(*eager)
    torch._dynamo.reset()
    # aot_eager traces, functionalizes and puts the mutations back, as inductor does, without a C++ compiler.
    returned = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    torch.testing.assert_close(returned, expected, rtol=0, atol=0)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


# ---- Rows and tables -------------------------------------------------------------------------------------------------


def test_a_row_has_the_same_bits_with_and_without_a_table():
    together = Case((4100,), (3, 50))
    apart = [Case((4100,)), Case((3, 50))]
    for i, case in enumerate(apart):
        begin = int(together.offsets[i])
        case.params, case.grads = [together.params[i].clone()], [together.grads[i].clone()]
        for name in ("ema", "backup", "exp_avg", "exp_avg_sq"):
            setattr(case, name, getattr(together, name)[begin : begin + case.numel].clone())
        case.corrections = together.corrections[i : i + 1].clone()
    for name in ("noise_norm", "perturb", "restore_adam"):
        together.run(name)
        for case in apart:
            if name == "perturb":
                case.stats.copy_(together.stats)
            case.run(name)
        if name == "noise_norm":
            assert torch.equal(together.partials, torch.cat([case.partials for case in apart]))
    for i, case in enumerate(apart):
        begin = int(together.offsets[i])
        numel = case.params[0].numel()
        assert torch.equal(together.params[i], case.params[0])
        for name in ("ema", "backup", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(together, name)[begin : begin + numel], getattr(case, name)[:numel]), name


def test_one_row_builds_no_table():
    before = tables.table.cache_info().misses
    Case((100,)).run("restore")
    assert tables.table.cache_info().misses == before


def sgd_like_reference(case: Case) -> None:
    """Runs the op and asserts that it did what the reference does to the same tensors."""
    arguments = case.arguments("restore_sgd")
    expected = clones(arguments)
    # A clone may lay a gradient out anew, so strides are the original's: the reference goes by indices.
    reference.restore_sgd(*expected)
    case.run("restore_sgd")
    torch.testing.assert_close(case.params, expected[0], rtol=1e-5, atol=1e-6)


def test_the_table_is_kept_until_something_moves():
    case = Case((4, 6), (10,))
    misses = lambda: tables.table.cache_info().misses  # noqa: E731
    sgd_like_reference(case)
    first = misses()
    sgd_like_reference(case)
    assert misses() == first
    case.grads[1] = torch.randn(10, device=DEVICE)
    sgd_like_reference(case)
    assert misses() == first + 1
    case.params[0] = torch.randn(4, 6, device=DEVICE)
    sgd_like_reference(case)
    assert misses() == first + 2


def test_a_gradient_that_changes_its_order_at_the_same_address_is_seen():
    case = Case((4, 6), (10,))
    sgd_like_reference(case)
    case.grads[0] = case.grads[0].as_strided((4, 6), (1, 4))
    sgd_like_reference(case)


def test_offsets_that_change_in_place_are_seen():
    case = Case((10,), (10,))
    case.run("restore")
    case.offsets.copy_(case.offsets.flip(0))
    case.run("restore")
    assert torch.equal(case.params[0], case.backup[32:42]) and torch.equal(case.params[1], case.backup[:10])


def test_chunks_find_their_rows_among_thousands():
    numels = torch.randint(0, 3 * ops.CHUNK, (3000,)).tolist()
    numels[::7] = [0] * len(numels[::7])
    sizes, offsets = tuple((n,) for n in numels), tuple(range(3000))
    found = rows.rows_of(sizes, ((1,),) * 3000, (), (), offsets)
    expected = [row for row, n in enumerate(numels) for _ in range(-(-n // ops.CHUNK))]
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
    for capturing in (False, True):
        assert tables.rows_of_chunks.__wrapped__(found, device, 0, capturing).tolist() == expected
    assert found.chunks == len(expected)
    assert [expected.index(7 * i + 1) for i in range(5)] == [found.first_chunks[7 * i + 1] for i in range(5)]


@pytest.mark.parametrize("capturing", [False, True], ids=["copied", "as_kernel_arguments"])
def test_addresses_arrive_exactly(capturing):
    """Also those above 2^53, which a double cannot hold, and Intel's, which have the highest bit set."""
    addresses = [0, 16, 2**53 + 1, 0x7F00_1234_5678_9AB1, 0xFF00_0000_0000_0013]
    arrived = tables.to_device(addresses, torch.device(DEVICE), capturing).tolist()
    assert [address % 2**64 for address in arrived] == addresses


def test_empty_rows_and_no_rows():
    case = Case((0,), (3, 0))
    for name in ops.NAMES:
        case.run(name)
    assert torch.equal(case.stats, torch.zeros_like(case.stats))
    case = Case()
    case.ema = case.momentum = None
    for name in ops.NAMES:
        case.run(name)
    assert torch.equal(case.stats, torch.zeros_like(case.stats))


# ---- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_are_rounded_as_torch_rounds(dtype):
    """w = 0 - (-1) * (1 * buffer + 0): the buffer, rounded. Ties, subnormals, overflow and inf are among the values."""
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16).item()
    bits = torch.randint(0, largest, (1000,), dtype=torch.int16)
    ties = (bits.view(dtype).float() + (bits + 1).view(dtype).float()) / 2  # exact: half way to the next number
    special = torch.tensor([0.0, torch.inf, 65519.9, 65520.0, 3.4e38, 1e-45, 6e-8, 3e-8])
    values = torch.cat([bits.view(dtype).float(), ties, special, torch.randn(1000)])
    beside = [torch.nextafter(values, torch.tensor(end)) for end in (torch.inf, -torch.inf)]
    values = torch.cat([values, -values, *beside]).to(DEVICE)
    case = Case((values.numel(),), dtype=dtype)
    case.params[0].zero_(), case.grads[0].zero_()
    case.momentum[: values.numel()] = values
    overload("restore_sgd")(
        *(case.params, case.grads, case.offsets, None, case.momentum, None, None, None),
        *(-1.0, None, 1.0, 0.0, 0.0, False, False, None),
    )
    assert torch.equal(case.params[0], values.to(dtype))


def test_a_nan_survives_the_rounding():
    case = Case((8,), dtype=torch.bfloat16)
    case.params[0].view(torch.int16).copy_(torch.tensor([0x7FFF, 0x7F81, -1, 0x7FC0] * 2))
    overload("restore_sgd")(
        *(case.params, case.grads, case.offsets, None, None, None, None, None),
        *(0.1, None, 0.0, 0.0, 0.0, False, False, None),
    )
    assert case.params[0].isnan().all()


@NEEDS_CPU_LIBRARY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.5, 1 - 2.0**-20)], ids=str)
def test_step_counts_and_bias_corrections_have_the_bits_of_the_compiled_cpu_backend(dtype, betas):
    """At every count that a program may meet; 300 members are three programs, and more members than rows."""
    counts = torch.cat([torch.arange(250.0), torch.tensor([999.0, 12344.0, 1e6 - 1, 2.0**24 - 2]), torch.zeros(46)])
    ours = [counts.to(DEVICE), torch.randperm(300, device=DEVICE), torch.empty(299, 2, dtype=dtype, device=DEVICE)]
    theirs = [tensor.cpu().clone() for tensor in ours]
    for namespace, tensors in ((NAMESPACE, ours), (torch.ops.fsam_ext, theirs)):
        namespace.count_steps.default(*tensors, None, None, 0.3, None, *betas)
    for ours_, theirs_ in zip(ours, theirs):
        torch.testing.assert_close(ours_, theirs_, rtol=0, atol=0, check_device=False)


def assert_same_bits_as_the_cpu_backend(case: Case, name: str) -> None:
    case.stats.fill_(3.7)
    case.one.fill_(3.0)  # a loss scale whose inverse is rounded
    ours = case.arguments(name)
    theirs = [[t.cpu() for t in clones(a)] if isinstance(a, list) else clones(a) for a in ours]
    theirs = [a.cpu() if isinstance(a, torch.Tensor) else a for a in theirs]
    overload(name)(*ours)
    getattr(torch.ops.fsam_ext, name).default(*theirs)
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if isinstance(a, torch.Tensor | list):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, check_device=False, msg=f"argument {i}")


@NEEDS_CPU_LIBRARY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", [name for name in ops.NAMES if name != "noise_norm"])
def test_given_the_norm_the_bits_are_those_of_the_compiled_cpu_backend(name, dtype):
    case = Case((5000,), (33, 5), dtype=dtype)
    case.momentum[:7] = case.ema[:7] = torch.nan
    assert_same_bits_as_the_cpu_backend(case, name)


@NEEDS_CPU_LIBRARY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", ["perturb", "update_ema"])
def test_compressed_averages_have_the_bits_of_the_compiled_cpu_backend(name, stored, dtype):
    case = Case((5000,), (33, 5), (64, 64), dtype=dtype, alignment=ops.QUANTIZED)
    case.ema = (100 * case.ema).to(stored)
    if stored == torch.int8:
        case.ema_scale = torch.rand(case.numel // ops.QUANTIZED, device=DEVICE) * 1e-3
        case.ema_scale[::3] = torch.nan
    for grad in case.grads:
        grad[..., 0] = 0.0
        if name == "update_ema":
            grad[..., -1] = torch.inf
    case.grads[2].mul_(2.0**-14), case.ema[-4096:].zero_()  # subnormal in float16
    assert_same_bits_as_the_cpu_backend(case, name)


@NEEDS_CPU_LIBRARY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["masters", "rounding"])
@pytest.mark.parametrize("name", ["perturb", "restore", "restore_sgd", "restore_adam"])
def test_masters_and_rounding_have_the_bits_of_the_compiled_cpu_backend(name, how, dtype):
    case = Case((5000,), (33, 5), dtype=dtype)
    if how == "masters":
        case.backup = torch.randn(case.numel, device=DEVICE)
    else:
        case.rounding = torch.tensor([-5, 2**40 + 1], device=DEVICE)
    assert_same_bits_as_the_cpu_backend(case, name)


# ---- Errors ----------------------------------------------------------------------------------------------------------


def changed(dtype=torch.float32, **changes):
    """A function that makes a case and replaces attributes of it."""

    def make() -> Case:
        case = Case((4, 6), (10,), dtype=dtype)
        for name, change in changes.items():
            value = getattr(case, name)
            setattr(case, name, [*value[:-1], change(value[-1])] if isinstance(value, list) else change(value))
        return case

    return make


BAD_CALLS = {
    "gaps": ("restore", changed(params=lambda t: torch.zeros(20)[::2])),
    "dtype": ("perturb", changed(params=lambda t: t.double())),
    "unsupported dtype": ("restore", lambda: Case((4,), dtype=torch.int32)),
    "gradient dtype": ("perturb", changed(grads=lambda t: t.double())),
    "gradient shape": ("restore_sgd", changed(grads=lambda t: t[:5])),
    "offsets dtype": ("restore", changed(offsets=lambda t: t.int())),
    "offsets length": ("restore", changed(offsets=lambda t: t[:1])),
    "negative offset": ("restore", changed(offsets=lambda t: t - 1)),
    "missing gradient": ("restore_adam", changed(params=lambda t: t, grads=lambda t: t)),
    "short average": ("noise_norm", changed(ema=lambda t: t[:30])),
    "average dtype": ("perturb", changed(ema=lambda t: t.double())),
    "strided backup": ("restore", changed(backup=lambda t: torch.zeros(2 * t.numel())[::2])),
    "backup dtype": ("perturb", changed(backup=lambda t: t.bfloat16())),
    "short momentum": ("restore_sgd", changed(momentum=lambda t: t[:30])),
    "exp_avg": ("restore_adam", changed(exp_avg=lambda t: t.double())),
    "exp_avg_sq": ("restore_adam", changed(exp_avg_sq=lambda t: t[:3])),
    "corrections": ("restore_adam", changed(torch.float64, corrections=lambda t: t.float())),
    "short corrections": ("restore_adam", changed(corrections=lambda t: t[:1])),
    "steps": ("count_steps", changed(steps=lambda t: t.long())),
    "index": ("count_steps", changed(index=lambda t: t.int())),
    "rows without members": ("count_steps", changed(index=lambda t: t[:1])),
    "flat corrections": ("count_steps", changed(corrections=lambda t: t.view(-1))),
    "half corrections": ("count_steps", changed(corrections=lambda t: t.half())),
    "strided steps": ("count_steps", changed(steps=lambda t: torch.zeros(2 * t.numel())[::2])),
    "short partials": ("noise_norm", changed(partials=lambda t: t[:4])),
    "stats dtype": ("noise_norm", changed(stats=lambda t: t.float())),
    "integer scale": ("perturb", changed(one=lambda t: t.long())),
    "half average": ("update_ema", changed(ema=lambda t: t.half())),
    "compressed average of fp64": ("perturb", changed(torch.float64, ema=lambda t: t.bfloat16())),
    "no scales": ("noise_norm", changed(ema=lambda t: t.to(torch.int8))),
    "int8 rows between blocks": (
        "update_ema",
        changed(ema=lambda t: t.to(torch.int8), ema_scale=lambda t: torch.ones(1, device=DEVICE)),
    ),
    "few scales": (
        "perturb",
        changed(
            offsets=lambda t: t * 4,
            ema=lambda t: torch.zeros(256, dtype=torch.int8, device=DEVICE),
            ema_scale=lambda t: torch.ones(1, device=DEVICE),
        ),
    ),
    "masters of fp64": ("restore", changed(torch.float64, backup=lambda t: t.float())),
    "short masters": ("restore_sgd", changed(torch.bfloat16, backup=lambda t: t.float()[:30])),
    "short effect": ("perturb", changed(effect=lambda t: torch.zeros(5, device=DEVICE))),
    "forward": ("perturb", changed(forward=lambda number: 3)),
    "forward of fp64": ("perturb", changed(torch.float64, forward=lambda number: 1)),
    "float rounding": ("restore_adam", changed(rounding=lambda t: torch.zeros(2, device=DEVICE))),
    "short rounding": ("restore_sgd", changed(rounding=lambda t: torch.zeros(1, dtype=torch.int64, device=DEVICE))),
}


@NEEDS_CPU_LIBRARY
@pytest.mark.skipif(DEVICE != "cpu", reason="the words are compared on CPU tensors")
@pytest.mark.parametrize("what", BAD_CALLS)
def test_errors_are_those_of_the_compiled_backends(what):
    name, make = BAD_CALLS[what]
    messages = []
    for namespace in (NAMESPACE, torch.ops.fsam_ext):
        arguments = make().arguments(name)
        if what == "missing gradient":
            arguments = (arguments[0], arguments[1][:1], *arguments[2:])
        before = clones(arguments)
        with pytest.raises(RuntimeError, match="fsam_ext: ") as error:
            getattr(namespace, name).default(*arguments)
        messages.append(str(error.value).splitlines()[0])
        if namespace is NAMESPACE:
            dense = [(a, b) for a, b in zip(arguments, before) if isinstance(a, torch.Tensor) and not a.is_sparse]
            for a, b in dense:
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert messages[1].endswith(messages[0])  # C++ puts the line of its source before


@pytest.mark.parametrize("which", ["params", "grads"])
def test_sparse_tensors_are_refused_with_a_sentence(which):
    arguments = changed(**{which: lambda t: t.to_sparse()})().arguments("perturb")
    with pytest.raises(RuntimeError, match=rf"{which}\[1\] is sparse; only dense .*: use sparse=False, or to_dense"):
        overload("perturb")(*arguments)


# ---- Which devices ---------------------------------------------------------------------------------------------------


def test_it_says_which_devices_it_serves():
    assert backend.unavailable(torch.device(DEVICE)) is None
    assert "xpu" in backend.unavailable(torch.device("meta")) or "CPU" in backend.unavailable(torch.device("meta"))


def run_python(*arguments: str, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """A Python of its own, without the interpreter of Triton."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        text=True,
        capture_output=True,
        cwd=Path(__file__).parents[1],
        env={**inherited, **environment},
    )


def test_without_the_interpreter_it_does_not_serve_the_cpu():
    code = "import torch; from fsam_ext.backends import triton; print(triton.unavailable(torch.device('cpu')))"
    done = run_python("-c", code)
    assert "GPUs only" in done.stdout, done.stderr


def test_import_fsam_ext_does_not_import_triton():
    # torch may import triton for itself, so what counts is our module.
    done = run_python("-c", "import fsam_ext, sys; print('fsam_ext.backends.triton' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


# ---- Compiled ahead of time ------------------------------------------------------------------------------------------

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx1100")
MAIN = [(name, dtype) for name in ("noise_norm", "perturb") for dtype in ("float32", "bfloat16")]
REST = [
    *((name, "float64") for name in ("noise_norm", "perturb")),
    *(("restore", "float16"), ("restore_sgd", "bfloat16"), ("restore_adam", "float32"), ("sum_partials", "float32")),
    *(("count_steps", dtype) for dtype in ("float64", "float32")),
]
# What averages in other dtypes, masters, stochastic rounding and the effect of a perturbation make of a kernel.
VARIANTS = [
    ("noise_norm", "float32", "none"),
    ("perturb", "bfloat16", "none"),
    ("noise_norm", "float32", "int8"),
    ("noise_norm", "bfloat16", "bfloat16"),
    ("perturb", "float32", "int8"),
    ("perturb", "float16", "bfloat16"),
    ("perturb", "bfloat16", "masters"),
    ("perturb", "bfloat16", "effect"),
    ("update_ema", "float32", ""),
    ("update_ema", "bfloat16", "int8"),
    ("restore", "bfloat16", "masters"),
    ("restore_sgd", "bfloat16", "masters"),
    ("restore_sgd", "float16", "rounding"),
    ("restore_adam", "bfloat16", "rounding"),
]
# (kernel, dtype, variant, target, table)
COMPILED = [
    *((*kernel, "", target, True) for target in TARGETS for kernel in [*MAIN, ("restore_adam", "bfloat16")]),
    *((*kernel, "", target, True) for target in ("sm_90", "gfx942") for kernel in REST),
    *((*kernel, target, True) for target in ("sm_90", "gfx942") for kernel in VARIANTS),
    *((*kernel, "", target, False) for target in ("sm_90", "gfx942") for kernel in MAIN[-1:]),
]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> dict[tuple, dict[str, int]]:
    """Facts about every kernel of COMPILED, from one process that compiles them all."""
    cache = str(tmp_path_factory.mktemp("triton_cache"))
    done = run_python("-m", "tests.triton_compiled", "--json", stdin=json.dumps(COMPILED), TRITON_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr
    return dict(zip(COMPILED, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: "-".join(map(str, case)))
def test_compiled_code(compiled, case):
    """No spills, 128-bit accesses for whole chunks, little shared memory, no contraction, IEEE division and roots."""
    from . import triton_compiled

    name, dtype, variant, target, _ = case
    facts = compiled[case]
    assert facts["parameters"] == [8] * facts["passed"]
    assert facts["spills"] == 0
    # Explicit ones keep the powers' lower halves.
    assert facts["fused"] == (4 if name == "count_steps" and target.startswith("sm") else 0)
    assert facts["approximate"] == 0
    # Tiles pass through it to another layout, 8 bytes an element at most; a sum leaves one number for each warp.
    assert facts["shared"] <= (128 if name in ("noise_norm", *triton_compiled.SMALL) else 4096)
    for fact, tensors in (("vector_loads", triton_compiled.reads), ("vector_stores", triton_compiled.writes)):
        needed = triton_compiled.vector_accesses(name, dtype, tensors(name, variant), variant)
        # A compiler may unroll the loop over tiles; every tile then has its own.
        assert facts[fact] >= needed and facts[fact] % max(needed, 1) == 0, fact
    if name == "noise_norm":
        assert facts["register_layouts"] == 1, "aligned and misaligned tensors would be summed in different orders"


# ---- Launched on GPUs that are not there: triton_gpu.py --------------------------------------------------------------


def test_no_argument_of_a_kernel_has_a_name_that_triton_uses_itself():
    """kernels/__init__.py, NOTE [names of arguments]. Triton tells: its generated function, its options, its `run`."""
    from triton.backends.amd.compiler import HIPOptions
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.runtime.jit import JITFunction, KernelParam, create_function_from_signature

    argument = inspect.Parameter("x", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    generated = create_function_from_signature(
        inspect.Signature([argument]), [KernelParam(0, argument, False, False)], None
    ).__code__
    taken = {*generated.co_varnames, *generated.co_names, *inspect.signature(JITFunction.run).parameters} - {"x"}
    assert {"params", "specialization", "options", "backend", "grid", "warmup"} <= taken
    taken |= {field.name for options in (CUDAOptions, HIPOptions) for field in dataclasses.fields(options)}
    taken |= {"stream", "device", "device_type"}  # refused by name
    for name in kernels.__all__:
        arguments = inspect.signature(getattr(kernels, name).fn).parameters
        assert not taken & set(arguments), name


LAUNCHED = re.compile(r"^(\w+): (\d+) kernels .*", re.MULTILINE)


def launch_the_conformance_suite(*targets: str, **environment: str) -> list[int]:
    """The numbers of kernels that it comes to on each target, printed too."""
    done = run_python("-m", "tests.triton_launches", *targets, **environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    print(*(match[0] for match in LAUNCHED.finditer(done.stdout)), sep="\n")
    return [int(count) for _, count in LAUNCHED.findall(done.stdout)]


@NEEDS_CPU_LIBRARY
def test_whatever_the_conformance_suite_launches_passes_tritons_binder():
    """On all targets, and on one also the frontend of the compiler."""
    counts = launch_the_conformance_suite("sm_80:binder", "sm_90:ir", "sm_100:binder", "gfx942:binder")
    assert len(counts) == 4 and min(counts) > 400


@NEEDS_CPU_LIBRARY
@pytest.mark.large
def test_whatever_the_conformance_suite_launches_compiles(tmp_path):
    counts = launch_the_conformance_suite("sm_80", "sm_90", "sm_100", "gfx942", TRITON_CACHE_DIR=str(tmp_path))
    assert len(counts) == 4 and min(counts) > 400


def test_steps_launch_once_for_each_pass_and_hand_over_what_the_kernels_take():
    """Through Triton's own C launcher; triton_gpu.py compares each launch with what arrives at libcuda."""
    done = run_python("-m", "tests.triton_steps")
    assert done.returncode == 0, done.stderr
    found = {(base, number): launched for base, number, launched in map(json.loads, done.stdout.splitlines())}
    for number in (1, 150):
        chunks = 2 * number  # of 64 x 65 elements each
        ascent = [["noise_norm", chunks], ["sum_partials", ops.STATISTICS], ["perturb", chunks]]
        assert found["sgd", number] == [*ascent, ["restore_sgd", chunks]]
        assert found["adamw", number] == [*ascent, ["count_steps", -(-number // 128)], ["restore_adam", chunks]]


def test_nothing_is_compiled_while_a_graph_is_captured():
    """launch.py, NOTE [nothing is compiled under graph capture]: refused before a launch, and only what is new."""
    done = run_python("-m", "tests.triton_capture")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    refusal = (
        "fsam_ext: Triton's kernel restore is not compiled yet for these dtypes and options, and a graph is being "
        "captured; make one step with them before the capture"
    )
    assert found == {
        "first, captured": refusal,
        "first": ["restore"],
        "second, captured": ["restore"],
        "another dtype, captured": refusal,
        "a user's kernel beside it, captured": ["of_a_user", "restore"],
    }


@NEEDS_CPU_LIBRARY
def test_a_prepared_cache_is_found_where_it_is_unpacked(tmp_path):
    suite = ("--suite", "tests/test_count_steps.py")
    file, folder = str(tmp_path / "cache.tar.xz"), tmp_path / "unpacked"
    steps = [("make", file, *suite), ("unpack", file, str(folder)), ("check", str(folder), *suite)]
    said = []
    for step in steps:
        done = run_python("bench/triton_cache.py", *step)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines()[-1])
    assert said[1] == f"Use it with TRITON_CACHE_DIR={folder}"
    assert re.fullmatch(r"[1-9]\d* kernels from the cache, 0 compiled", said[2])
    manifest = folder / "made_with.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"ptxas": "another"}))
    with tarfile.open(file, "w:xz") as archive:
        archive.add(manifest, manifest.name)
    assert run_python("bench/triton_cache.py", "unpack", file, str(folder)).stdout.endswith("compile anew: ptxas\n")


# ---- Executed: triton_sass.py ----------------------------------------------------------------------------------------

# For each byte that a pass moves an H200 has time for 7.8 instructions (bench/gpu_model.py, NOTE [issue limit]).
SHARE_OF_THE_ISSUE_LIMIT = 2 / 3
# What a warp issues at most before it asks for a tensor's elements: scalars in fp64, and its place in the table.
BEFORE_FIRST_WIDE_LOAD = 150


def executed(*options: str) -> dict[tuple, dict]:
    done = run_python("-m", "tests.triton_sass", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return {tuple(case): facts for case, facts in map(json.loads, done.stdout.splitlines())}


@NEEDS_CPU_LIBRARY
@NEEDS_SASS
def test_the_compiled_code_gives_the_bits_of_the_cpu_backend_and_issues_few_instructions():
    from bench import gpu_model

    for (op, dtype, _, table), facts in executed().items():
        print(op, dtype, "table" if table else "one row", facts)
        assert not facts["differs"], (op, dtype, table)
        if op != "count_steps":
            nbytes = gpu_model.bytes_per_parameter(op, {"float32": "fp32", "bfloat16": "bf16"}[dtype])
            limit = SHARE_OF_THE_ISSUE_LIMIT * gpu_model.H200.issue_limit(nbytes, 4.3e12)
            assert facts["instructions"] <= limit, (op, dtype, table)
            assert facts["before_first_wide_load"] <= BEFORE_FIRST_WIDE_LOAD, (op, dtype, table)


@NEEDS_CPU_LIBRARY
@NEEDS_SASS
@pytest.mark.large
def test_all_compiled_code_gives_the_bits_of_the_cpu_backend():
    found = executed("--all")
    assert len(found) > 60 and not {case: facts["differs"] for case, facts in found.items() if facts["differs"]}


# ---- What only a GPU has, with fakes in its place --------------------------------------------------------------------


def on_device(index: int) -> SimpleNamespace:
    """What an op asks of its first tensor before it has checked it."""
    return SimpleNamespace(device=torch.device("cuda", index))


def test_an_op_runs_with_the_device_of_its_parameters_current(monkeypatch):
    current = [0]

    @contextlib.contextmanager
    def device_index(index: int):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: current[-1])
    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    seen = []
    op = passes._on_device(lambda first, *args: seen.append((current[-1], len(current), args)))
    op([on_device(0)], 7)
    op([on_device(1)], 8)
    assert seen == [(0, 1, (7,)), (1, 2, (8,))] and current == [0]


@pytest.fixture
def gpu(monkeypatch):
    """Tables for a GPU that is not there, with a current `stream`; `copies` tells of each whether it is captured."""
    fake = SimpleNamespace(stream=7, capturing=False, copies=[], device=torch.device("meta"))

    def to_device(values, device, capturing):
        fake.copies.append(capturing)
        return torch.empty(len(values), dtype=torch.int64, device=device)

    driver = SimpleNamespace(get_current_stream=lambda index: fake.stream)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(tables, "is_capturing", lambda device: fake.capturing)
    monkeypatch.setattr(tables, "to_device", to_device)
    params = [torch.empty(10), torch.empty(3)]
    found = rows.rows_of(((10,), (3,)), ((1,), (1,)), (), (), (0, 32))
    fake.tables = lambda: tables.tables(found, params, None, fake.device)
    return fake


def test_tables_are_kept_for_each_stream(gpu):
    first, chunks = gpu.tables()
    assert gpu.copies == [False, False]
    gpu.stream = 8  # nothing orders it behind the first
    other, other_chunks = gpu.tables()
    assert other is not first and other_chunks is not chunks
    gpu.stream = 7
    again, chunks_again = gpu.tables()
    assert again is first and chunks_again is chunks and len(gpu.copies) == 4


def test_tables_of_a_graph_are_its_own(gpu):
    gpu.stream, gpu.capturing = 9, True
    captured = [gpu.tables() for _ in range(2)]
    assert captured[0][0] is not captured[1][0] and captured[0][1] is not captured[1][1]
    assert gpu.copies == [True] * 4
    gpu.capturing = False
    table, _ = gpu.tables()
    assert all(table is not first for first, _ in captured) and gpu.copies[4:] == [False, False]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_table_is_copied_from_pinned_memory_without_waiting(monkeypatch, device):
    seen = []

    def tensor(values, **options):
        moved = lambda *to, **how: seen.append((values, options, to, how))  # noqa: E731
        return SimpleNamespace(to=moved)

    monkeypatch.setattr(torch, "tensor", tensor)
    tables.to_device([3, 2**63], torch.device(device), False)
    options = {"dtype": torch.int64, "pin_memory": device == "cuda"}
    assert seen == [([3, -(2**63)], options, (torch.device(device),), {"non_blocking": True})]


@pytest.mark.parametrize("capability,reason", [((7, 5), None), ((9, 0), None), ((7, 0), "capability 7.5 or later")])
def test_it_says_which_nvidia_gpus_it_serves(monkeypatch, capability, reason):
    target = SimpleNamespace(get_current_target=lambda: SimpleNamespace(backend="cuda"))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(triton.runtime.driver, "_active", target)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    said = backend.unavailable(torch.device("cuda", 1))
    assert said is None if reason is None else reason in said


def test_it_says_that_amds_gpus_are_served(monkeypatch):
    target = SimpleNamespace(get_current_target=lambda: SimpleNamespace(backend="hip"))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(triton.runtime.driver, "_active", target)
    assert backend.unavailable(torch.device("cuda")) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_it_says_that_triton_finds_no_driver(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert "Triton finds no driver for a GPU: 0 active drivers" in backend.unavailable(torch.device("cuda"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler."),
        AssertionError("libcuda.so cannot found!"),
        FileNotFoundError("/sbin/ldconfig"),
        subprocess.CalledProcessError(1, ["gcc"]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_it_says_why_tritons_driver_does_not_start(monkeypatch, error):
    def start(config):
        raise error

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(type(triton.runtime.driver), "active", property(start))
    assert backend.unavailable(torch.device("cuda")) == f"Triton finds no driver for a GPU: {error}"


def test_a_wave_of_64_gets_half_as_many(monkeypatch):
    """Warps are counted in those of the target."""
    warps = []
    monkeypatch.setattr(kernels, "restore", {(3,): lambda *args, **options: warps.append(options["num_warps"])})
    for size in (32, 64):
        monkeypatch.setattr(launch, "_warp_size", lambda size=size: size)
        launch.launch("restore", torch.float32, 3)
    assert warps == [4, 2]


# ---- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu():
    case = Case((300, 7), (5000,))
    for name in ops.NAMES:
        case.run(name)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.grads = [grad.clone() for grad in case.grads]  # moved: the table is built anew
        for name in ops.NAMES:
            case.run(name)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("shapes", [[(5000,)], [(300, 7), (5000,)]], ids=["one_row", "table"])
def test_a_captured_step_replays(shapes):
    case = Case(*shapes)
    for name in ops.NAMES:  # compiles the kernels
        case.run(name)
    start = clones(case.params)
    expected = clones(case.arguments("restore_sgd"))
    reference.restore_sgd(*expected)
    graph = torch.cuda.CUDAGraph()
    buffer = case.momentum.clone()
    with torch.cuda.graph(graph):
        case.run("restore_sgd")
    filler = [torch.randn(1000, device=DEVICE) for _ in range(100)]  # writes over memory that was freed
    for param, value in zip(case.params, start):
        param.copy_(value)
    case.momentum.copy_(buffer)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(case.params, expected[0], rtol=1e-5, atol=1e-6)
    del filler
