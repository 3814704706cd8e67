"""Builds the two libraries of fsam_ext with ninja; docs/building.md explains the choices.

`fsam_ext/_C.abi3.so` (schema and CPU kernels) builds where a C++ compiler is found, `fsam_ext/_C_cuda.abi3.so`
where nvcc is, too. Both need LibTorch's stable ABI only and no Python.h: they are loaded with
`torch.ops.load_library`, so one binary serves every CPython and every torch from 2.10 on. torch is
located but never imported: only its headers and two shared libraries are needed.
"""

import filecmp
import logging
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip's builds do not have it there

from build_tools.find import (  # noqa: E402
    OLDEST_TORCH,
    Torch,
    compiler_command,
    fail,
    find_compiler,
    find_ninja,
    find_nvcc,
    gpu_is_here,
)
from build_tools.ninja import NinjaFile, quote  # noqa: E402

CUDA = runpy.run_path(str(ROOT / "fsam_ext/_cuda_matrix.py"))
WISHES = {"FSAM_CPU": ("auto", "1", "0"), "FSAM_CUDA": ("auto", "gpu", "1", "0")}

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


def cuda_sources() -> list[str]:
    """Sources of the CUDA library, relative to the root."""
    return relative("csrc/cuda/*.cu") + relative("csrc/cuda/*.cpp")


def wish(variable: str) -> str:
    """Return what a variable of WISHES asks for, "auto" by default."""
    said, allowed = os.environ.get(variable, "auto"), WISHES[variable]
    if said not in allowed:
        fail(f"{variable}={said!r} is not understood; use {', '.join(allowed[:-1])} or {allowed[-1]}.")
    return said


def is_pure() -> bool:
    """Whether nothing is to be compiled: FSAM_CPU=0, or no compiler where no library was asked for.

    The reference and Triton's kernels need none, and `python -m fsam_ext.info` tells what is missing. A compiler that
    is there and fails is an error all the same.
    """
    cpu, cuda = wish("FSAM_CPU"), wish("FSAM_CUDA")
    if cpu == "0" and cuda == "1":
        fail("FSAM_CUDA=1 asks for the CUDA library, which needs the one that FSAM_CPU=0 leaves out.")
    if cpu == "0" or cuda == "1" or compiler_command() is not None:
        return cpu == "0"
    if cpu == "auto":
        logging.warning("fsam_ext: installs without compiled kernels: no C++ compiler was found on PATH.")
    return cpu == "auto"


def plan_cuda() -> str | None:
    """Return nvcc's path if the CUDA library is to be planned, or None with the reason on the screen."""
    asked = wish("FSAM_CUDA")
    if asked == "0":
        return None
    nvcc, reason = find_nvcc(CUDA["OLDEST_NVCC"])
    if not cuda_sources():
        nvcc, reason = None, "there are no CUDA sources in csrc/cuda"
    if nvcc is None and asked == "1":
        fail(f"FSAM_CUDA=1 asks for the CUDA library, but {reason}; install it or use FSAM_CUDA=0.")
    if nvcc is None:
        logging.info("fsam_ext: builds without the CUDA library: %s.", reason)
    return nvcc


def prerequisites() -> tuple[Torch, str, str, str | None]:
    """Return torch, the compiler, ninja and nvcc, or end with a sentence on what is missing."""
    if not sys.platform.startswith("linux"):
        fail(f"builds on Linux only so far, and this is {sys.platform}.")
    return Torch.find(), find_compiler(), find_ninja(), plan_cuda()


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
        codes = (capability.replace(".", "") for capability in CUDA["ARCHITECTURES"])
        known = [code for code in codes if code in supported]
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
        if wish("FSAM_CPU") == "0":
            return
        if self.sanitize and self.inplace:
            fail("FSAM_SANITIZE=1 does not build in place; give --build-lib as `make sanitize` does.")
        torch, compiler, ninja, nvcc = prerequisites()
        plan = NinjaFile(ROOT, Path(self.build_temp))
        libraries = {"fsam_ext._C": plan_cpu(plan, torch, compiler, self.sanitize)}
        later = {}
        if nvcc is not None and not self.sanitize:
            waits = wish("FSAM_CUDA") == "gpu" and not gpu_is_here()
            (later if waits else libraries)["fsam_ext._C_cuda"] = plan_cuda_library(plan, torch, compiler, nvcc)
        jobs = [f"-j{count}" for count in os.environ.get("MAX_JOBS", "").split()]
        with plan.written() as run:
            if run(ninja, *jobs, *libraries.values()).returncode != 0:
                fail("the build failed; the compiler's own message is above.")
            # What waits for a GPU stays as it is where it is up to date.
            said = {name: run(ninja, "-n", path, capture_output=True).stdout for name, path in later.items()}
            libraries |= {name: later[name] for name in said if "no work to do" in said[name]}
            self.put(libraries)

    def put(self, libraries: dict[str, str]) -> None:
        """Copy the libraries to their places, and remove those of earlier builds that are not among them."""
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            if extension.name in libraries:
                install(ROOT / libraries[extension.name], target)
            else:
                # One left from an earlier build would not fit the schema of this one.
                target.unlink(missing_ok=True)
        self.extensions = [e for e in self.extensions if e.name in libraries]


class CheckedInfo(dist_info):
    """`dist_info`, which pip asks for before it downloads what we require: gigabytes, where torch is missing."""

    def run(self) -> None:
        """Say what the build will miss now, not after the download."""
        prerequisites()
        super().run()


if __name__ == "__main__":
    # The sources are ninja's business; setuptools has to know the names, and that the wheel is not pure.
    extensions = [
        Extension("fsam_ext._C", sources=[], py_limited_api=True),
        Extension("fsam_ext._C_cuda", sources=[], py_limited_api=True, optional=True),
    ]
    commands = {"build_ext": NinjaBuild, "dist_info": CheckedInfo}
    options = {"bdist_wheel": {"py_limited_api": "cp310"}}
    if is_pure():
        extensions, commands, options = [], {"build_ext": NinjaBuild}, {}
    setup(ext_modules=extensions, cmdclass=commands, options=options)
