"""What is read from the tools and measured of the passes on a GPU, and the pages that show it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from bench import gpu, gpu_check, rows
from bench.gpu_run import facts, figures, merge, ncu, passes, stages, tables

from . import test_bench_gpu

# ---- What tools print -----------------------------------------------------------------------------------------------


def recorded(backend: str) -> str:
    return (stages.STUBS / f"ncu_{backend}.csv").read_text()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_profilers_table_is_read(backend):
    """Around it stands what the profiler and the program say; its numbers have commas, some are n/a."""
    text = f'==PROF== Connected to process 1\nsome, "words"\n{recorded(backend)}==PROF== Disconnected\n'
    launches = ncu.parse(text)
    assert len(launches) == 2 * len(ncu.KERNELS[1:])  # each backend has a sum of its own name
    first, restore = launches[0], launches[3]
    assert first.op == "noise_norm" and restore.op == "restore"
    assert first.counters["gpu__time_duration.sum"] == pytest.approx(3.4e-6)
    assert first.counters["dram__bytes_read.sum"] == 66176
    assert first.counters["smsp__inst_executed.sum"] == 7952
    stalled = "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"
    assert stalled in first.counters and stalled not in restore.counters
    cases = [("fp32", 8192, "flat"), ("bf16", 8192, "flat")]
    found = {(r.provider, r.dtype, r.metric): r for r in ncu.as_rows(launches, backend, cases)}
    name = passes.provider(backend, "restore_adam")
    assert found[name, "fp32", "ncu instructions"].median == pytest.approx(63, abs=0.1)
    assert found[name, "bf16", "ncu bytes read"].median == pytest.approx(0.6 * 16, rel=0.01)
    assert found[name, "fp32", "ncu time"].unit == "us"


def test_a_pass_of_several_launches_is_summed_and_an_odd_number_refused():
    launches = [ncu.Launch("perturb", {"gpu__time_duration.sum": 1e-6, "launch__registers_per_thread": 40.0})] * 4
    cases = [("fp32", 8192, "flat"), ("bf16", 8192, "flat")]
    found = {(row.dtype, row.metric): row.median for row in ncu.as_rows(launches, "cuda", cases)}
    assert found == {
        (d, m): pytest.approx(v) for d in ("fp32", "bf16") for m, v in (("ncu time", 2), ("ncu registers", 40))
    }
    with pytest.raises(ValueError, match="perturb was launched 3 times for 2 cases"):
        ncu.as_rows(launches[:3], "cuda", cases)


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [("1,234.5", "usecond", 1234.5e-6), ("12", "us", 12e-6), ("3", "msecond", 3e-3), ("2", "second", 2.0),
     ("1.5", "Gbyte", 1.5e9), ("7", "Kbyte", 7e3), ("66,176", "byte", 66176.0), ("31.5", "%", 31.5), ("2", "inst", 2.0),
     ("40", "register/thread", 40.0), ("n/a", "%", None), ("", "", None)],
)  # fmt: skip
def test_units_of_the_profiler(text, unit, value):
    assert ncu.in_base_units(text, unit) == (None if value is None else pytest.approx(value))


def test_a_profiler_that_printed_no_table_is_quoted():
    with pytest.raises(ValueError, match="the last it said: .*==ERROR== ERR_NVGPUCTRPERM"):
        ncu.parse("==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM")


def test_kernels_of_others_are_left_out():
    assert ncu.Launch("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor>(int)", {}).op is None
    assert ncu.Launch("restore_sgd", {}).op == "restore_sgd"
    assert ncu.Launch("void fsam::cuda::sum_slots_kernel<float>(const T1 *)", {}).op == "sum_slots"


@pytest.mark.parametrize(
    ("output", "figure"),
    [
        ("....\n===== 3 failed, 412 passed, 2 skipped in 71.20s (0:01:11) =====\n", "3 failed, 412 passed, 2 skipped in 71.20s (0:01:11)"),  # noqa: E501
        ("..\n2 passed, 5 deselected in 0.31s\n", "2 passed, 5 deselected in 0.31s"),
        ("12/45 tests collected (33 deselected) in 1.25s", "12/45 tests collected (33 deselected) in 1.25s"),
        ("bringing up nodes...\n..F...s [ 50%]\n..E", "7 passed and 2 failed until then"),
        ("ImportError: libcudart.so.13", "ImportError: libcudart.so.13"),
        ("", "it said nothing"),
    ],
)  # fmt: skip
def test_what_pytest_said(output, figure):
    assert figures.tests([], output) == figure


# ---- Passes and their model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["flat", "tiny"])
def test_the_passes_are_calls_of_the_ops(layout):
    """Here on the CPU: a signature that changed would else be noticed on the first GPU."""
    device = torch.device("cpu")
    made = gpu_check.Passes(passes.serving("cuda", device), device, torch.float32, 8192, layout)
    expected = {
        "noise_norm": 8, "perturb": 24, "restore": 8, "restore_sgd": 20, "count_steps": 0, "restore_adam": 28,
        "perturb_keeping": 28, "dots": 8, "project": 12, "update_ema_measuring": 12, "restore_sgd_reusing": 24,
        "restore_adam_reusing": 32,
    }  # fmt: skip
    assert {name: nbytes for name, (_, nbytes) in made.calls.items()} == expected
    for call, _ in made.calls.values():
        call()
    assert made.stats[0] > 0 and (made.steps == 2).all()


stub_gpu = test_bench_gpu.machine


def test_passes_are_timed_on_a_gpu_with_everything_queued_and_a_cold_cache(stub_gpu, tmp_path):
    """Every line that only a GPU would reach, with stubs for what torch asks of it."""
    stub_gpu.own_time = 1e-3
    path = tmp_path / "rows.csv"
    passes.main(["--backend", "cuda", "--device", "cpu", "--seconds", "0", "--out", str(path)])
    passes.main(["--backend", "cuda", "--device", "cpu", "--once"])
    times = [row for row in rows.read(path) if row.metric == "time"]
    assert len(times) == len(passes.DRY_CASES) * len(passes.OPS)
    assert all(row.median == pytest.approx(1000.0) for row in times)  # the stub's events
    timed = sum(row.samples for row in times) // len(passes.OPS) * (len(passes.OPS) + 1)  # and the copies
    assert stub_gpu.log.count("spin") == timed and stub_gpu.log[-1] == "wait"


def test_a_case_that_does_not_fit_is_named(stub_gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 0)
    passes.main(["--backend", "cuda", "--device", "cpu"])
    assert capsys.readouterr().out.count("not run, 0 GiB of the GPU's memory would be needed") == len(passes.DRY_CASES)


def test_the_facts_of_a_gpu(monkeypatch):
    numbers = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20, total_memory=80 << 30
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: numbers)
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 79 << 30)
    found = facts.of_gpu(torch.device("cuda"))
    assert found["capability"] == "9.0" and found["l2_bytes"] == 50 << 20 and found["free_bytes"] == 79 << 30
    said = "info\n" + json.dumps({"machine": "NVIDIA H100", "gpu": found, "versions": "python 3; torch 2.11.0"})
    assert figures.facts([], said) == "NVIDIA H100, sm_90, torch 2.11.0"


def test_a_backend_that_does_not_serve_says_why():
    with pytest.raises(SystemExit, match="backend 'cuda' does not serve meta: it serves cuda tensors only"):
        passes.serving("cuda", torch.device("meta"))


def measured(op: str, metric: str, unit: str, median: float, **other) -> rows.Row:
    values = {"workload": "flat 100M", "dtype": "fp32", "base": "", "machine": "NVIDIA H100 80GB HBM3", **other}
    name = passes.provider("cuda", op)
    return rows.Row(name, "cuda", metric=metric, unit=unit, median=median, q20=median, q80=median, samples=9,
                    device="cuda", **values)  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "expected", "says"),
    [("NVIDIA H100 80GB HBM3", "932 us", "0.9 of 3.35 TB/s"), ("NVIDIA GB1000", "1.4 ms", "what a copy reaches")],
)
def test_a_prediction_stands_beside_the_measurement(machine, expected, says):
    """That of the model for a GPU that it knows; for others a copy's rate: 2.8 GB at 2 TB/s, and a launch."""
    found = [
        measured("copy", "bandwidth", "GB/s", 2000.0, machine=machine),
        measured("restore_adam", "time", "us", 1000.0, machine=machine),
        measured("restore_adam", passes.SHARE, "%", 97.0, machine=machine),
        measured("restore_adam", "ncu instructions", "/parameter", 41.0, machine=machine),
    ]
    text = tables.model(found)
    assert f"| restore_adam, fp32 | 100M | 28 | {expected} | 1 ms | - | 97 % / - | 41 / - |" in text
    assert says in text


def test_a_page_stays_as_it_is_where_no_row_is_for_it():
    row = rows.Row("fsam_ext", "cuda", "gpt2", "fp32", "sgd", "host", "us", 1.0, 1.0, 1.0, 1, device="cuda")
    for _, make in merge.PAGES.values():
        with pytest.raises(ValueError, match="there are no rows of"):
            make([row])
