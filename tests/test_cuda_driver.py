"""The CUDA library under drivers that are not here: a stub of libcuda.so.1 that says which version it is."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

from fsam_ext import _library, backends

from . import cuda_emulation

pytestmark = pytest.mark.skipif(_library.CUDA_REASON is not None, reason=str(_library.CUDA_REASON))

# The runtime asks for all functions that it knows and meets those that a stub lacks later, if at all.
STUB = """
#include <cstdlib>
#include <dlfcn.h>
extern "C" {
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { return *version = atoi(getenv("STUB_DRIVER_VERSION")), 0; }
int cuGetProcAddress(const char* name, void** function, int, unsigned long, int*) {
  void* stub = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  return (*function = dlsym(stub, name)) ? 0 : 500;  // CUDA_ERROR_NOT_FOUND
}
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long flags, int* status) {
  return cuGetProcAddress(name, function, version, flags, status);
}
}
"""

# A torch of CUDA 12 on a machine with an H100, as far as `info` looks; Triton's driver likewise.
INFO = """
import runpy, sys, torch, triton
from triton.backends.compiler import GPUTarget
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda device=None: (9, 0)
class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
triton.runtime.driver.set_active(Driver())
sys.argv = ["info", "--device", "cuda"]
runpy.run_module("fsam_ext.info", run_name="__main__")
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """The folder of a libcuda.so.1."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "stub.cpp").write_text(STUB)
    compiler = shlex.split(cuda_emulation._setup().find_compiler())
    command = [*compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "stub.cpp", "-ldl"]
    subprocess.run(command, check=True)
    return folder


def info(library_path, driver: int) -> subprocess.CompletedProcess:
    """`python -m fsam_ext.info --device cuda` with the libcuda.so.1 of ``library_path``."""
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FSAM_BACKEND")},
        "LD_LIBRARY_PATH": str(library_path),
        "STUB_DRIVER_VERSION": str(driver),
    }
    return subprocess.run([sys.executable, "-c", INFO], text=True, capture_output=True, env=environment)


def row(said: subprocess.CompletedProcess, name: str) -> str:
    """What the table says of a backend."""
    return next(line for line in said.stdout.splitlines() if re.match(rf"{name}  ", line))


def test_an_older_driver_is_named_and_triton_serves(stub):
    said = info(stub, 11040)
    assert said.returncode == 0 and said.stderr == "", said.stderr
    reason = r" no +it was built by CUDA (\d+)\.\d+ and this machine's driver is for CUDA 11\.4; update the driver$"
    built = int(re.search(reason, row(said, "cuda"))[1])
    assert "  in use  the first that serves the device" in row(said, "triton")
    assert said.stdout.endswith("cuda is served by 'triton'.\n")

    said = info(stub, 1000 * (built - 1) + 80)  # the last major version before it
    advice = f", or build fsam_ext with an nvcc of CUDA {built - 1}" if built > 12 else ""
    assert row(said, "cuda").endswith(f"driver is for CUDA {built - 1}.8; update the driver{advice}")
    assert said.stdout.endswith("cuda is served by 'triton'.\n")

    said = info(stub, 1000 * built)  # the runtime goes on, until the stub's lack of everything else stops it
    assert re.search(r" no +CUDA does not start: ", row(said, "cuda"))


def test_no_driver_at_all(tmp_path):
    (tmp_path / "libcuda.so.1").touch()  # no library, and found before one that the machine may have
    said = info(tmp_path, 0)
    assert "no NVIDIA driver is installed" in row(said, "cuda")


def test_a_driver_that_fits_is_no_reason(monkeypatch):
    """What the op says decides, before the GPU's age is looked at."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for problem, reason in (("", None), ("too old a driver", "too old a driver")):
        monkeypatch.setattr(torch.ops.fsam_ext, "cuda_driver_problem", lambda problem=problem: problem)
        assert backends.CANDIDATES["cuda"](torch.device("cuda"))[1] == reason
