"""The benchmark suite measures what it says: one algorithm in all providers, honest statistics, rows that survive."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def bench():
    """Imports a module of the suite by name."""
    return lambda name: importlib.import_module(f"bench.{name}")


def small_work(bench):
    return bench("workloads").Workload("small", "small", ((7, 5), (33,), (4, 3, 2)))


def weights_after(bench, kind, base, steps=4):
    """A provider's weights after some steps with gradients that differ from step to step and from pass to pass."""
    work = small_work(bench)
    params = work.parameters(torch.float32, CPU)
    for param in params:
        param.grad = torch.zeros_like(param)
    provider = kind(params, base)
    for step in range(steps):
        for half, call in enumerate((provider.ascend, provider.descend)):
            for param, gradient in zip(params, work.gradients(torch.float32, CPU, seed=2 * step + half), strict=True):
                # The second gradient depends on where the ascent went, as a real one does.
                param.grad.copy_(gradient + (0.1 * param.detach() if half else 0))
            call()
    return [param.detach() for param in provider.params]


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["fsam_ext", "fsam_ext flat", "foreach"])
def test_every_provider_computes_what_official_does(bench, name, base):
    providers = bench("providers")
    kinds = providers.all_providers(CPU)
    expected = weights_after(bench, kinds["official"], bench("peers").BASES[base])
    found = weights_after(bench, kinds[name], bench("peers").BASES[base])
    for a, b in zip(found, expected, strict=True):
        # Weights of size .1 after eight roundings in float32; AdamW divides by small numbers.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if base == "adamw" else 1e-7)


def test_compiled_provider_compiles_the_ascent_that_foreach_runs(bench):
    peers = bench("peers")
    compiled = peers.Compiled([torch.nn.Parameter(torch.ones(3))], peers.BASES["sgd"])
    assert compiled._ascent._torchdynamo_orig_callable is peers.foreach_ascent


def test_sam_and_base_are_not_taken_for_fsam(bench):
    kinds = bench("providers").all_providers(CPU)
    assert not kinds["sam"].is_fsam and not kinds["base"].is_fsam
    assert all(kinds[name].is_fsam for name in ("official", "foreach", "compiled", "fsam_ext", "fsam_ext flat"))


@pytest.mark.parametrize(
    ("dtype", "base", "expected"),
    [
        (torch.float32, "sgd", 8 + 24 + 20),
        (torch.float32, "adamw", 8 + 24 + 28),
        (torch.bfloat16, "sgd", (2 + 4) + (2 + 4 + 2 + 4 + 2 + 2) + (2 + 2 + 4 + 2 + 4)),
    ],
)
def test_bytes_per_parameter_are_those_of_the_three_passes(bench, dtype, base, expected):
    assert bench("peers").bytes_per_parameter(dtype, base) == expected


def test_bytes_per_parameter_with_masters_and_averages_of_fewer_bits(bench):
    moved, bf16 = bench("peers").bytes_per_parameter, torch.bfloat16
    # Pass A: g, m. Pass B: g, m, w, master, and m, w'. Pass C: g, master, momentum, and master, momentum, w.
    assert moved(bf16, "sgd", True) == (2 + 4) + (2 + 4 + 2 + 4 + 4 + 2) + (2 + 4 + 4 + 4 + 4 + 2)
    assert moved(bf16, "sgd", True, bf16) == moved(bf16, "sgd", True) - 3 * 2
    assert moved(torch.float32, "adamw", False, torch.int8) == 60 - 3 * (4 - 1 - 4 / 128)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("base", torch.float32, 4),
        ("fsam_ext", torch.float32, 12),
        ("fsam_ext int8", torch.float32, 9 + 4 / 128),
        ("fsam_ext masters", torch.bfloat16, 12),
        ("fsam_ext masters, int8", torch.bfloat16, 9 + 4 / 128),
        ("official", torch.float32, 8),
    ],
)
def test_the_state_that_a_provider_keeps_is_counted(bench, name, dtype, expected):
    """Of SGD with momentum. The official code keeps its average and momentum; its backup becomes the weights."""
    steps, providers = bench("steps"), bench("providers")
    work = bench("workloads").Workload("large", "large", ((512, 1024),) * 2)
    kind = providers.all_providers(CPU)[name]
    found = steps._footprint(kind, work, work.gradients(dtype, CPU), bench("peers").BASES["sgd"])
    assert found["state"] == pytest.approx(expected, abs=0.05)
    assert found["state_peak"] >= found["state"]


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet18", 11.69), ("vit_b_16", 86.57), ("gpt2", 124.44), ("tensors_1000", 1.024), ("tensors_10000", 0.64)],
)
def test_workloads_have_the_published_number_of_parameters(bench, name, millions):
    assert bench("workloads").WORKLOADS[name].numel / 1e6 == pytest.approx(millions, abs=0.01)


