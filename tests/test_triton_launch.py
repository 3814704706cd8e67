"""The Triton backend where the interpreter passes it by: what is compiled, launched and executed, on no GPU.

Kernels are compiled in processes of their own: under TRITON_INTERPRET=1, as here, nothing is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import re
import subprocess
import tarfile
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from bench import gpu_model  # noqa: E402
from bench.sass import binary  # noqa: E402
from fsam_ext import _library  # noqa: E402
from fsam_ext.backends import ops  # noqa: E402
from fsam_ext.backends import triton as backend  # noqa: E402
from fsam_ext.backends.triton import kernels, launch, passes, rows, tables  # noqa: E402

from . import triton_compiled  # noqa: E402
from .triton_gpu import run_python  # noqa: E402

NEEDS_SASS = pytest.mark.skipif(binary.missing_tools() is not None, reason=str(binary.missing_tools()))
NEEDS_CPU_LIBRARY = pytest.mark.skipif(_library.CPU_REASON is not None, reason=str(_library.CPU_REASON))

# ---- Compiled ahead of time ------------------------------------------------------------------------------------------

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx1100")
MAIN = [(name, dtype) for name in ("noise_norm", "perturb") for dtype in ("float32", "bfloat16")]
OF_HALVES = [(name, "bfloat16") for name in ("dots", "project", "restore_adam")]
REST = [
    *((name, "float64") for name in ("noise_norm", "perturb", "dots", "project")),
    *(("dots", "float32"), ("project", "float32")),
    *(("restore", "float16"), ("restore_sgd", "bfloat16"), ("restore_adam", "float32"), ("sum_partials", "float32")),
    *(("count_steps", dtype) for dtype in ("float64", "float32")),
]
# What averages in other dtypes, masters, stochastic rounding, the effect of a perturbation and what is kept, summed and
# reused of gradients make of a kernel.
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
    ("restore_sgd", "float16", "adopts"),
    ("restore_adam", "bfloat16", "adopts"),
    ("restore_sgd", "float16", "rounding"),
    ("restore_adam", "bfloat16", "rounding"),
    ("perturb", "float32", "kept"),
    ("perturb", "bfloat16", "kept bfloat16"),
    ("update_ema", "bfloat16", "norm"),
    ("update_ema", "float32", "norm"),
    ("dots", "bfloat16", "bfloat16"),
    ("project", "float32", "bfloat16"),
    ("restore_sgd", "float16", "reused"),
    ("restore_sgd", "float32", "reused bfloat16"),
    ("restore_adam", "bfloat16", "reused"),
    ("restore_adam", "bfloat16", "reused bfloat16"),
]
# (kernel, dtype, variant, target, table)
COMPILED = [
    *((*kernel, "", target, True) for target in TARGETS for kernel in [*MAIN, *OF_HALVES]),
    *((*kernel, "", target, True) for target in ("sm_90", "gfx942") for kernel in REST),
    *((*kernel, target, True) for target in ("sm_90", "gfx942") for kernel in VARIANTS),
    *((*kernel, "", target, False) for target in ("sm_90", "gfx942") for kernel in MAIN[-1:]),
]
# AMD's GPUs serve nobody yet: for them -m large compiles all but the plain passes.
OFTEN = [case for case in COMPILED if case[3].startswith("sm") or (case[3] == "gfx942" and case[:2] in MAIN)]


@pytest.fixture(scope="session")
def compiled(request, tmp_path_factory) -> dict[tuple, dict[str, int]]:
    """Facts about every kernel of COMPILED that is asked for, from one process that compiles them all."""
    items = (item for item in request.session.items if "compiled" in item.fixturenames)
    cases = [item.callspec.params["case"] for item in items]
    cache = str(tmp_path_factory.mktemp("triton_cache"))
    done = run_python("-m", "tests.triton_compiled", "--json", stdin=json.dumps(cases), TRITON_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in OFTEN else pytest.mark.large) for case in COMPILED],
    ids=lambda case: "-".join(map(str, case)),
)
def test_compiled_code(compiled, case):
    """No spills, 128-bit accesses for whole chunks, little shared memory, no contraction, IEEE division and roots."""
    name, dtype, variant, target, _ = case
    facts = compiled[case]
    assert facts["parameters"] == [8] * facts["passed"]
    assert facts["spills"] == 0
    # Explicit ones keep the powers' lower halves.
    assert facts["fused"] == (4 if name == "count_steps" and target.startswith("sm") else 0)
    assert facts["approximate"] == 0
    # Tiles pass through it to another layout, 8 bytes an element at most; a sum leaves one number for each warp.
    assert facts["shared"] <= (128 if name in (*triton_compiled.ONE_TILE, *triton_compiled.SMALL) else 4096)
    for fact, tensors in (("vector_loads", triton_compiled.reads), ("vector_stores", triton_compiled.writes)):
        needed = triton_compiled.vector_accesses(name, dtype, tensors(name, variant), variant)
        # A compiler may unroll the loop over tiles; every tile then has its own.
        assert facts[fact] >= needed and facts[fact] % max(needed, 1) == 0, fact
    if name in triton_compiled.ONE_TILE:
        assert facts["register_layouts"] == 1
    assert facts["summed_layouts"] <= 1, "aligned and misaligned tensors would be summed in different orders"


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


def launch_the_conformance_suite(*arguments: str, **environment: str) -> list[int]:
    """The numbers of kernels that it comes to on each target, printed too."""
    done = run_python("-m", "tests.triton_launches", *arguments, **environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    print(*(match[0] for match in LAUNCHED.finditer(done.stdout)), sep="\n")
    return [int(count) for _, count in LAUNCHED.findall(done.stdout)]


@NEEDS_CPU_LIBRARY
def test_whatever_the_conformance_suite_launches_passes_tritons_binder(request):
    """And a third of it, another one in each run, also the frontend of the compiler; -m large compiles it all."""
    seed = str(request.config.fsam_seed)
    counts = launch_the_conformance_suite("sm_90:ir", "gfx942:binder", "--third", seed)
    assert len(counts) == 2 and min(counts) > 500


@NEEDS_CPU_LIBRARY
@pytest.mark.large
def test_whatever_the_conformance_suite_launches_compiles(tmp_path):
    """In all its combinations."""
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "FSAM_EVERY_COMBINATION": "1"}
    counts = launch_the_conformance_suite("sm_80", "sm_90", "sm_100", "gfx942", **environment)
    assert len(counts) == 4 and min(counts) > 1000


def test_steps_launch_once_for_each_pass_and_hand_over_what_the_kernels_take():
    """Through Triton's own C launcher; triton_gpu.py compares each launch with what arrives at libcuda."""
    done = run_python("-m", "tests.triton_steps")
    assert done.returncode == 0, done.stderr
    found = {tuple(what): launched for *what, launched in map(json.loads, done.stdout.splitlines())}
    assert len(found) == 12
    for (base, number, reuses, ascends), launched in found.items():
        chunks = 2 * number  # of 64 x 65 elements each
        first = [["noise_norm", chunks], ["sum_partials", ops.STATISTICS], ["perturb", chunks]]
        projection = [["dots", chunks], ["sum_partials", 2], ["project", chunks], ["sum_partials", 1]]
        between = [["update_ema", chunks], ["sum_partials", 1]]
        counts = [["count_steps", -(-number // 128)]] if base == "adamw" else []
        update = [[{"sgd": "restore_sgd", "adamw": "restore_adam"}[base], chunks]]
        if ascends:
            assert launched == [*first, *(projection if reuses else []), *counts, *update], (base, number, reuses)
        else:
            assert launched == [*between, *counts, *update], (base, number)


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
# And what the length of what is reused takes: two roots and a quotient in fp64.
OF_THE_REUSED_LENGTH = 75


def executed(*options: str) -> dict[tuple, dict]:
    done = run_python("-m", "tests.triton_sass", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return {tuple(case): facts for case, facts in map(json.loads, done.stdout.splitlines())}


@NEEDS_CPU_LIBRARY
@NEEDS_SASS
def test_the_compiled_code_gives_the_bits_of_the_cpu_backend_and_issues_few_instructions():
    for (op, dtype, variant, table), facts in executed().items():
        print(op, dtype, variant, "table" if table else "one row", facts)
        assert not facts["differs"], (op, dtype, variant, table)
        if op != "count_steps":
            nbytes = triton_compiled.bytes_moved(op, dtype, variant)
            limit = SHARE_OF_THE_ISSUE_LIMIT * gpu_model.H200.issue_limit(nbytes, 4.3e12)
            assert facts["instructions"] <= limit, (op, dtype, variant, table)
            scalars = BEFORE_FIRST_WIDE_LOAD + OF_THE_REUSED_LENGTH * (variant == "reused")
            assert facts["before_first_wide_load"] <= scalars, (op, dtype, variant, table)


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
    monkeypatch.setattr(passes, "capturing", lambda device: False)
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
