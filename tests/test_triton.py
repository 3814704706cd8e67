"""The Triton backend beyond conformance: its ops in torch's eyes, its tables, its numbers and its errors.

Without a GPU the kernels run in Triton's interpreter (see conftest.py), which executes the same lines of Python that
the compiler sees. test_triton_launch.py has what the interpreter passes by.
"""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from fsam_ext import _library  # noqa: E402
from fsam_ext.backends import ops, reference  # noqa: E402
from fsam_ext.backends import triton as backend  # noqa: E402
from fsam_ext.backends.triton import rows, tables  # noqa: E402

from .conformance import SUMMANDS, unit  # noqa: E402
from .triton_gpu import run_python  # noqa: E402

DEVICE = "cpu" if backend.INTERPRETED else "cuda"
NAMESPACE = getattr(torch.ops, backend.NAMESPACE)
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
        self.ema_scale = self.effect = self.rounding = self.kept = self.reused = None
        self.direction = torch.randn(self.numel, **state)
        self.sums = torch.tensor([-0.7, 1.3], dtype=torch.float64, device=DEVICE)
        self.square = torch.full((1,), torch.nan, dtype=torch.float64, device=DEVICE)
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
                *(0.1, None, 0.8, 0.9, 0.0, False, True, True, self.forward, self.effect, None, self.kept),
            ),
            "update_ema": (
                *(p, g, o, self.ema, self.ema_scale, self.stats, self.one, None, 0.9),
                *(None, self.partials, self.square),
            ),
            "dots": (p, g, o, self.direction, self.one, self.partials, self.sums),
            "project": (*(p, g, o, self.direction, self.sums, self.stats, self.one, None, self.partials, self.square),),
            "restore": (p, o, self.backup),
            "restore_sgd": (
                *(p, g, o, self.backup, self.momentum, *after, 0.9, 0.0, 0.01, True, False, self.rounding),
                *(False, None, self.reused, self.sums, 0.3, 1e-12),
            ),
            "count_steps": (self.steps, self.index, self.corrections, self.stats, None, *rate, 0.9, 0.999),
            "restore_adam": (
                *(p, g, o, self.backup, self.exp_avg, self.exp_avg_sq, self.corrections, *after),
                *(0.9, 0.999, 1e-8, 0.01, True, False, self.rounding),
                *(False, None, self.reused, self.sums, 0.3, 1e-12),
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


SUMS = {"update_ema": {10, 11}, "dots": {5, 6}, "project": {8, 9}}  # arguments that are added up


def assert_same_bits_as_the_cpu_backend(case: Case, name: str) -> None:
    """Of all that a call writes, but sums, which are added in another order; of what has one sign nothing cancels."""
    if name == "dots":
        for tensor in (*case.grads, case.direction):
            tensor.abs_()
    case.stats.fill_(3.7)
    case.one.fill_(3.0)  # a loss scale whose inverse is rounded
    ours = case.arguments(name)
    theirs = [[t.cpu() for t in clones(a)] if isinstance(a, list) else clones(a) for a in ours]
    theirs = [a.cpu() if isinstance(a, torch.Tensor) else a for a in theirs]
    overload(name)(*ours)
    getattr(torch.ops.fsam_ext, name).default(*theirs)
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if isinstance(a, torch.Tensor | list):
            tolerance = 2 * SUMMANDS * unit(torch.float32) if i in SUMS.get(name, ()) else 0
            how = {"rtol": tolerance, "atol": 0, "equal_nan": True, "check_device": False}
            torch.testing.assert_close(a, b, **how, msg=f"argument {i}")


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


@NEEDS_CPU_LIBRARY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("stored", [None, torch.bfloat16], ids=["full", "bfloat16"])
@pytest.mark.parametrize("name", ["perturb", "project", "restore_sgd", "restore_adam"])
def test_what_is_kept_and_reused_has_the_bits_of_the_compiled_cpu_backend(name, stored, dtype):
    if stored is not None and dtype == torch.float64:
        stored = torch.float64  # float64 parameters keep nothing in fewer bits
    case = Case((5000,), (33, 5), dtype=dtype)
    case.sums.abs_()
    case.direction = case.direction.to(stored or case.direction.dtype)
    case.kept = case.reused = case.direction
    assert_same_bits_as_the_cpu_backend(case, name)


@pytest.mark.parametrize("square,expected", [(torch.nan, torch.nan), (3.7, 0.0)])
@pytest.mark.parametrize("shapes", [[(0,), (3, 0)], []], ids=["empty", "none"])
def test_the_direction_of_no_elements(shapes, square, expected):
    case = Case(*shapes)
    case.stats[0] = square
    case.run("project")
    torch.testing.assert_close(case.square.item(), expected, equal_nan=True)


def test_sums_have_the_same_bits_aligned_or_not():
    """Those of `dots`, of the average's pass and of the projection, as those of the norm."""
    case, shifted = Case((9000,)), Case((9000,))
    shifted.grads = [torch.cat([case.grads[0].new_zeros(1), case.grads[0]])[1:]]
    shifted.direction, shifted.ema = case.direction.clone(), case.ema.clone()
    case.square.zero_(), shifted.square.zero_()
    for name in ("dots", "update_ema", "project"):
        case.run(name), shifted.run(name)
        assert torch.equal(case.sums, shifted.sums) and torch.equal(case.square, shifted.square), name


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
    "kept dtype": ("perturb", changed(kept=lambda t: torch.zeros(64, device=DEVICE).half())),
    "short kept": ("perturb", changed(kept=lambda t: torch.zeros(30, device=DEVICE))),
    "compressed gradient of fp64": ("dots", changed(torch.float64, direction=lambda t: t.bfloat16())),
    "short sums": ("dots", changed(sums=lambda t: t[:1])),
    "short partials of dots": ("dots", changed(partials=lambda t: t[:3])),
    "short partials of a square": ("update_ema", changed(partials=lambda t: t[:1])),
    "square without partials": ("update_ema", changed(partials=lambda t: None)),
    "float square": ("update_ema", changed(square=lambda t: t.float())),
    "direction dtype": ("project", changed(direction=lambda t: t.to(torch.int8))),
    "sums dtype": ("project", changed(sums=lambda t: t.float())),
    "square of a direction": ("project", changed(square=lambda t: t[:0])),
    "short direction": ("restore_sgd", changed(reused=lambda t: torch.zeros(30, device=DEVICE))),
    "half direction": ("restore_adam", changed(reused=lambda t: torch.zeros(64, device=DEVICE).half())),
    "reused without squares": (
        "restore_sgd",
        changed(reused=lambda t: torch.zeros(64, device=DEVICE), sums=lambda t: None),
    ),
    "one square": ("restore_adam", changed(reused=lambda t: torch.zeros(64, device=DEVICE), sums=lambda t: t[:1])),
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


def test_without_the_interpreter_it_does_not_serve_the_cpu():
    code = "import torch; from fsam_ext.backends import triton; print(triton.unavailable(torch.device('cpu')))"
    done = run_python("-c", code)
    assert "GPUs only" in done.stdout, done.stderr


def test_import_fsam_ext_does_not_import_triton():
    # torch may import triton for itself, so what counts is our module.
    done = run_python("-c", "import fsam_ext, sys; print('fsam_ext.backends.triton' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


# ---- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu():
    case = Case((300, 7), (5000,))
    case.kept = case.reused = case.direction
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
@pytest.mark.parametrize("reuses", [False, True])
def test_a_captured_step_replays(shapes, reuses):
    case = Case(*shapes)
    case.reused = case.direction.clone() if reuses else None
    for name in ops.NAMES:  # compiles the kernels
        case.run(name)
    case.sums.fill_(7.0)
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
