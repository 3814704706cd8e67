"""The one run on a GPU, walked without one: every stage, every way to fail, and where its rows go in the end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gpu_check, rows
from bench.gpu_run import merge, passes, runner, stages

ROOT = stages.ROOT
COMMAND = [sys.executable, str(ROOT / "bench/gpu_check.py")]
NAMES = [stage.name for stage in stages.STAGES]


# ---- The dry run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folder of a dry run of all stages, started as a user starts it; and what it printed."""
    folder = tmp_path_factory.mktemp("dry")
    command = [*COMMAND, "--dry-run", "--minutes", "9", "--out", str(folder), "--commit", "abc1234"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    log = (folder / "log.txt").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log[-5000:]}"
    return folder, done.stdout


def test_every_stage_is_walked_in_order(dry):
    folder, printed = dry
    found = json.loads((folder / "stages.json").read_text())
    assert [stage["stage"] for stage in found] == NAMES
    # The archive of Triton's kernels is made on purpose only, and then it is not made for an interpreter.
    bad = {stage["stage"] for stage in found if stage["verdict"] != runner.OK} - {"triton cache"}
    assert not bad, (folder / "table.txt").read_text()
    log = (folder / "log.txt").read_text()
    begun = [line[5:].partition(":")[0] for line in log.splitlines() if line.startswith("==== ")]
    assert begun == [name for name in NAMES if name in begun] and set(NAMES) - set(begun) <= {"triton cache"}
    assert printed.endswith((folder / "table.txt").read_text())


def test_the_table_fits_a_screen(dry):
    lines = (dry[0] / "table.txt").read_text().splitlines()
    assert len(lines) == len(NAMES) + 2 and max(map(len, lines)) <= 140
    by_stage = {line[:18].strip(): line for line in lines}
    assert f"torch {torch.__version__}" in by_stage["facts"]
    assert "% of a copy (fp32, flat 8192)" in by_stage["bandwidth cuda"]
    assert "C adam 63 instructions a parameter" in by_stage["ncu triton"]
    assert "ERROR SUMMARY: 0 errors" in by_stage["memcheck"]
    assert "passed" in by_stage["training tests"] and "passed" in by_stage["conformance triton"]
    assert "official" in by_stage["steps"] and "base" in by_stage["training steps"]


def test_what_it_leaves_can_be_carried_away(dry):
    """A few plain files, none large."""
    files = sorted(path.relative_to(dry[0]) for path in dry[0].rglob("*") if path.is_file())
    assert [str(path) for path in files] == ["facts.json", "log.txt", "ncu.csv", "rows.csv", "stages.json", "table.txt"]
    assert all((dry[0] / path).stat().st_size < 16 << 20 for path in files)


def test_every_measuring_stage_has_left_rows(dry):
    found = rows.read(dry[0] / "rows.csv")
    of = {(row.provider, row.metric) for row in found if row.median is not None}
    for backend in ("cuda", "triton"):
        for op in passes.OPS:
            name = passes.provider(backend, op)
            assert (name, "time") in of and ((name, passes.SHARE) in of) == (op != "count_steps")
            assert (name, "ncu instructions") in of or op == "count_steps" or op not in passes.PROFILED
    assert {("fsam_ext", "speedup_over official"), ("fsam_ext", "cost_over_base")} <= of


def test_the_facts_tell_the_machine_and_that_the_run_was_dry(dry):
    found = json.loads((dry[0] / "facts.json").read_text())
    assert found["dry_run"] and found["commit"] == "abc1234" and found["device"] == "cpu"
    assert found["nvidia_smi"].startswith("no GPU") and found["missing_backends"] == {}


def test_real_and_dry_figures_do_not_mix(dry):
    done = subprocess.run([*COMMAND, "--out", str(dry[0])], capture_output=True, text=True)
    assert done.returncode == 1 and "holds a dry run; name another folder" in done.stderr


def test_its_rows_go_into_a_repository(dry, tmp_path):
    """Into a copy: figures of a dry run say nothing of a GPU, and are refused elsewhere."""
    for page in merge.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    for turn in range(2):
        assert gpu_check.main(["--merge", str(dry[0]), "--root", str(tmp_path)]) == 0
        readme, model = ((tmp_path / page).read_text() for page in merge.PAGES)
        assert "no GPU has run them yet" not in readme and "No GPU has run the kernels yet" not in model
        assert readme.count("optimizer part of a step |") == readme.count("whole training step |") == 1, f"turn {turn}"
        assert model.count("| restore_adam, bf16 | 8192 | 22 |") == 1
        assert "abc1234" in readme or rows.commit() in readme  # the tree of this test may know its commit
    (path,) = (tmp_path / "bench/results").glob("*.csv")
    assert rows.read(path) == [row for row in rows.read(path) if row.device == "cpu"]
    with pytest.raises(SystemExit, match="holds a dry run"):
        gpu_check.main(["--merge", str(dry[0])])


def as_if_real(dry: Path, folder: Path) -> Path:
    """A dry run's figures under the names that a GPU's have."""
    folder.mkdir()
    names = {"device": "cuda", "machine": "NVIDIA H200", "commit": ""}
    found = [row for row in rows.read(dry / "rows.csv") if row.device == "cpu"]
    found = [replace(row, workload=row.workload.removesuffix(" (tiny)"), **names) for row in found]
    rows.write(folder / "rows.csv", found)
    known = json.loads((dry / "facts.json").read_text()) | {
        "dry_run": False,
        "device": "cuda",
        "machine": "NVIDIA H200",
    }
    (folder / "facts.json").write_text(json.dumps(known))
    return folder


def test_rows_of_a_gpu_have_its_names_and_plots(dry, tmp_path):
    root = tmp_path / "root"
    for page in merge.PAGES:
        (root / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, root / page)
    assert gpu_check.main(["--merge", str(as_if_real(dry[0], tmp_path / "run")), "--root", str(root)]) == 0
    readme = (root / "README.md").read_text()
    assert "| GPT-2 124M, fp32, sgd | " in readme and "NVIDIA H200; fsam_ext" in readme and "; abc1234, " in readme
    names = {path.name for path in (root / "bench/results").iterdir()}
    assert {"nvidia-h200.csv", "nvidia-h200-cuda-speedup.svg", "nvidia-h200-cuda-bus.svg"} <= names


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="there is no facts.json"):
        gpu_check.main(["--merge", str(tmp_path)])


def test_an_unknown_stage_is_refused_with_the_known_ones():
    with pytest.raises(SystemExit, match="--only bandwith: there is no such stage; .*bandwidth cuda"):
        gpu_check.main(["--only", "bandwith", "--list"])


def test_stages_are_chosen_by_their_first_word(capsys):
    gpu_check.main(["--only", "bandwidth", "ncu cuda", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:20].strip() for line in lines] == ["bandwidth cuda", "bandwidth triton", "ncu cuda"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_real_run_says_so_and_begins_nothing_else(tmp_path):
    done = subprocess.run([*COMMAND, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    first, *others = json.loads((tmp_path / "stages.json").read_text())
    assert first["verdict"] == "failed" and "sees no GPU here" in first["figure"]
    assert {stage["verdict"] for stage in others} == {"absent"}
    assert all("sees no GPU here" in stage["figure"] for stage in others)
