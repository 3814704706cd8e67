"""The one run on a GPU, walked without one: every stage, every way to fail, and where its rows go in the end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_check, rows
from bench.gpu_run import budget, figures, merge, ncu, passes, runner, stages, tables

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
    assert "96/97 tests" not in lines[1] and "torch" in lines[1]
    by_stage = {line[:18].strip(): line for line in lines}
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
            assert op == "count_steps" or (name, "ncu instructions") in of
    assert {("fsam_ext", "speedup_over official"), ("fsam_ext", "cost_over_base")} <= of


def test_the_facts_tell_the_machine_and_that_the_run_was_dry(dry):
    facts = json.loads((dry[0] / "facts.json").read_text())
    assert facts["dry_run"] and facts["commit"] == "abc1234" and facts["device"] == "cpu"
    assert facts["nvidia_smi"].startswith("no GPU") and facts["missing_backends"] == {}


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
        assert readme.count("as a graph") == 1 and readme.count("base, two passes") == 1, f"turn {turn}"
        assert model.count("| restore_adam, bf16 | 8192 | 22 |") == 1
        assert "abc1234" in readme or rows.commit() in readme  # the tree of this test may know its commit
    (path,) = (tmp_path / "bench/results").glob("*.csv")
    assert rows.read(path) == [row for row in rows.read(path) if row.device == "cpu"]
    with pytest.raises(SystemExit, match="holds a dry run"):
        gpu_check.main(["--merge", str(dry[0])])


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


# ---- Whatever happens -----------------------------------------------------------------------------------------------


def python(code: str):
    return lambda setting, seconds: [sys.executable, "-I", "-c", code]


def stage(name: str, code: str, limit: float = 20, backend: str | None = None) -> stages.Stage:
    return stages.Stage(name, limit, python(code), figures.last_line, backend)


def walked(folder: Path, *some: stages.Stage, seconds: float = 60) -> tuple[int, dict[str, dict]]:
    """The exit status, and the verdicts by the stages' names as they are on disk."""
    setting = stages.Setting(folder, dry=True)
    runner.begin(setting, "")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        code = runner.Run(setting, some, seconds).all()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, {found["stage"]: found for found in json.loads((folder / "stages.json").read_text())}


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_stage_that_fails_does_so_alone(tmp_path, capsys):
    code, found = walked(
        tmp_path, stage("a", "print('fine')"), stage("b", "print('why'); raise SystemExit(3)"), stage("c", "print(7)")
    )
    assert code == 1
    assert [(f["verdict"], f["figure"]) for f in found.values()] == [
        ("ok", "fine"), ("failed", "status 3: why"), ("ok", "7")
    ]  # fmt: skip
    assert "why" in capsys.readouterr().out


def test_what_cannot_be_started_or_understood_is_a_verdict_too(tmp_path):
    def boom(found, output):
        raise KeyError("gone")

    nowhere = stages.Stage("nowhere", 20, lambda setting, seconds: ["/nowhere/at/all"], figures.last_line)
    strange = stages.Stage("strange", 20, python("print(1)"), boom)
    _, found = walked(tmp_path, nowhere, strange, stage("after", "print('fine')"))
    assert found["nowhere"]["verdict"] == "failed" and "could not be started" in found["nowhere"]["figure"]
    assert found["strange"]["verdict"] == "ok" and "not understood: KeyError('gone')" in found["strange"]["figure"]
    assert found["after"]["verdict"] == "ok"


HANGS = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-I", "-c", "import time; time.sleep(600)"], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


def test_a_stage_that_hangs_is_killed_at_its_limit_with_its_children(tmp_path):
    """Deaf to the request to end, and its child in a session of its own."""
    code, found = walked(tmp_path, stage("hangs", HANGS, limit=1.0), stage("after", "print('fine')"))
    assert code == 1 and found["hangs"]["verdict"] == "killed" and found["after"]["verdict"] == "ok"
    assert 1.0 <= found["hangs"]["seconds"] < 1.0 + 2 * budget.GRACE
    pids = [int(pid) for pid in found["hangs"]["figure"].split()]  # what it had printed is in the log
    assert len(pids) == 2 and not any(map(alive, pids))


def test_children_that_a_finished_stage_leaves_are_ended(tmp_path):
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)"
    _, found = walked(tmp_path, stage("leaves", code))
    until(lambda: not alive(int(found["leaves"]["figure"])))


def test_a_stage_gets_no_more_than_what_is_left(tmp_path):
    given = []

    def command(setting, seconds):
        given.append(seconds)
        return [sys.executable, "-I", "-c", "print('fine')"]

    greedy = stages.Stage("greedy", 600, command, figures.last_line)
    assert walked(tmp_path, greedy, seconds=100)[0] == 0
    assert 90 < given[0] <= 100 - budget.RESERVE


def test_without_time_stages_are_named_and_not_begun(tmp_path):
    code, found = walked(tmp_path, stage("a", "print('fine')"), stage("b", "print('fine')"), seconds=1.0)
    assert code == 1 and {f["verdict"] for f in found.values()} == {"no time"}
    assert "====" not in text_of(tmp_path / "log.txt")


