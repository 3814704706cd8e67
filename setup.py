"""Builds the two libraries of fsam_ext with ninja; docs/building.md explains the choices.

`fsam_ext/_C.abi3.so` (schema and CPU kernels) always builds; `fsam_ext/_C_cuda.abi3.so` builds
where nvcc is found. Both need LibTorch's stable ABI only and no Python.h: they are loaded with
`torch.ops.load_library`, so one binary serves every CPython and every torch from 2.10 on. torch is
located but never imported: only its headers and two shared libraries are needed.
"""

import filecmp
import importlib.util
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
OLDEST_NVCC = (12, 1)  # the first with 32,764 bytes of kernel parameters
# GPUs of 8.9 run what is compiled for 8.6, as they do in torch's own wheels: a seventh less to build and to ship.
DEFAULT_CUDA_ARCHITECTURES = ("75", "80", "86", "90", "100", "120")

# The leaf loops are compiled once per ISA and chosen at run time. -mfma is left out on purpose and
# contraction is off everywhere, so that every ISA rounds alike and gives the same bits; it costs
# nothing, because the loops wait for memory.
ISA_FLAGS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = "-mavx2 -mf16c"
    # g++ 12 takes the "undefined" operands in its own AVX-512 header for mistakes; clang does not
    # know that warning.
    ISA_FLAGS["avx512"] = (
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mf16c -mprefer-vector-width=512 "
        "-Wno-maybe-uninitialized -Wno-unknown-warning-option"
    )

# libc10 holds a copy of parts of the C++ library, without versions: the real one comes before it.
LIBRARIES = ("-ltorch_cpu", "-lstdc++", "-lc10")
TARGET = f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
# Without errno and trap semantics sqrt and comparisons vectorise; neither flag changes a result.
NUMERICS = "-ffp-contract=off -fno-math-errno -fno-trapping-math"
WARNINGS = "-Wall -Wextra"
OPTIMISED = "-O3"
# Line tables are enough for a stack trace, and full debug information makes g++ ten times slower on
# the inlined loops; checks that are calls instead of code in place take a third off its time. A null pointer
# crashes by itself, and an object's size is AddressSanitizer's.
SANITIZED = (
    "-g1 -O1 -fno-omit-frame-pointer -fsanitize=address,undefined "
    "-fno-sanitize=null,object-size -fno-sanitize-recover=undefined "
    "--param asan-instrumentation-with-call-threshold=0"
)


def fail(sentence: str) -> None:
    """End the build with one sentence for the user instead of a traceback."""
    raise SystemExit(f"fsam_ext: {sentence}")


@dataclass(frozen=True)
class Torch:
    """Where the headers and the library of an installed torch lie."""

    include: Path
    lib: Path

    @classmethod
    def find(cls) -> "Torch":
        """Locate torch for this interpreter, or say what to install."""
        oldest = ".".join(map(str, OLDEST_TORCH))
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            fail(
                f"torch is not installed for {sys.executable}, and its headers are needed to "
                f"build; run `pip install 'torch>={oldest}' ninja setuptools`, then "
                "`pip install --no-build-isolation .` again."
            )
        home = Path(spec.origin).parent
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


def find_compiler() -> str:
    """Return the C++ compiler's command line, once it has proved that it knows C++20.

    It is the one that CXX names (options and a launcher such as ccache included), else the first
    on PATH.
    """
    on_path = (name for name in ("g++", "c++", "clang++") if shutil.which(name))
    command = os.environ.get("CXX") or next(on_path, None)
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


def find_nvcc() -> tuple[str | None, str]:
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
    if (int(release[1]), int(release[2])) < OLDEST_NVCC:
        oldest = ".".join(map(str, OLDEST_NVCC))
        return None, f"{nvcc} is {release[1]}.{release[2]} and {oldest} is needed"
    return nvcc, ""


def cuda_sources() -> list[str]:
    """Sources of the CUDA library, relative to the root."""
    return relative("csrc/cuda/*.cu") + relative("csrc/cuda/*.cpp")


