"""Whatever happens to a stage of the run on a GPU, its verdict and everything before it are on disk."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu_run import budget, figures, runner, stages

ROOT = stages.ROOT


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


def test_stages_that_are_run_again_take_their_old_places(tmp_path):
    """And those of an earlier run into the same folder stay, in the table too."""
    walked(tmp_path, stage("a", "print('old')"), stage("b", "raise SystemExit('broken')"))
    code, found = walked(tmp_path, stage("b", "print('mended')"))
    assert code == 0
    assert [(name, f["verdict"], f["figure"]) for name, f in found.items()] == [
        ("a", "ok", "old"),
        ("b", "ok", "mended"),
    ]
    assert "old" in (tmp_path / "table.txt").read_text() and "mended" in (tmp_path / "log.txt").read_text()


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
    assert len(pids) == 2
    until(lambda: not any(map(alive, pids)))


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
    tell = "import json, pathlib; p = pathlib.Path({!r}); p.write_text(json.dumps({{**json.loads(p.read_text()), 'missing_backends': {{'cuda': 'it is not built'}}}}))"  # noqa: E501
    code, found = walked(
        tmp_path, stage("facts", tell.format(str(tmp_path / "facts.json"))),
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
    pids = [int(pid) for pid in text_of(tmp_path / "log.txt").split()[-2:]]
    until(lambda: not any(map(alive, pids)))


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
