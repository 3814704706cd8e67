"""pip installs from the source tree and from the sdist, with and without torch and a compiler: ``make install-check``.

Every way is one that a user may take, through pip itself, in environments under build/install-check.
"""

import argparse
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from .commands import ROOT, checked, find_python, fresh_environment, run, ten_steps

FOLDER = ROOT / "build/install-check"
WAYS: dict[str, Callable[["Place"], None]] = {}


class Place:
    """An environment with torch, and the source as the sdist has it."""

    def __init__(self, python: Path, torch: str) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        checked(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", FOLDER, cwd=ROOT)
        self.sdist = max(FOLDER.glob("*.tar.gz"), key=lambda file: file.stat().st_mtime)
        with tarfile.open(self.sdist) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # late 3.10 and later
            tar.extractall(FOLDER)
        self.source = FOLDER / self.sdist.name.removesuffix(".tar.gz")
        self.python = python
        self.interpreter = fresh_environment(FOLDER / "with torch", python, f"torch=={torch}", "numpy")
        # What hides a compiler hides nvcc too.
        self.no_compiler = {"PATH": str(self.interpreter.parent), "CXX": "", "FSAM_CUDA": "auto"}

    def pip(self, *arguments: object, interpreter: Path | None = None, **environment: str) -> tuple[int, str]:
        """`pip install`, without CUDA unless it is asked for; its status and what it printed."""
        environment = {"FSAM_CUDA": "0", "CXX": os.environ.get("CXX", ""), **environment}
        done = run(interpreter or self.interpreter, "-m", "pip", "install", *arguments, env=environment)
        return done.returncode, done.stdout

    def installed(self, *arguments: object, backends: tuple[str, ...] = ("cpu",), **environment: str) -> str:
        """`pip install`, ten steps, `info`, which is returned; and uninstalled again."""
        status, said = self.pip(*arguments, **environment)
        assert status == 0, said
        program = ten_steps(*backends) + "\nfrom fsam_ext import info; print(info.describe('cpu'))\n"
        info = checked(self.interpreter, "-c", program)
        print(
            "  " + "; ".join(line for line in info.splitlines() if line.startswith(("torch", "ten steps"))), flush=True
        )
        checked(self.interpreter, "-m", "pip", "uninstall", "--yes", "fsam_ext")
        assert f"cpu is served by '{(*backends, 'reference')[0]}'" in info, info
        return info

    def refused(self, sentence: str, *arguments: object, **options: object) -> None:
        """`pip install` that has to fail, with a sentence that holds this."""
        status, said = self.pip(*arguments, **options)
        found = [line for line in said.splitlines() if "fsam_ext: " in line and sentence in line]
        assert status != 0 and found and "Traceback" not in said, said
        print(f"  {found[-1].strip()}", flush=True)


def way(function: Callable[[Place], None]) -> Callable[[Place], None]:
    """Add a way to install."""
    WAYS[function.__name__] = function
    return function


@way
def plainly(place: Place) -> None:
    """pip install ."""
    assert "missing" not in place.installed(place.source)


@way
def editable(place: Place) -> None:
    """pip install -e ."""
    place.installed("-e", place.source)
    for library in place.source.glob("fsam_ext/*.so"):
        library.unlink()


@way
def from_the_sdist(place: Place) -> None:
    """pip install fsam_ext-*.tar.gz"""
    place.installed(place.sdist)


@way
def without_isolation(place: Place) -> None:
    """pip install --no-build-isolation ."""
    checked(place.interpreter, "-m", "pip", "install", "setuptools>=77", "ninja")
    place.installed("--no-build-isolation", place.source)


@way
def without_a_compiler(place: Place) -> None:
    """pip install . where there is no compiler: pure Python, and `info` tells what is missing"""
    info = place.installed(place.source, backends=(), **place.no_compiler)
    assert "The compiled kernels are missing: install g++" in info, info


@way
def editable_without_a_compiler(place: Place) -> None:
    """pip install -e . where there is no compiler"""
    place.installed("-e", place.source, backends=(), **place.no_compiler)


@way
def asked_for_without_a_compiler(place: Place) -> None:
    """FSAM_CPU=1 or FSAM_CUDA=1 where there is no compiler: refused"""
    for wish in ({"FSAM_CPU": "1"}, {"FSAM_CUDA": "1"}):
        place.refused("no C++ compiler was found on PATH", place.source, **{**place.no_compiler, **wish})


@way
def with_a_compiler_that_fails(place: Place) -> None:
    """A compiler that is there and fails: refused"""
    place.refused("the build failed", place.source, CXXFLAGS="-fno-such-option")
    place.refused("does not compile C++20", place.source, CXX="false")


@way
def without_torch(place: Place) -> None:
    """pip install . where torch is not installed: refused before anything is downloaded"""
    empty = fresh_environment(FOLDER / "without torch", place.python)
    place.refused("torch is not installed", place.source, interpreter=empty, VIRTUAL_ENV="", CONDA_PREFIX="")


def main() -> None:
    """Goes through the ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--torch", default="2.15.0")
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    arguments = parser.parse_args()
    python = find_python(arguments.python)
    if python is None:
        sys.exit(f"fsam_ext: Python {arguments.python} was found neither on PATH nor in ~/.pyenv/versions.")
    place = Place(python, arguments.torch)
    for name in arguments.only:
        print(f"{name}: {WAYS[name].__doc__}", flush=True)
        WAYS[name](place)
    print(f"{len(arguments.only)} ways, all as they should be")


if __name__ == "__main__":
    main()
