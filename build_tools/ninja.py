"""Writes a build.ninja, statement by statement, and has ninja do what it says, one build at a time in a folder."""

import fcntl
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def escape(path: object) -> str:
    """Escape a path for a ninja file."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def quote(text: object) -> str:
    """Quote for the shell, inside a ninja command."""
    return shlex.quote(str(text)).replace("$", "$$")


class NinjaFile:
    """A build.ninja in ``build_dir``, relative to ``root``, which ninja runs from."""

    def __init__(self, root: Path, build_dir: Path) -> None:
        self.root, self.build_dir = root, build_dir
        self.lines = ["# Written by setup.py.", "ninja_required_version = 1.5"]
        self.lines.append(f"builddir = {escape(build_dir)}")

    def rule(self, name: str, command: str, depfile: bool = False) -> None:
        """Add a rule; with depfile, the headers that a source includes become dependencies."""
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, output: str, rule: str, inputs: list[str], flags: str = "") -> str:
        """Add one step and return the path of its output."""
        path = str(self.build_dir / output)
        self.lines.append(f"build {escape(path)}: {rule} {' '.join(map(escape, inputs))}")
        if flags:
            self.lines.append(f"  flags = {flags}")
        return path

    # NOTE [one build at a time]
    # Two ninjas in one folder write each other's log: objects lose their headers ("#deps 0") and stay as they are when
    # those change. ninja and its compilers inherit the lock, so it lasts as long as any of them writes.
    @contextmanager
    def written(self) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
        """Write the file and give a function that runs ninja on it; no other build runs in the folder meanwhile."""
        folder = self.root / self.build_dir
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"fsam_ext: another build runs in {folder}; this one waits until it ends.", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            file = folder / "build.ninja"
            file.write_text("\n".join(self.lines) + "\n")

            def run(ninja: str, *arguments: str, **options: object) -> subprocess.CompletedProcess:
                command = [ninja, "-f", str(file), *arguments]
                return subprocess.run(command, cwd=self.root, text=True, pass_fds=(lock.fileno(),), **options)

            yield run
