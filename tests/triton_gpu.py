"""A GPU for Triton that is not there: drivers whose kernels are compiled, loaded and launched, and do nothing.

`FakeDriver` stands for any target: each launch is kept, and its arguments are held against the kernel's signature.
`cuda_driver` is Triton's own CUDA driver and C launcher over a libcuda.so.1 that reports what it is asked to launch
(triton_libcuda.c). Both are for a process without TRITON_INTERPRET: under it nothing is compiled.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fsam_ext.backends import ops
from fsam_ext.backends.triton import NAMESPACE, launch, passes

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
STREAM = 0x5EED  # what the fakes call the current stream
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i8": torch.int8,
}
# grid and block, shared memory, stream, function, parameters: see triton_libcuda.c
ON_LAUNCH = ctypes.CFUNCTYPE(
    *(None, ctypes.POINTER(ctypes.c_uint * 6), ctypes.c_uint, ctypes.c_size_t, ctypes.c_char_p),
    ctypes.POINTER(ctypes.c_void_p),
)


@dataclass
class Launched:
    """What reached a GPU: the kernel's name, its grid, the stream, and the arguments that are no constants, by name."""

    kernel: str
    grid: tuple[int, ...]
    stream: int
    arguments: dict[str, Any]


def kernel_parameters(compiled: Any) -> list[int]:
    """The sizes of the parameters that a binary takes of its launcher, without Triton's own at the end."""
    if "ptx" in compiled.asm:
        entry = compiled.asm["ptx"].split(".entry", 1)[1].split("{", 1)[0]
        sizes = [int(bits) // 8 for bits in re.findall(r"\.param \.[usbf](\d+)", entry)]
        return sizes[:-2]  # scratch of the kernel's and of a profiler's
    arguments = compiled.asm["amdgcn"].split(".args:", 1)[1].split(".group_segment_fixed_size", 1)[0]
    sizes = re.findall(r"\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)", arguments)
    return [int(size) for size, kind in sizes if not kind.startswith("hidden")][:-2]


def checked_arguments(signature: dict[str, str], arguments: Sequence[Any]) -> dict[str, Any]:
    """The arguments of a launch that are no constants, by name: of the types that the kernel was compiled for."""
    named = dict(zip(signature, arguments, strict=True))
    passed = {name: value for name, value in named.items() if signature[name] != "constexpr"}
    for name, value in passed.items():
        kind = signature[name]
        if kind.startswith("*"):
            assert DTYPES[kind[1:]] == value.dtype, (name, kind, value.dtype)
        else:
            assert {"i64": int, "fp64": float}[kind] is type(value), (name, kind, value)
    return passed


class FakeDriver:
    """Triton's driver for a GPU of any target; what is launched is checked and kept in ``launched``."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.launched = target, []
        self.device = list(TARGETS.values()).index(target)
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (object(), name, 32, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 1 << 16},
        )

    def get_current_target(self) -> GPUTarget:
        """Of the one device."""
        return self.target

    def get_current_device(self) -> int:
        """A number of its own for each target: Triton keeps kernels by it."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """A stream that is no default."""
        return STREAM

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """The launcher of a compiled kernel."""

        def launch_kernel(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments) -> None:
            passed = checked_arguments(source.signature, arguments)
            self.launched.append(Launched(function, (x, y, z), stream, passed))

        return launch_kernel


class Libcuda:
    """A libcuda.so.1 without a GPU, built and loaded before anything else may look for one."""

    def __init__(self, folder: Path) -> None:
        path = folder / "libcuda.so.1"
        source = Path(__file__).with_name("triton_libcuda.c")
        compiler = os.environ.get("CC", "cc").split()
        options = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*compiler, *options, str(source), "-o", str(path)], check=True)
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        triton.knobs.nvidia.libcuda_path = str(folder)
        self.kinds: list[str] = []
        self.launched: list[tuple] = []
        self._on_launch = ON_LAUNCH(self._launch)

    def reports(self, wanted: bool) -> None:
        """Whether launches are kept in ``launched``: name, grid, block, stream and values, of types ``kinds``."""
        address = ctypes.cast(self._on_launch, ctypes.c_void_p).value if wanted else None
        ctypes.c_void_p.in_dll(self._library, "on_launch").value = address

    def _launch(self, sizes, shared, stream, function, parameters) -> None:
        sizes = tuple(sizes.contents)
        types = {"fp64": ctypes.c_double, "i64": ctypes.c_int64}
        pointers = (ctypes.POINTER(types.get(kind, ctypes.c_size_t)) for kind in self.kinds)
        values = [ctypes.cast(parameters[i], pointer)[0] for i, pointer in enumerate(pointers)]
        self.launched.append((function.decode(), sizes[:3], sizes[3:], stream, values))


def cuda_driver(target: GPUTarget, libcuda: Libcuda, checks: bool = True) -> Any:
    """Triton's own CUDA driver over ``libcuda``. ``checks``: each launch is compared with what arrived there."""
    from triton.backends.nvidia import driver as nvidia

    class Launcher(nvidia.CudaLauncher):
        def __init__(self, source: Any, metadata: Any) -> None:
            super().__init__(source, metadata)
            self.signature, self.threads = source.signature, metadata.num_warps * target.warp_size

        def __call__(self, *arguments: Any) -> None:
            passed = checked_arguments(self.signature, arguments[9:])
            libcuda.kinds = [self.signature[name] for name in passed]
            before = len(libcuda.launched)
            super().__call__(*arguments)
            ((_, grid, block, stream, values),) = libcuda.launched[before:]
            assert (grid, block, stream) == (arguments[:3], (self.threads, 1, 1), STREAM)
            expected = [value.data_ptr() if hasattr(value, "data_ptr") else value for value in passed.values()]
            assert values == expected, (passed, values)

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), Launcher if checks else nvidia.CudaLauncher

        def get_current_target(self) -> GPUTarget:
            return target

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return STREAM

    libcuda.reports(checks)
    return Driver()


@functools.cache
def serve_cpu_tensors() -> None:
    """Has the ops take CPU tensors for a GPU's: the kernels do nothing, so their arguments may lie anywhere."""
    for name in ops.NAMES:
        torch.library.impl(f"{NAMESPACE}::{name}", "CPU", getattr(passes, name), lib=_LIBRARY)


def activate(active: Any) -> Any:
    """Has Triton launch through ``active``; returns it."""
    driver.set_active(active)
    launch._warp_size.cache_clear()
    return active


def run_python(*arguments: str, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """A Python of its own, without the interpreter of Triton."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        text=True,
        capture_output=True,
        cwd=Path(__file__).parents[1],
        env={**inherited, **environment},
    )