def plan_cuda(announce: Callable[[str], None]) -> str | None:
    """Return nvcc's path if the CUDA library is to be built, obeying FSAM_CUDA=auto|1|0."""
    wish = os.environ.get("FSAM_CUDA", "auto")
    if wish not in ("auto", "1", "0"):
        fail(f"FSAM_CUDA={wish!r} is not understood; use auto, 1 or 0.")
    if wish == "0":
        return None
    nvcc, reason = find_nvcc()
    if not cuda_sources():
        nvcc, reason = None, "there are no CUDA sources in csrc/cuda"
    if nvcc is None and wish == "1":
        fail(f"FSAM_CUDA=1 asks for the CUDA library, but {reason}; install it or use FSAM_CUDA=0.")
    if nvcc is None:
        announce(f"fsam_ext: builds without the CUDA library: {reason}.")
    return nvcc


def gencode_flags(requested: str | None, supported: set[str]) -> list[str]:
    """Translate a TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") into nvcc's -gencode flags.

    Without a request: every default architecture that this nvcc supports, and PTX of the last for
    GPUs to come.
    """
    if requested and requested.strip():
        wanted = []
        for item in re.split(r"[;,\s]+", requested.strip(" ;,")):
            parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
            if parts is None:
                fail(f"TORCH_CUDA_ARCH_LIST holds {item!r}; write numbers such as '8.0;9.0+PTX'.")
            wanted.append((parts[1] + parts[2] + parts[3], parts[4] is not None))
    else:
        known = [code for code in DEFAULT_CUDA_ARCHITECTURES if code in supported]
        wanted = [(code, code == known[-1]) for code in known]
    flags = []
    for code, ptx in wanted:
        if code.rstrip("af") not in supported:  # nvcc's list leaves the variants such as 90a out
            fail(f"this nvcc cannot compile for sm_{code}; change TORCH_CUDA_ARCH_LIST or the CUDA toolkit.")
        flags.append(f"-gencode=arch=compute_{code},code=sm_{code}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{code},code=compute_{code}")
    return flags


def relative(pattern: str) -> list[str]:
    """Glob from the root; relative names keep the path of the build machine out of binaries."""
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def escape(path: object) -> str:
    """Escape a path for a ninja file."""
    return re.sub(r"([$ :])", r"$\1", str(path))


class NinjaFile:
    """The text of a build.ninja, statement by statement."""

    def __init__(self, build_dir: Path) -> None:
        self.build_dir = build_dir
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

    def write(self) -> Path:
        """Write the file and return its path."""
        target = ROOT / self.build_dir / "build.ninja"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(self.lines) + "\n")
        return target


def quote(text: object) -> str:
    """Quote for the shell, inside a ninja command."""
    return shlex.quote(str(text)).replace("$", "$$")


def plan_cpu(ninja: NinjaFile, torch: Torch, compiler: str, sanitize: bool) -> str:
    """Add the steps of the CPU library; return the path of the library."""
    user = os.environ.get("CXXFLAGS", "").replace("$", "$$")
    flags = (
        f"{user} -std=c++20 {SANITIZED if sanitize else OPTIMISED} {NUMERICS} {WARNINGS} -fPIC "
        f"-fvisibility=hidden {TARGET} -fmacro-prefix-map={quote(torch.include)}/= -Icsrc "
        f"-isystem {quote(torch.include)}"
    )
    # A sanitized library finds its runtime when it is loaded; any other has to be complete here.
    link = SANITIZED if sanitize else "-Wl,-z,defs"
    user_link = os.environ.get("LDFLAGS", "").replace("$", "$$")
    ninja.rule("cxx", f"{compiler} {flags} $flags -MD -MF $out.d -c $in -o $out", depfile=True)
    libraries = f"-L{quote(torch.lib)} -Wl,--no-as-needed {' '.join(LIBRARIES)}"
    ninja.rule("link", f"{compiler} -shared {user_link} {link} -o $out $in {libraries}")
    leaf = "csrc/cpu/leaf_loops.cpp"
    available = " ".join(f"-DFSAM_HAVE_{isa.upper()}" for isa in ISA_FLAGS)
    objects = [
        ninja.build(f"{source}.o", "cxx", [source], available)
        for source in relative("csrc/*.cpp") + relative("csrc/cpu/*.cpp")
        if source != leaf
    ]
    objects += [
        ninja.build(f"{leaf}.{isa}.o", "cxx", [leaf], f"-DFSAM_ISA={isa} {isa_flags}".rstrip())
        for isa, isa_flags in ISA_FLAGS.items()
    ]
    return ninja.build("_C.abi3.so", "link", objects)


