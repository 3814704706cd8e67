"""A command in a process of its own: its output is on disk as it comes, and at its limit it ends, children too."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Between the request to end and the end: time for a traceback, not for more work.
GRACE = 2.0
# What the command itself needs after a stage: to kill it, and to write the table.
RESERVE = GRACE + 2.0

_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


class Budget:
    """Seconds that are left of what a whole run may take."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = now() + seconds

    @property
    def left(self) -> float:
        """Seconds for stages: the command's own share is taken off."""
        return self._end - self._now() - RESERVE

    def cut(self, limit: float) -> float:
        """A stage's limit, or what is left where that is less."""
        return min(limit, self.left)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit status (negative: by that signal), its seconds, and whether its time was up."""

    code: int
    seconds: float
    killed: bool


def _bound_to_its_parent() -> None:
    """Runs in the child: a group that can be killed as one, and no life beyond the command's own.

    A group and not a session: whoever kills this command's session has to get its stages too.
    """
    os.setpgid(0, 0)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The processes below one, those in groups and sessions of their own included."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, ahead = [], [pid]
    while ahead:
        below = parents.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def _signal(pids: Sequence[int], group: int, number: int) -> None:
    for send, target in [(os.killpg, group), *((os.kill, pid) for pid in pids)]:
        try:
            send(target, number)
        except (ProcessLookupError, PermissionError):
            continue


def _end(process: subprocess.Popen) -> None:
    """Ends a process and all that it has started, the patient way first."""
    below = descendants(process.pid)
    if process.poll() is None:
        _signal(below, process.pid, signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            below = [*below, *descendants(process.pid)]
    _signal(below, process.pid, signal.SIGKILL)
    process.wait()


def run(
    command: Sequence[str], limit: float, log: Path, folder: Path, environment: Mapping[str, str] | None = None
) -> Outcome:
    """Runs a command for at most ``limit`` seconds, its output appended to ``log`` as it comes.

    Whatever ends this call, an exception in this process too, ends the command and its children.
    """
    start = time.monotonic()
    with log.open("ab") as file:
        process = subprocess.Popen(
            list(command),
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=_bound_to_its_parent,
        )
        killed = False
        try:
            process.wait(max(0.0, limit))
        except subprocess.TimeoutExpired:
            killed = True
        finally:
            _end(process)
    return Outcome(process.returncode, time.monotonic() - start, killed)
