"""What a build finds of what it needs, and the sentences where it cannot build."""

import os
import sys
import sysconfig
from pathlib import Path

import pytest

from bench import gpu_model
from bench.sass import figures

from .building import CUDA, ROOT, SETUP, checked, no_compiler, run

# Sentences instead of tracebacks


def build_fails(tmp_path, *, python=sys.executable, command=(), **environment):
    """Start a build that has to fail and return the sentence it ends with."""
    command = command or ("build_ext", "--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib")
    result = run([python, "setup.py", "-q", *command], cwd=ROOT, env={**os.environ, **environment})
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "lib").exists()
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.startswith("fsam_ext: ") and sentence.endswith(".")
    return sentence


def only_build_packages(folder):
    """A folder for PYTHONPATH that holds what a build needs of Python's, and no torch."""
    folder.mkdir()
    site = Path(sysconfig.get_path("purelib"))
    for found in (*site.glob("setuptools*"), *site.glob("ninja*"), *site.glob("_distutils_hack")):
        (folder / found.name).symlink_to(found)
    return str(folder)


@pytest.mark.parametrize("command", [(), ("dist_info",)], ids=["built", "asked for metadata, as pip does first"])
def test_missing_torch_says_what_to_install(tmp_path, command):
    checked([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"])
    packages = only_build_packages(tmp_path / "packages")
    outside = {"PYTHONPATH": packages, "VIRTUAL_ENV": "", "CONDA_PREFIX": ""}
    sentence = build_fails(tmp_path, python=tmp_path / "empty/bin/python", command=command, **outside)
    assert "torch is not installed" in sentence and "pip install 'torch>=2.10'" in sentence


# What pip's build isolation leaves of a Python's path; build_tools/find.py, NOTE [torch under build isolation].
ISOLATED = "import sys; sys.path[:] = [path for path in sys.path if 'site-packages' not in path]"


def where_torch_is_found(python, folder, **environment):
    """The torch that an isolated build finds, as text."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(ISOLATED)
    program = "import importlib.util as u; assert u.find_spec('torch') is None; "
    program += "from build_tools.find import Torch; print(Torch.find().include)"
    environment = {**os.environ, "PYTHONNOUSERSITE": "1", "PYTHONPATH": str(folder), **environment}
    return checked([python, "-c", program], cwd=ROOT, env=environment).strip()


def test_torch_is_found_through_build_isolation(tmp_path):
    found = where_torch_is_found(sys.executable, tmp_path, VIRTUAL_ENV="", CONDA_PREFIX="")
    assert found == str(SETUP["Torch"].find().include)


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_torch_is_found_in_the_active_environment(tmp_path, variable):
    for name in ("active", "of the tool"):
        checked([sys.executable, "-m", "venv", "--without-pip", tmp_path / name])
    (site,) = (tmp_path / "active").glob("lib/python*/site-packages")
    torch = SETUP["Torch"].find().include.parent
    (site / "torch").symlink_to(torch)
    environment = {"VIRTUAL_ENV": "", "CONDA_PREFIX": "", variable: str(tmp_path / "active")}
    found = where_torch_is_found(tmp_path / "of the tool/bin/python", tmp_path / "path", **environment)
    assert found == str(site / "torch/include")


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


@pytest.mark.parametrize("command", [(), ("dist_info",)], ids=["built", "asked for metadata, as pip does first"])
@pytest.mark.parametrize("wish", [{"FSAM_CPU": "1"}, {"FSAM_CUDA": "1"}], ids=["FSAM_CPU", "FSAM_CUDA"])
def test_a_library_that_was_asked_for_needs_a_compiler(tmp_path, command, wish):
    sentence = build_fails(tmp_path, command=command, **no_compiler(tmp_path), **wish)
    assert "no C++ compiler was found on PATH" in sentence and "install g++" in sentence


def test_cuda_without_the_library_that_it_needs_is_refused(tmp_path):
    assert "FSAM_CPU=0" in build_fails(tmp_path, FSAM_CPU="0", FSAM_CUDA="1")


def test_cuda_asked_for_where_there_is_no_nvcc(tmp_path):
    sentence = build_fails(tmp_path, FSAM_CUDA="1", CUDA_HOME=str(tmp_path))
    assert "FSAM_CUDA=1" in sentence and "FSAM_CUDA=0" in sentence


@pytest.mark.parametrize("variable", ["FSAM_CPU", "FSAM_CUDA"])
def test_unknown_wish_is_named(tmp_path, variable):
    assert f"{variable}='yes'" in build_fails(tmp_path, **{variable: "yes"})


def test_sanitizers_never_replace_the_library_in_the_tree(tmp_path):
    library = ROOT / "fsam_ext/_C.abi3.so"
    before = library.read_bytes()
    sentence = build_fails(tmp_path, command=("build_ext", "--inplace"), FSAM_SANITIZE="1")
    assert "FSAM_SANITIZE=1 does not build in place" in sentence
    assert library.read_bytes() == before


# What the targets build


@pytest.mark.parametrize("target, wish", [("demo", True), ("demo-gpt", True), ("test", False), ("build", False)])
def test_the_demos_build_the_cuda_library_only_where_a_gpu_is(tmp_path, target, wish):
    lines = checked(["make", "--dry-run", target, f"VENV={tmp_path}/venv"], cwd=ROOT).splitlines()
    (install,) = (line for line in lines if " install " in line and " -e " in line)
    assert install.startswith("FSAM_CPU=0 FSAM_CUDA=0 ")  # pip would compile in silence
    (build,) = (line for line in lines if "build_ext" in line)
    assert build.startswith("FSAM_CUDA=${FSAM_CUDA:-gpu} ") == wish


@pytest.mark.parametrize("count", [0, 2])
def test_a_gpu_is_one_that_the_driver_counts(tmp_path, count):
    source = f"int cuInit(int flags) {{ return flags; }} int cuDeviceGetCount(int *n) {{ *n = {count}; return 0; }}"
    command = [*SETUP["find_compiler"]().split(), "-shared", "-fPIC", "-x", "c", "-", "-o", tmp_path / "libcuda.so.1"]
    checked(command, input=source)
    program = "from build_tools.find import gpu_is_here; print(gpu_is_here())"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    assert checked([sys.executable, "-c", program], cwd=ROOT, env=environment).strip() == str(count > 0)


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


def test_the_documents_name_what_the_library_is_built_for():
    text = " ".join((ROOT / "docs/building.md").read_text().split())
    *others, last = CUDA["ARCHITECTURES"]
    assert f"| compute capabilities | {', '.join(others)} and {last} |" in text
    assert f"| nvcc | {'.'.join(map(str, CUDA['OLDEST_NVCC']))} or later |" in text
    for major, driver in CUDA["OLDEST_DRIVERS"].items():
        assert f"| driver, for a library built by nvcc {major} | {driver} or later |" in text
    assert f"| nvcc of the wheel | {'.'.join(map(str, CUDA['TOOLKIT']))} |" in text
    oldest = CUDA["ARCHITECTURES"][0].replace(".", "")
    assert f"on every GPU from sm_{oldest} on" in (ROOT / "docs/cuda.md").read_text()


def test_every_architecture_is_one_that_the_checks_know():
    codes = {capability.replace(".", "") for capability in CUDA["ARCHITECTURES"]}
    assert codes <= set(gpu_model.GPUS) and set(figures.ARCHITECTURES) <= codes