def test_a_backend_that_is_missing_costs_its_own_stages(tmp_path):
    facts = "import json, pathlib; p = pathlib.Path({!r}); p.write_text(json.dumps({{**json.loads(p.read_text()), 'missing_backends': {{'cuda': 'it is not built'}}}}))"  # noqa: E501
    code, found = walked(
        tmp_path, stage("facts", facts.format(str(tmp_path / "facts.json"))),
        stage("a", "print('fine')", backend="cuda"), stage("b", "print('fine')", backend="triton"),
    )  # fmt: skip
    assert code == 0
    assert (found["a"]["verdict"], found["a"]["figure"]) == ("absent", "it is not built")
    assert found["b"]["verdict"] == "ok"


def test_a_tool_that_is_missing_costs_its_own_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "find", lambda name, path=None: None)
    (memcheck,) = (s for s in stages.STAGES if s.name == "memcheck")
    code, found = walked(tmp_path, memcheck, stage("after", "print('fine')"))
    assert code == 0 and found["memcheck"]["verdict"] == "absent" and "not found" in found["memcheck"]["figure"]


STOPPED = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}]
from bench.gpu_run import figures, runner, stages
def stage(name, code):
    return stages.Stage(name, 60, lambda setting, seconds: [sys.executable, "-I", "-c", code], figures.last_line)
setting = stages.Setting(Path({folder!r}), dry=True)
runner.begin(setting, "")
assert "torch" not in sys.modules, "the command has to work where torch does not"
sys.exit(runner.Run(setting, [stage("first", "print(42)"), stage("second", {code!r})], 60).all())
"""


def two_stages(folder: Path, code: str) -> subprocess.Popen:
    """A command that is in the second of two stages."""
    script = STOPPED.format(root=str(ROOT), folder=str(folder), code=code)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    until(lambda: re.search(r"==== second[^$]*\n\d+ \d+\n", text_of(folder / "log.txt")))
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_command_that_is_asked_to_end_leaves_everything_before(tmp_path, number):
    process = two_stages(tmp_path, HANGS)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    first, second = json.loads((tmp_path / "stages.json").read_text())
    assert (first["verdict"], first["figure"]) == ("ok", "42")
    assert (second["verdict"], second["figure"]) == ("stopped", f"by {signal.Signals(number).name}")
    assert printed.endswith((tmp_path / "table.txt").read_text())
    assert not any(map(alive, map(int, text_of(tmp_path / "log.txt").split()[-2:])))


def test_a_command_that_is_killed_takes_its_stage_along(tmp_path):
    """SIGKILL leaves it no word; the kernel ends the stage, and what was before is on disk."""
    process = two_stages(tmp_path, "import os, time; print(os.getpid(), os.getpid(), flush=True); time.sleep(600)")
    below = budget.descendants(process.pid)
    assert len(below) == 1
    process.kill()
    process.communicate()
    until(lambda: not any(map(alive, below)))
    assert "first" in (tmp_path / "table.txt").read_text()
    assert json.loads((tmp_path / "stages.json").read_text())[0]["figure"] == "42"


# ---- What tools print -----------------------------------------------------------------------------------------------


def recorded(backend: str) -> str:
    return (stages.STUBS / f"ncu_{backend}.csv").read_text()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_profilers_table_is_read(backend):
    """Around it stands what the profiler and the program say; its numbers have commas, some are n/a."""
    text = f'==PROF== Connected to process 1\nsome, "words"\n{recorded(backend)}==PROF== Disconnected\n'
    launches = ncu.parse(text)
    assert len(launches) == 12
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
    expected = {"noise_norm": 8, "perturb": 24, "restore": 8, "restore_sgd": 20, "count_steps": 0, "restore_adam": 28}
    assert {name: nbytes for name, (_, nbytes) in made.calls.items()} == expected
    for call, _ in made.calls.values():
        call()
    assert made.stats[0] > 0 and (made.steps == 2).all()


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


def test_kernels_that_were_compiled_elsewhere_are_found_where_they_are_unpacked(monkeypatch, tmp_path):
    (cache,) = (s for s in stages.STAGES if s.name == "triton cache")
    monkeypatch.setattr(stages, "TRITON_ARCHIVE", ROOT / "build/none")
    with pytest.raises(stages.Missing, match="no build/none: Triton compiles here"):
        cache.command(stages.Setting(tmp_path), 30)
    monkeypatch.setattr(stages, "TRITON_ARCHIVE", tmp_path)  # it is there
    command = cache.command(stages.Setting(tmp_path), 30)
    assert command[-1] == stages.Setting(tmp_path).environment["TRITON_CACHE_DIR"]
    assert "TRITON_INTERPRET" not in stages.Setting(tmp_path).environment
    assert stages.Setting(tmp_path, dry=True).environment["TRITON_INTERPRET"] == "1"
    assert str(ROOT) == stages.Setting(tmp_path).environment["PYTHONPATH"].split(os.pathsep)[0]
