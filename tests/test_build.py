"""What the build promises: stable-ABI binaries that round alike on every ISA, packages that are
complete, rebuilds of what changed and nothing else, and sentences where it cannot build."""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = sorted((ROOT / "fsam_ext").glob("_C*.abi3.so"))
SETUP = runpy.run_path(str(ROOT / "setup.py"))

x86_64 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="other machines have the baseline ISA only",
)


def run(command, **options):
    """Run a command and return its completed process, output as text."""
    return subprocess.run(list(map(str, command)), text=True, capture_output=True, **options)


def checked(command, **options):
    """Run a command that has to succeed and return what it printed."""
    result = run(command, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


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


# Sentences instead of tracebacks

BLOCKED = "import runpy, sys; sys.modules['torch'] = None; sys.argv[0] = 'setup.py'; "
BLOCKED += "runpy.run_path('setup.py', run_name='__main__')"


def build_fails(tmp_path, *, interpreter=("setup.py",), arguments=(), **environment):
    """Start a build that has to fail and return the sentence it ends with."""
    where = arguments or ("--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib")
    command = [sys.executable, *interpreter, "-q", "build_ext", *where]
    result = run(command, cwd=ROOT, env={**os.environ, **environment})
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "lib").exists()
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.startswith("fsam_ext: ") and sentence.endswith(".")
    return sentence


def test_missing_torch_says_what_to_install(tmp_path):
    sentence = build_fails(tmp_path, interpreter=("-c", BLOCKED))
    assert "torch is not installed" in sentence and "pip install 'torch>=2.10'" in sentence


@pytest.mark.parametrize("version", ["2.9", "1.13", None])
def test_torch_too_old_says_so(tmp_path, version):
    # As strings 2.9 would come after 2.10.
    header = tmp_path / "torch/include/torch/headeronly/version.h"
    header.parent.mkdir(parents=True)
    (tmp_path / "torch/__init__.py").touch()
    if version:
        major, minor = version.split(".")
        header.write_text(f"#define TORCH_VERSION_MAJOR {major}\n#define TORCH_VERSION_MINOR {minor}\n")
    sentence = build_fails(tmp_path, PYTHONPATH=str(tmp_path))
    assert "torch 2.10 or later is needed" in sentence and (version or "an older one") in sentence


def test_compiler_that_does_not_exist_is_named(tmp_path):
    sentence = build_fails(tmp_path, CXX="no-such-compiler")
    assert "'no-such-compiler' does not run" in sentence and "install g++" in sentence


def test_compiler_without_cpp20_is_named(tmp_path):
    old = tmp_path / "old-compiler"
    old.write_text("#!/bin/sh\necho \"unrecognized option '-std=c++20'\" >&2\nexit 1\n")
    old.chmod(0o755)
    sentence = build_fails(tmp_path, CXX=str(old))
    assert "does not compile C++20" in sentence and "install g++" in sentence


def test_cuda_asked_for_where_there_is_no_nvcc(tmp_path):
    sentence = build_fails(tmp_path, FSAM_CUDA="1", CUDA_HOME=str(tmp_path))
    assert "FSAM_CUDA=1" in sentence and "FSAM_CUDA=0" in sentence


def test_unknown_fsam_cuda_is_named(tmp_path):
    assert "FSAM_CUDA='yes'" in build_fails(tmp_path, FSAM_CUDA="yes")


def test_sanitizers_never_replace_the_library_in_the_tree(tmp_path):
    before = LIBRARIES[0].read_bytes()
    sentence = build_fails(tmp_path, arguments=("--inplace",), FSAM_SANITIZE="1")
    assert "FSAM_SANITIZE=1 does not build in place" in sentence
    assert LIBRARIES[0].read_bytes() == before


# CUDA architectures

SUPPORTED = {"75", "80", "86", "89", "90"}


def test_requested_architectures_become_nvcc_flags():
    assert SETUP["gencode_flags"]("8.0;9.0a 8.6+PTX", SUPPORTED) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_86,code=compute_86",
    ]


def test_default_architectures_are_those_nvcc_knows_and_ptx_of_the_last():
    flags = SETUP["gencode_flags"](None, SUPPORTED)
    assert [flag.split("=")[-1] for flag in flags] == [
        *("sm_75", "sm_80", "sm_86", "sm_90"),
        "compute_90",
    ]


@pytest.mark.parametrize("wrong", ["Ampere", "80", "8.0+SASS", "5.0"])
def test_unusable_architecture_is_named(wrong):
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        SETUP["gencode_flags"](wrong, SUPPORTED)


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
    for name in ("csrc", "docs", "fsam_ext", "tests"):
        unwanted = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, target / name, ignore=unwanted)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, target)
    copy_objects(target)
    setup(target, "build_ext", "--inplace")
    return target


def setup(directory, *arguments):
    """Run setup.py without CUDA, which would take minutes here."""
    environment = {**os.environ, "FSAM_CUDA": "0"}
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


def test_the_sdist_builds_the_wheel_and_the_wheel_works(tree, tmp_path):
    setup(tree, "sdist", "--dist-dir", tmp_path)
    (archive,) = tmp_path.glob("fsam_ext-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # late 3.10 and later
        tar.extractall(tmp_path)
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert sources <= names
    assert {"setup.py", "pyproject.toml", "Makefile", "tests/test_build.py"} <= names
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