def test_scaling_covers_the_sizes_it_is_named_after(bench):
    works = bench("workloads").scaling(3e8)
    assert [work.numel for work in works] == [float(work.name.removeprefix("scale_")) for work in works]
    assert [work.numel for work in works] == [10**3, 10**4, 10**5, 10**6, 10**7, 10**8, 3 * 10**8]


def test_quantiles_interpolate(bench):
    q = bench("measure").quantiles([5, 1, 4, 2, 3, 6])
    assert (q.median, q.q20, q.q80, q.samples) == (3.5, 2.0, 5.0, 6)


def test_candidates_run_in_turn(bench):
    order = []

    def candidate(name):
        return lambda: order.append(name) or {"step": 1.0}

    rounds = bench("measure").alternate({n: candidate(n) for n in "abc"}, seconds=0, min_rounds=3)
    assert "".join(order) == "abcabcabc"
    assert len(rounds) == 3


def test_ratios_pair_what_ran_in_the_same_round(bench):
    rounds = [
        {"ours": {"step": 1.0}, "peer": {"step": 3.0}},
        {"ours": {"step": 10.0}, "peer": {"step": 30.0}},  # the machine was slow: the ratio is the same
        {"ours": {"step": 1.0}},
    ]
    assert bench("measure").paired_ratios(rounds, "ours", "peer") == [3.0, 3.0]


def test_memory_counts_allocations_and_their_peak(bench):
    x = torch.ones(1 << 20)

    def two_of_four_mebibytes_live_at_once():
        a = torch.empty_like(x)
        b = torch.empty_like(x)
        del a
        c = torch.empty_like(x)
        del b, c

    (memory,) = bench("measure").memory_of([two_of_four_mebibytes_live_at_once], CPU)
    assert (memory.allocations, memory.peak_bytes) == (3, 2 * (4 << 20))


def test_calls_are_counted(bench):
    x = torch.ones(3)
    assert bench("measure").count_calls(lambda: x.add(1).mul_(2)) == 2


def test_a_triad_counts_the_read_that_an_ordinary_store_makes(bench):
    triad = bench("measure").Triad(4000, CPU)
    assert triad.bytes == 4 * 4000
    assert triad()["bytes_per_second"] > 0
    assert triad.a[0] == 2.0


def test_groups_fit_and_hold_the_anchors(bench):
    sizes = {"ours": 2, "official": 3, "a": 4, "b": 4, "c": 1}
    groups = bench("steps").groups_that_fit(sizes, sizes, ("ours", "official"), room=10)
    assert groups == [["ours", "official", "a"], ["ours", "official", "b", "c"]]


def make_row(bench, **changes):
    values = {
        "provider": "fsam_ext",
        "backend": "cpu",
        "workload": "gpt2",
        "dtype": "fp32",
        "base": "sgd",
        "metric": "step",
        "unit": "ms",
        "median": 2.0,
        "q20": 1.0,
        "q80": 3.0,
        "samples": 5,
        "device": "cpu",
        "note": 'with "quotes", and commas',
    }
    return bench("rows").Row(**{**values, **changes})


