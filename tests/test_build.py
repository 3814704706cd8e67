"""What the build promises: stable-ABI binaries that round alike on every ISA, packages that are
complete, rebuilds of what changed and nothing else."""

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from .building import ROOT, SETUP, checked, no_compiler, run

LIBRARIES = sorted((ROOT / "fsam_ext").glob("_C*.abi3.so"))

x86_64 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="other machines have the baseline ISA only",
)


# The binaries


def test_the_cpu_library_was_built_in_the_tree():
    assert ROOT / "fsam_ext/_C.abi3.so" in LIBRARIES


@pytest.fixture(scope="module")
def shim_functions():
    """Names of the C functions that torch's stable headers declare for torch 2.10."""
    torch = SETUP["Torch"].find()
    source = "#include <torch/csrc/stable/c/shim.h>\n#include <torch/csrc/stable/ops.h>\n"
    command = [*SETUP["find_compiler"]().split(), "-std=c++20", "-E", "-P", "-x", "c++"]
    text = checked([*command, SETUP["TARGET"], "-isystem", torch.include, "-"], input=source)
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))


def test_the_headers_were_read_for_torch_2_10(shim_functions):
    assert {"torch_library_impl", "aoti_torch_get_sizes"} <= shim_functions
    assert "torch_from_blob" not in shim_functions  # came with 2.11


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_needs_nothing_of_torch_but_the_stable_shim(library, shim_functions):
    table = checked(["nm", "-D", "--undefined-only", library])
    lines = [line.split() for line in table.splitlines()]
    # System libraries version their symbols (memcpy@GLIBC_2.14) and torch does not; weak ones may
    # stay undefined.
    needed = {name for kind, name in lines if kind == "U" and "@" not in name}
    assert "torch_library_impl" in needed
    assert needed - shim_functions == set()
    beyond = {name for kind, name in lines if kind == "w" and name.startswith("_ZN") and "@" not in name}
    # csrc/held.h, NOTE [symbols outside the stable ABI]
    grad, bump_version = "_ZNK3c1010TensorImpl4gradEv", "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"
    is_neg = "_ZN2at6native6is_negERKNS_6TensorE"
    assert beyond == ({grad, bump_version, is_neg} if library.name.startswith("_C.") else {grad})


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_holds_no_path_of_the_build_machine(library):
    dynamic = checked(["readelf", "-d", library])
    assert "libtorch_cpu.so" in dynamic
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    content = library.read_bytes()
    assert os.fsencode(SETUP["Torch"].find().include) not in content
    assert os.fsencode(ROOT) + b"/" not in content


@pytest.fixture(scope="module")
def functions():
    """{mangled name: disassembly} of the CPU library."""
    text = checked(["objdump", "-d", "--no-show-raw-insn", ROOT / "fsam_ext/_C.abi3.so"])
    parts = re.split(r"^[0-9a-f]+ <(.+)>:$", text, flags=re.MULTILINE)
    code = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        code[name] = code.get(name, "") + body  # local functions may share a name
    return code


def test_no_instruction_multiplies_and_adds_with_one_rounding(functions):
    # A fused multiply-add on one ISA only would give that ISA other bits.
    fused = re.compile(r"\t(vfn?m(add|sub)\w*|fn?m(add|sub)|fml[as])\b")
    assert [name for name, body in functions.items() if fused.search(body)] == []


@x86_64
def test_each_isa_was_compiled_for_itself(functions):
    bodies = {isa: "".join(body for name, body in functions.items() if isa in name) for isa in SETUP["ISA_FLAGS"]}
    assert "%xmm" in bodies["baseline"]
    assert "%ymm" in bodies["avx2"] and "%zmm" not in bodies["avx2"]
    assert "%zmm" in bodies["avx512"]


@x86_64
def test_no_newer_instruction_outside_the_leaf_loops_of_its_isa(functions):
    # An inline function of a header that the linker takes from an AVX object would crash an older
    # machine, and so would an initialiser that runs when the library is loaded.
    newer = re.compile(r"\tv[a-z]\w+ |%[yz]mm|\tk(mov|or|test|and|not|xor|xnor)[bwdq]\b")
    elsewhere = {n: b for n, b in functions.items() if "avx2" not in n and "avx512" not in n}
    assert len(elsewhere) > 10
    assert [name for name, body in elsewhere.items() if newer.search(body)] == []


# Rebuilds and packages. A copy of the tree takes the objects along, so that only what is out of
# date is compiled.


