"""Finds what a build needs: torch's headers, a compiler, ninja, nvcc. What is missing ends it with one sentence."""

import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 10)
COMPILERS = ("g++", "c++", "clang++")


def fail(sentence: str) -> None:
    """End the build with one sentence for the user instead of a traceback."""
    raise SystemExit(f"fsam_ext: {sentence}")


# NOTE [torch under build isolation]
# pip builds in a process from whose path it strikes the environment that it installs into, by a sitecustomize that
# PYTHONPATH leads to. The interpreter is that environment's all the same: started once more without Python's variables
# it sees what is installed there. Tools that build in an environment of their own leave the name of the active one.
def _origin_of_torch() -> str | None:
    spec = importlib.util.find_spec("torch")
    if spec is not None:
        return spec.origin
    active = (os.environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX"))
    program = "from importlib.util import find_spec; print(getattr(find_spec('torch'), 'origin', None) or '')"
    for python in (sys.executable, *(Path(home, "bin/python") for home in active if home)):
        if Path(python).is_file():
            # The root folder, as the current one is looked into first.
            said = subprocess.run([python, "-E", "-c", program], text=True, capture_output=True, cwd="/").stdout
            if said.strip():
                return said.strip()
    return None


@dataclass(frozen=True)
class Torch:
    """Where the headers and the library of an installed torch lie."""

    include: Path
    lib: Path

    @classmethod
    def find(cls) -> "Torch":
        """Locate torch for this interpreter, or say what to install; see NOTE [torch under build isolation]."""
        oldest = ".".join(map(str, OLDEST_TORCH))
        origin = _origin_of_torch()
        if origin is None:
            fail(
                f"torch is not installed for {sys.executable}, and its headers are needed to build; run "
                f"`pip install 'torch>={oldest}'` there and then this again, with --no-build-isolation (and ninja and "
                "setuptools installed) if torch is not seen all the same."
            )
        home = Path(origin).parent
        header = home / "include/torch/headeronly/version.h"
        text = header.read_text() if header.is_file() else ""
        parts = [re.search(rf"TORCH_VERSION_{p} (\d+)", text) for p in ("MAJOR", "MINOR")]
        version = tuple(int(part[1]) for part in parts if part)
        if version < OLDEST_TORCH:
            found = ".".join(map(str, version)) or "an older one"
            fail(
                f"torch {oldest} or later is needed for its stable ABI, but {home} holds {found}; "
                f"run `pip install 'torch>={oldest}'`."
            )
        return cls(home / "include", home / "lib")


def compiler_command() -> str | None:
    """Return the C++ compiler's command line, or None where there is none.

    It is the one that CXX names (options and a launcher such as ccache included), else the first on PATH.
    """
    return os.environ.get("CXX") or next((name for name in COMPILERS if shutil.which(name)), None)


def find_compiler() -> str:
    """Return the C++ compiler's command line, once it has proved that it knows C++20."""
    command = compiler_command()
    advice = "install g++ 11 or clang++ 14 or later, or name one with CXX="
    if command is None:
        fail(f"no C++ compiler was found on PATH; {advice}.")
    probe = "#include <concepts>\n#include <span>\nstatic_assert(__cplusplus >= 202002L);\n"
    try:
        result = subprocess.run(
            [*shlex.split(command), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"],
            input=probe,
            text=True,
            capture_output=True,
        )
    except OSError as error:
        fail(f"the C++ compiler {command!r} does not run ({error.strerror}); {advice}.")
    if result.returncode != 0:
        fail(f"the C++ compiler {command!r} does not compile C++20; {advice}.")
    return command


def find_ninja() -> str:
    """Return the path of ninja: the PyPI package's, else the one on PATH."""
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        packaged = shutil.which("ninja", path=ninja.BIN_DIR)
        if packaged:
            return packaged
    found = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if found is None:
        fail("ninja was not found; run `pip install ninja`.")
    return found


def find_nvcc(oldest: tuple[int, int]) -> tuple[str | None, str]:
    """Return (path of nvcc, "") or (None, the reason why no CUDA library can be built)."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [Path(home) / "bin" for home in homes if home]
    # A CUDA_HOME that is set is the user's choice: no other nvcc is looked for.
    search = os.pathsep.join(map(str, places)) if places else None
    nvcc = shutil.which("nvcc", path=search)
    if nvcc is None and not places:
        nvcc = shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None, "nvcc was not found in " + (search or "PATH or /usr/local/cuda/bin")
    said = subprocess.run([nvcc, "--version"], text=True, capture_output=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        return None, f"{nvcc} does not tell its version"
    if (int(release[1]), int(release[2])) < oldest:
        return None, f"{nvcc} is {release[1]}.{release[2]} and {'.'.join(map(str, oldest))} is needed"
    return nvcc, ""


def gpu_is_here() -> bool:
    """Whether NVIDIA's driver finds a GPU that this process may use."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
