"""The suite itself: whatever becomes of one of its processes, a run ends, and fails; a group is in one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .sharing import GROUPS

pytest.importorskip("xdist", reason="pytest-xdist is not installed")

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
CONFTEST = """
import os
import pytest

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    if os.path.exists("late" + os.environ.get("PYTEST_XDIST_WORKER", "")):  # beyond pytest's own care
        raise KeyboardInterrupt
    return (yield)
"""
TESTS = """
import os, time
import pytest

@pytest.mark.parametrize("number", range(40))
def test(number):
    time.sleep(0.01)
    if number == 10:
        {}
"""


@pytest.mark.parametrize(
    "ends, said",
    [
        ("time.sleep(600)", r"Timeout \(0:00:02\)![^$]*in test\n"),
        ("os._exit(0)", "node down: Not properly terminated"),
        # The run that hung: a signal that came late, between two tests.
        ("open('late' + os.environ['PYTEST_XDIST_WORKER'], 'w'); raise KeyboardInterrupt", "keyboard-interrupted"),
    ],
    ids=["hangs", "crashes", "is interrupted"],
)
def test_a_process_that(ends, said, tmp_path):
    done = run(tmp_path, CONFTEST, TESTS.format(ends.replace("; ", "\n        ")), "-o", "faulthandler_timeout=2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"worker '\w+' crashed while running 'test_it.py::test\[10\]", done.stdout)
    assert re.search(said, done.stdout + done.stderr)


def run(folder: Path, conftest: str, tests: str, *more: str) -> subprocess.CompletedProcess:
    """A run of other tests in two processes, with the options of `make test`."""
    options = " ".join(re.findall(r"^PARALLEL\s*[:+]=(.*)$", MAKEFILE, re.MULTILINE))
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_it.py").write_text(tests)
    (folder / "pytest.ini").touch()
    command = [sys.executable, "-m", "pytest", *options.split(), "-n", "2", *more]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)


# ---- sharing.py ------------------------------------------------------------------------------------------------------

SHARED = """
import sys
sys.path.insert(0, {root!r})
from tests import sharing

sharing.GROUPS = ("test_it.py::test_together",)

def pytest_xdist_make_scheduler(config, log):
    return sharing.scheduler(config, log)
"""
WHERE = """
import os, time
import pytest

def test_together_first():
    where("together")

def test_together_second():
    where("together")

@pytest.mark.parametrize("number", range(3))
def test_alone(number):
    where("alone")

def where(name):
    time.sleep(0.5)
    open(f"{name} {os.environ['PYTEST_XDIST_WORKER']}", "w").close()
"""


def test_a_group_is_in_one_process(tmp_path):
    done = run(tmp_path, SHARED.format(root=str(ROOT)), WHERE)
    assert done.returncode == 0, done.stdout + done.stderr
    together, alone = ({path.name.split()[1] for path in tmp_path.glob(f"{name} *")} for name in ("together", "alone"))
    assert len(together) == 1 and alone - together


@pytest.mark.parametrize("beginning", GROUPS)
def test_a_group_names_tests_that_there_are(beginning):
    file, _, test = beginning.partition("::")
    assert (ROOT / file).exists()
    assert not test or f"\ndef {test}" in (ROOT / file).read_text()