def test_rows_survive_the_file(bench, tmp_path):
    rows = bench("rows")
    written = [make_row(bench), make_row(bench, provider="triad", median=None, q20=None, q80=None, samples=0)]
    rows.write(tmp_path / "rows.csv", written)
    assert rows.read(tmp_path / "rows.csv") == written


def test_a_new_row_replaces_the_old_one_of_the_same_figure(bench):
    old = [make_row(bench), make_row(bench, metric="ascend")]
    new = [make_row(bench, median=1.5)]
    assert [row.median for row in bench("rows").merge(old, new)] == [1.5, 2.0]


def test_a_file_with_other_columns_is_refused(bench, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("provider,milliseconds\nfsam_ext,1\n")
    with pytest.raises(ValueError, match="columns"):
        bench("rows").read(path)


def test_the_table_derives_from_the_rows(bench):
    rows = [
        make_row(bench),
        make_row(bench, provider="official", median=20.0),
        make_row(bench, metric="speedup_over official", median=10.0),
        make_row(bench, metric="bus_fraction", median=0.93),
    ]
    line = next(line for line in bench("plots").table(rows).splitlines() if line.startswith("| GPT-2"))
    assert line == "| GPT-2 124M | 20 ms | - | - | - | **10x** | - | 0.93 / - |"


def test_the_table_of_training_has_everyones_step_over_plain_trainings(bench):
    def row(provider, metric, median):
        changes = {"workload": "train_gpt2", "dtype": "autocast", "base": "adamw", "device": "cuda"}
        return make_row(bench, provider=provider, metric=metric, median=median, **changes)

    rows = [row("plain", "step", 100.0), row("base", "cost_over_plain", 1.9), row("fsam_ext", "cost_over_plain", 1.95)]
    line = next(line for line in bench("plots").training_table(rows).splitlines() if line.startswith("| GPT-2"))
    assert line == "| GPT-2 124M, 8 sequences of 1,024 | 100 ms | 1.9x | - | - | - | - | - | **1.95x** | - | - |"


def test_the_table_of_a_gpu_has_peers_as_graphs_beside_ours(bench):
    def row(provider, metric, median):
        return make_row(bench, provider=provider, metric=metric, median=median, device="cuda")

    rows = [
        row("fsam_ext", "step", 1.0),
        row("official", "step", 9.0),
        row("foreach graph", "speedup_over official", 4.0),
    ]
    rows += [row("fsam_ext graph", "speedup_over official", 9.5)]
    head, _, line, *_ = bench("plots").table(rows).splitlines()
    found = dict(zip(head.split(" | "), line.split(" | ")))
    assert (found["foreach graph"], found["fsam_ext graph"]) == ("4x", "**9.5x**")


def test_the_readme_keeps_everything_around_the_table(bench):
    plots = bench("plots")
    begin, end = "<!-- bench:begin -->", "<!-- bench:end -->"
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    assert plots.put_between_markers(text, "bench", "new") == f"before\n{begin}\nnew\n{end}\nafter\n"
    with pytest.raises(ValueError, match="once each"):
        plots.put_between_markers("no markers", "bench", "new")


def test_the_table_of_state_has_what_was_measured(bench):
    def row(metric, median, **other):
        return make_row(bench, workload="resnet18", metric=metric, median=median, **other)

    rows = [row("state", 12.0), row("state_peak", 12.5), row("state", 1.0, provider="official")]
    page = "a\n<!-- footprint:begin -->\n<!-- footprint:end -->\nb"
    lines = bench("plots").fill(page, rows).splitlines()
    assert "| fsam_ext | 12.00 / 12.50 | - | - | - |" in lines
    assert not any(line.startswith("| official") for line in lines)  # one figure of two
    assert lines[0] == "a" and lines[-1] == "b"


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md", "docs/mixed-precision.md"])
def test_a_pages_table_is_the_one_that_its_rows_make(bench, name):
    """Of the machine that its caption names."""
    page = (ROOT / name).read_text()
    files = [bench("rows").read(path) for path in sorted(bench("rows").RESULTS.glob("*.csv"))]
    (rows,) = (rows for rows in files if rows[0].machine in page)
    assert bench("plots").fill(page, rows) == page
