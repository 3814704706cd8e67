"""The suite itself: whatever becomes of one of its processes, `make test` ends, and fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist", reason="pytest-xdist is not installed")

MAKEFILE = (Path(__file__).parents[1] / "Makefile").read_text()
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
    options = " ".join(re.findall(r"^PARALLEL\s*[:+]=(.*)$", MAKEFILE, re.MULTILINE))
    for name, text in {"conftest.py": CONFTEST, "test_it.py": TESTS.format(ends.replace("; ", "\n        "))}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "pytest.ini").touch()
    command = [sys.executable, "-m", "pytest", *options.split(), "-n", "2", "-o", "faulthandler_timeout=2"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"worker '\w+' crashed while running 'test_it.py::test\[10\]", done.stdout)
    assert re.search(said, done.stdout + done.stderr)