def copy_objects(target):
    if (ROOT / "build/ninja").is_dir():
        shutil.copytree(ROOT / "build/ninja", target / "build/ninja", dirs_exist_ok=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A built copy of the source tree."""
    target = tmp_path_factory.mktemp("copy") / "fsam ext"  # a path with a space has to do
    target.mkdir()
    for name in ("build_tools", "csrc", "docs", "fsam_ext", "tests"):
        unwanted = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, target / name, ignore=unwanted)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, target)
    copy_objects(target)
    setup(target, "build_ext", "--inplace")
    return target


def setup(directory, *arguments, **environment):
    """Run setup.py without CUDA, which would take minutes here, unless it is asked for."""
    environment = {**os.environ, "FSAM_CUDA": "0", **environment}
    return checked([sys.executable, "setup.py", "-q", *arguments], cwd=directory, env=environment)


def test_a_second_build_does_nothing(tree):
    library = tree / "fsam_ext/_C.abi3.so"
    before = library.stat()
    assert "no work to do" in setup(tree, "build_ext", "--inplace")
    assert library.stat().st_mtime_ns == before.st_mtime_ns


def test_an_edited_header_rebuilds_what_includes_it(tree):
    ninja = [SETUP["find_ninja"](), "-f", "build/ninja/build.ninja", "-n"]
    header = tree / "csrc/formulas.h"
    before = header.stat()
    header.touch()
    try:
        steps = checked(ninja, cwd=tree)
    finally:
        os.utime(header, ns=(before.st_atime_ns, before.st_mtime_ns))
    for isa in SETUP["ISA_FLAGS"]:
        assert f"leaf_loops.cpp.{isa}.o" in steps
    assert "link build/ninja/_C.abi3.so" in steps
    assert "no work to do" in checked(ninja, cwd=tree)


def test_two_builds_at_once_go_one_after_the_other(tree):
    """build_tools/ninja.py, NOTE [one build at a time]: each leaves a log that knows every header."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, "FSAM_CUDA": "0"}
    source = tree / "csrc/schema.cpp"
    with (tree / "build/ninja/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        source.touch()
        builds = [
            subprocess.Popen(command, cwd=tree, env=environment, text=True, stdout=-1, stderr=-1) for _ in range(2)
        ]
        for build in builds:
            assert "another build runs in" in build.stderr.readline()
            assert build.poll() is None
    said = [build.communicate()[0] for build in builds]
    assert [build.returncode for build in builds] == [0, 0]
    assert sum("cxx build/ninja/csrc/schema.cpp.o" in text for text in said) == 1
    assert sum("no work to do" in text for text in said) == 1
    deps = checked([SETUP["find_ninja"](), "-f", "build/ninja/build.ninja", "-t", "deps"], cwd=tree)
    assert "#deps 0" not in deps and "csrc/schema.cpp.o: #deps" in deps


def without_gpu_or_nvcc(folder):
    """A toolkit whose nvcc knows its options and compiles nothing but notes, for a machine without a GPU."""
    nvcc = folder / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(folder), "FSAM_CUDA": "gpu", "CUDA_VISIBLE_DEVICES": ""}


# It writes its inputs' names into its output, and the dependencies that ninja reads.
NVCC = """#!/bin/sh
case "$1" in
    --version) echo "Cuda compilation tools, release 13.0, V13.0.1"; exit;;
    --list-gpu-code) echo "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"; exit;;
    --help) exit;;
esac
while [ $# -gt 0 ]; do
    case "$1" in
        -o) echo compiled > "$2"; out="$2"; shift;;
        -MF) echo "x: csrc/formulas.h" > "$2"; shift;;
    esac
    shift
done
"""


def test_without_a_gpu_the_cuda_library_stays_only_while_it_is_up_to_date(tree, tmp_path):
    """FSAM_CUDA=gpu, as the demos build."""
    library = tree / "fsam_ext/_C_cuda.abi3.so"
    toolkit = without_gpu_or_nvcc(tmp_path / "cuda")
    build = ("build_ext", "--inplace")
    try:
        assert "_C_cuda" not in setup(tree, *build, **toolkit)
        assert not library.exists()  # there was none: none is compiled
        setup(tree, *build, **{**toolkit, "FSAM_CUDA": "1"})
        assert library.read_text() == "compiled\n"
        setup(tree, *build, **toolkit)
        assert library.read_text() == "compiled\n"  # up to date: it stays
        os.utime(tree / "csrc/cuda/driver.cpp")
        assert "_C_cuda" not in setup(tree, *build, **toolkit)
        assert not library.exists()  # it might not fit the schema any more
    finally:
        shutil.rmtree(tree / "build/ninja/csrc/cuda")
        library.unlink(missing_ok=True)


def test_without_a_compiler_the_wheel_is_pure_python(tree, tmp_path):
    said = run(
        [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", tmp_path],
        cwd=tree,
        env={**os.environ, **no_compiler(tmp_path), "FSAM_CUDA": "auto"},
    )
    assert said.returncode == 0, said.stderr
    assert "without compiled kernels: no C++ compiler was found" in said.stdout + said.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
        assert not any(name.endswith(".so") for name in file.namelist())
    compiled = {**os.environ, "TRITON_INTERPRET": "0"}  # as a user has it
    info = checked([sys.executable, "-m", "fsam_ext.info", "--device", "cpu"], cwd=tmp_path / "site", env=compiled)
    assert "cpu is served by 'reference'" in info
    assert "The compiled kernels are missing: install g++ 11 or clang++ 14 or later" in info


def test_the_sdist_builds_the_wheel_and_the_wheel_works(tree, tmp_path):
    setup(tree, "sdist", "--dist-dir", tmp_path)
    (archive,) = tmp_path.glob("fsam_ext-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # late 3.10 and later
        tar.extractall(tmp_path)
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert sources <= names
    assert {"setup.py", "pyproject.toml", "Makefile", "build_tools/find.py", "tests/test_build.py"} <= names
    assert not any(name.endswith((".so", ".o", ".pyc")) for name in names)

    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    copy_objects(unpacked)
    setup(unpacked, "bdist_wheel", "--dist-dir", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith(f"-cp310-abi3-linux_{platform.machine()}.whl")
    with zipfile.ZipFile(wheel) as file:
        contents = set(file.namelist())
        file.extractall(tmp_path / "site")
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fsam_ext").rglob("*.py")}
    assert modules | {"fsam_ext/_C.abi3.so"} <= contents
    assert not any(name.startswith(("csrc", "tests", "build")) for name in contents)

    ops = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/schema.cpp").read_text())
    program = (
        "import sys, torch; torch.ops.load_library('fsam_ext/_C.abi3.so');"
        "serves = torch._C._dispatch_has_computed_kernel_for_dispatch_key;"
        "print(*(op for op in sys.argv[1:] if serves(f'fsam_ext::{op}', 'CPU')))"
    )
    served = checked([sys.executable, "-c", program, *ops], cwd=tmp_path / "site").split()
    assert len(ops) >= 5 and served == ops
