"""The benchmark's command: it runs from anywhere, loses nothing that it had, and a failure costs its own rows only."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import cases, providers, rows, run, steps
from bench.peers import Foreach, Official
from bench.workloads import TRAININGS, WORKLOADS

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def test_a_run_writes_rows_for_each_provider_and_says_what_it_did_not_run(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    out = tmp_path / "rows.csv"
    names = ["official", "foreach", "fsam_ext flat", "base"]
    argv = ["--workloads", "scale_1e03", "--providers", *names, "--seconds", "0", "--no-plots", "--out", str(out)]
    assert run.main(argv) == 0
    found = rows.read(out)
    steps = {row.provider for row in found if row.metric == "step" and row.median is not None}
    assert steps == {"fsam_ext", *names}
    assert {row.provider for row in found if row.metric == "bus_fraction"} == {"fsam_ext", *names} - {"base"}
    assert all(row.q20 <= row.median <= row.q80 for row in found if row.median is not None)
    if not torch.cuda.is_available():
        assert [row.note for row in found if row.device == "cuda"] == ["not run: this machine has no GPU"]


def test_figures_beside_busy_processes_are_figures_of_their_own(tmp_path):
    out = tmp_path / "rows.csv"
    argv = ["--workloads", "scale_1e03", "--providers", "official", "--seconds", "0", "--no-plots", "--out", str(out)]
    assert run.main(argv) == 0
    alone = [row for row in rows.read(out) if row.provider != "all"]
    assert run.main([*argv, "--busy", "1"]) == 0
    both = rows.read(out)
    assert all(row in both for row in alone)
    fresh = [row for row in both if row.provider != "all" and row not in alone]
    assert {row.provider for row in fresh} == {"official", "fsam_ext", "triad"}
    assert all(row.metric.endswith(", 1 busy") and row.unit in cases.TIMED for row in fresh)


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(SystemExit, match="gpt3.*gpt2"):
        run.main(["--workloads", "gpt3", "--out", str(tmp_path / "rows.csv")])
    with pytest.raises(SystemExit, match="there is no such provider.*official"):
        run.main(["--providers", "nobody", "--out", str(tmp_path / "rows.csv")])


def test_the_plan_is_short_without_full_and_has_every_combination_with_it():
    kinds = providers.all_providers(CPU)
    short, full = cases.plan(False, kinds, ["gpt2"]), cases.plan(True, kinds, ["gpt2"])
    combinations = {(case.work.name, case.dtype, case.base) for case in full}
    assert {(w, d, b) for w in WORKLOADS for d in cases.DTYPES for b in ("sgd", "adamw")} <= combinations
    assert len(short) < len(full)
    assert [case.work.name for case in short[:4]] == list(cases.HEADLINE)
    assert ["compiled" in case.providers for case in short[:4]] == [False, True, False, False]


def test_it_runs_from_anywhere_and_measures_its_own_checkout(tmp_path):
    """From a folder outside, without PYTHONPATH, a shrunk workload; the package that is compared may be missing."""
    out = tmp_path / "rows.csv"
    names = ["--providers", "official", "foreach", "pytorch_optimizer"]
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "--tiny", "--workloads", "gpt2", "--dtypes", "fp32"]
    command += ["--bases", "sgd", *names, "--seconds", "0", "--no-plots", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert f"measuring {ROOT / 'fsam_ext'}" in ended.stderr
    found = {row.provider: row for row in rows.read(out) if row.metric == "step"}
    assert all(found[name].median for name in ("fsam_ext", "official", "foreach"))
    assert found["official"].workload == "gpt2 (tiny)"
    if "pytorch_optimizer" in providers.missing_providers(CPU):
        note = "not run: it is not installed: pip install pytorch_optimizer"
        assert found["pytorch_optimizer"].note == note and f"pytorch_optimizer: {note}" in ended.stderr


def with_kinds(monkeypatch, **kinds):
    """The run has these providers besides fsam_ext."""
    ours = {"fsam_ext": providers.all_providers(CPU)["fsam_ext"]}
    monkeypatch.setattr(run, "all_providers", lambda device: {**ours, **kinds})


def arguments(out, *workloads):
    figures = ["--bases", "sgd", "--dtypes", "fp32", "--seconds", "0"]
    return ["--workloads", *workloads, *figures, "--no-plots", "--out", out]


class RaisesLater(Official):
    name = "later"
    calls = 0

    def descend(self):
        type(self).calls += 1
        if type(self).calls > 6:
            raise ValueError("of its own\nand more")
        super().descend()


class RaisesWhenMade(Official):
    name = "made"

    def __init__(self, *args):
        raise RuntimeError("cannot be made")


@pytest.mark.parametrize("workload", ["scale_1e03", "train_resnet50"])
def test_a_provider_that_raises_costs_its_own_rows_only(tmp_path, monkeypatch, workload):
    monkeypatch.setattr(cases, "IN_TRAINING", ("fsam_ext", "official", "foreach", "base"))
    monkeypatch.setattr(RaisesLater, "calls", 0)
    with_kinds(monkeypatch, official=RaisesLater, foreach=RaisesWhenMade, base=Official)
    out = tmp_path / "rows.csv"
    assert run.main([*arguments(str(out), workload), "--tiny", "--dtypes", "fp32", "autocast"]) == 0
    found = [row for row in rows.read(out) if row.workload == f"{workload} (tiny)"]
    notes = {row.provider: row.note for row in found if row.note}
    assert notes == {
        "official": "not run: ValueError: of its own",
        "foreach": "not run: RuntimeError: cannot be made",
    }
    assert {row.metric for row in found if row.provider in notes} == {"step"}
    assert {row.provider for row in found if row.metric == "step" and row.median} == {"fsam_ext", "base"}
    assert not any(name in row.metric for row in found for name in notes)


def test_a_workload_that_raises_costs_its_own_rows_only(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measure_training", lambda case, context: 1 / 0)
    out = tmp_path / "rows.csv"
    assert run.main([*arguments(str(out), "train_convnet", "scale_1e03"), "--providers", "official"]) == 0
    found = {(row.workload, row.provider): row for row in rows.read(out) if row.metric == "step"}
    assert found["train_convnet", "all"].note == "not run: ZeroDivisionError: division by zero"
    assert found["scale_1e03", "fsam_ext"].median is not None


def test_a_run_that_is_killed_while_something_compiles_keeps_what_it_had(tmp_path, monkeypatch):
    class Killed(Foreach):
        name = "compiled"
        compiles = True

        def ascend(self):
            raise KeyboardInterrupt

    with_kinds(monkeypatch, official=Official, compiled=Killed)
    out = tmp_path / "rows.csv"
    with pytest.raises(KeyboardInterrupt):
        run.main([*arguments(str(out), "resnet18"), "--tiny", "--threads", "1", "--compile", "resnet18"])
    found = rows.read(out)
    assert {row.provider for row in found if row.metric == "step" and row.median} == {"fsam_ext", "official"}
    assert any(row.metric == "speedup_over official" and row.provider == "fsam_ext" for row in found)


def test_nothing_starts_when_the_time_is_used_up_and_the_rows_say_so(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    assert run.main([*arguments(str(out), "scale_1e03", "scale_1e04"), "--minutes", "1e-9"]) == 0
    found = {row.workload: row.note for row in rows.read(out) if row.workload.startswith("scale")}
    assert found == dict.fromkeys(("scale_1e03", "scale_1e04"), "not run: the time was used up; see --minutes")
    assert "scale_1e04 fp32 sgd all: not run: the time was used up" in capsys.readouterr().err


def test_time_that_ends_between_groups_leaves_the_figures_of_the_first(monkeypatch):
    kinds = providers.all_providers(CPU)
    work = WORKLOADS["gpt2"].tiny()
    needed = {name: kinds[name].buffers * work.numel * 4 for name in ("fsam_ext", "official", "foreach")}
    # Room for the two that are in each group and one more, of which four fifths are used, beside the gradients.
    monkeypatch.setattr(steps, "available_bytes", lambda device: (sum(needed.values()) + 4 * work.numel * 4) * 1.25 + 9)
    context = cases.Run(CPU, kinds, time.monotonic() + 60, lambda text: None)
    case = cases.Case(work, "fp32", "sgd", ("fsam_ext", "official", "foreach", "base", "sam"), 0.0)
    groups = steps.measure_steps(case, context)
    first = {row.provider for row in next(groups) if row.metric == "step" and row.median}
    assert first == {"fsam_ext", "official", "foreach"}
    object.__setattr__(context, "deadline", 0.0)
    *_, last = groups
    found = {row.provider: row for row in last if row.metric == "step"}
    assert {name for name, row in found.items() if row.median} == first
    assert {name for name, row in found.items() if row.note} == {"base", "sam"}


def test_who_is_there_again_is_not_missing_any_more(tmp_path):
    out = tmp_path / "rows.csv"
    rows.write(out, [cases.nowhere_row("official", "torch", "it was away", "cpu")])
    assert run.main([*arguments(str(out), "scale_1e03"), "--providers", "official"]) == 0
    assert not any("away" in row.note for row in rows.read(out))


def test_a_model_of_a_gpus_size_is_run_on_a_cpu_only_when_shrunk(tmp_path):
    large = [name for name, work in TRAININGS.items() if work.shrunk]
    assert large == ["train_gpt2", "train_resnet50"]
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="train_gpt2: it is of a GPU's size.*--tiny"):
            run.main(["--workloads", "train_gpt2", "--out", str(tmp_path / "rows.csv")])
    kinds = providers.all_providers(CPU)
    assert not {case.work.name for case in cases.plan(False, kinds, [])} & set(large)
    assert set(large) <= {case.work.name for case in cases.plan(False, kinds, [], large=True)}


def test_shrunk_workloads_need_a_file_of_their_own():
    with pytest.raises(SystemExit, match="--tiny.*--out"):
        run.main(["--tiny"])


@pytest.mark.parametrize("works", [WORKLOADS, TRAININGS])
def test_a_shrunk_workload_is_small_and_says_so(works):
    for name, work in works.items():
        tiny = work.tiny()
        assert tiny.name == f"{name} (tiny)"
        if works is WORKLOADS:
            assert 0 < tiny.numel < 20_000
        elif work.shrunk:
            model = tiny.model()
            assert sum(param.numel() for param in model.parameters()) < 100_000
            assert model(tiny.batch(CPU)).isfinite()


@pytest.mark.parametrize(("name", "millions", "tensors"), [("train_gpt2", 124.48, 148), ("train_resnet50", 25.56, 161)])
def test_models_of_a_gpus_size_have_the_published_number_of_parameters(name, millions, tensors):
    with torch.device("meta"):
        params = list(TRAININGS[name].model().parameters())
    assert len(params) == tensors
    assert sum(param.numel() for param in params) / 1e6 == pytest.approx(millions, abs=0.01)