def plan_cuda_library(ninja: NinjaFile, torch: Torch, compiler: str, nvcc: str) -> str:
    """Add the steps of the CUDA library; return the path of the library."""
    said = subprocess.run([nvcc, "--list-gpu-code"], text=True, capture_output=True).stdout
    supported = set(re.findall(r"sm_(\w+)", said))
    gencode = gencode_flags(os.environ.get("TORCH_CUDA_ARCH_LIST"), supported)
    # A seventh smaller than -compress-all, which nvcc before 12.8 has to do with.
    knows_modes = "--compress-mode" in subprocess.run([nvcc, "--help"], text=True, capture_output=True).stdout
    compress = "--compress-mode=size" if knows_modes else "-Xfatbin=-compress-all"
    host = f"-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-fmacro-prefix-map={quote(torch.include)}/="
    base = f"{quote(nvcc)} -ccbin {quote(shlex.split(compiler)[-1])}"
    flags = (
        f"-std=c++20 -O3 -fmad=false -lineinfo {compress} {' '.join(gencode)} -Xcompiler={host} {TARGET} "
        f"-Icsrc -isystem {quote(torch.include)}"
    )
    # Line information holds the path of the source as it was given: by this one it is the same on every machine.
    ninja.rule("nvcc", f"{base} {flags} $flags -MD -MF $out.d -c /proc/self/cwd/$in -o $out", depfile=True)
    ninja.rule(
        "nvlink",
        # torch goes straight to the host linker: nvcc writes what it is told itself into the library.
        f"{base} -shared -cudart static -o $out $in "
        f"-Xlinker=-L{quote(torch.lib)},-z,defs,--exclude-libs=ALL,--no-as-needed,{','.join(LIBRARIES)}",
    )
    objects = [ninja.build(f"{source}.o", "nvcc", [source]) for source in cuda_sources()]
    return ninja.build("_C_cuda.abi3.so", "nvlink", objects)


def install(built: Path, target: Path) -> None:
    """Copy a library into place if it changed; atomically, as a process may still use the old."""
    if target.is_file() and filecmp.cmp(built, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy(built, fresh)
    os.replace(fresh, target)


class NinjaBuild(build_ext):
    """`build_ext` that leaves the work to ninja and puts the results where setuptools wants."""

    def finalize_options(self) -> None:
        """Keep objects in build/ninja: nothing in them depends on the Python version."""
        self.sanitize = os.environ.get("FSAM_SANITIZE", "0") == "1"
        if self.build_temp is None:
            self.build_temp = "build/ninja-sanitize" if self.sanitize else "build/ninja"
        super().finalize_options()

    def run(self) -> None:
        """Build every planned library."""
        if not sys.platform.startswith("linux"):
            fail(f"builds on Linux only so far, and this is {sys.platform}.")
        if self.sanitize and self.inplace:
            fail("FSAM_SANITIZE=1 does not build in place; give --build-lib as `make sanitize` does.")
        torch, compiler, ninja = Torch.find(), find_compiler(), find_ninja()
        nvcc = None if self.sanitize else plan_cuda(partial(self.announce, level=logging.INFO))

        plan = NinjaFile(Path(self.build_temp))
        libraries = {"fsam_ext._C": plan_cpu(plan, torch, compiler, self.sanitize)}
        if nvcc is not None:
            libraries["fsam_ext._C_cuda"] = plan_cuda_library(plan, torch, compiler, nvcc)
        jobs = os.environ.get("MAX_JOBS")
        command = [ninja, "-f", str(plan.write()), *(["-j", jobs] if jobs else [])]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            fail("the build failed; the compiler's own message is above.")

        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            if extension.name in libraries:
                install(ROOT / libraries[extension.name], target)
            else:
                # One left from an earlier build would not fit the schema of this one.
                target.unlink(missing_ok=True)
        self.extensions = [e for e in self.extensions if e.name in libraries]


if __name__ == "__main__":
    setup(
        # The sources are ninja's business; setuptools has to know the names, and that the wheel is
        # not pure.
        ext_modules=[
            Extension("fsam_ext._C", sources=[], py_limited_api=True),
            Extension("fsam_ext._C_cuda", sources=[], py_limited_api=True, optional=True),
        ],
        cmdclass={"build_ext": NinjaBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
