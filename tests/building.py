"""setup.py as the tests of the build see it, and the commands that they run."""

from __future__ import annotations

import runpy
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"))
CUDA = SETUP["CUDA"]


def run(command, **options):
    """Run a command and return its completed process, output as text."""
    return subprocess.run(list(map(str, command)), text=True, capture_output=True, **options)


def checked(command, **options):
    """Run a command that has to succeed and return what it printed."""
    result = run(command, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def no_compiler(folder):
    """A PATH without a compiler, and no CXX."""
    return {"PATH": str(folder), "CXX": ""}
