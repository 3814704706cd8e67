"""A GPU for Triton that is not there: drivers whose kernels are compiled, loaded and launched, and do nothing.

`FakeDriver` stands for any target: each launch is recorded and its arguments are held against the binary that they are
for. `cuda_driver` is Triton's own CUDA driver and C launcher over a libcuda.so.1 that reports what it is asked to
launch (triton_libcuda.c). Both are for a process without TRITON_INTERPRET: under it nothing is compiled.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fsam_ext.backends.triton import launch

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


class Launch(SimpleNamespace):
    """What a launcher got: kernel, grid, stream, arguments by name (without constants), and the compiled kernel's source."""


def kernel_parameters(compiled: Any) -> list[int]:
    """The sizes of the parameters that a binary takes of its launcher, without Triton's own at the end."""
    if "ptx" in compiled.asm:
        entry = compiled.asm["ptx"].split(".entry", 1)[1].split("{", 1)[0]
        sizes = [int(bits) // 8 for bits in re.findall(r"\.param \.[usbf](\d+)", entry)]
        return sizes[:-2]  # scratch of the kernel's and of a profiler's
    arguments = compiled.asm["amdgcn"].split(".args:", 1)[1].split(".group_segment_fixed_size", 1)[0]
    sizes = re.findall(r"\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)", arguments)
    return [int(size) for size, kind in sizes if not kind.startswith("hidden")][:-2]


def check_arguments(signature: dict[str, str], arguments: dict[str, Any], sizes: list[int] | None = None) -> None:
    """Raises AssertionError where the arguments of a launch are not those that its kernel was compiled for."""
    assert list(signature) == list(arguments), (list(signature), list(arguments))
    passed = {name: kind for name, kind in signature.items() if kind != "constexpr"}
    for name, kind in passed.items():
        value = arguments[name]
        if kind.startswith("*"):
            assert DTYPES[kind[1:]] == value.dtype, (name, kind, value.dtype)
        else:
            assert {"i64": int, "fp64": float}[kind] is type(value), (name, kind, value)
    if sizes is not None:
        assert sizes == [8] * len(passed), (sizes, passed)


class FakeDriver:
    """Triton's driver for a GPU of a target, whose launches are kept in ``launches``."""

    def __init__(self, target: GPUTarget, keep: bool = True) -> None:
        self.target, self.keep, self.launches = target, keep, []
        self.device = list(TARGETS.values()).index(target)
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (object(), name, 32, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 1 << 16, "warpSize": target.warp_size},
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """The launcher of a compiled kernel."""
        signature = dict(source.signature)

        def run(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments) -> None:
            if not self.keep:
                return
            named = dict(zip(signature, arguments, strict=True))
            check_arguments(signature, named)
            self.launches.append(Launch(kernel=function, grid=(x, y, z), stream=stream, signature=signature, arguments=named))

        return run


@dataclass
class Launched:
    """What reached libcuda's launch: the kernel's name, grid and block, and the values of its parameters."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    stream: int
    values: list[int | float]


class Libcuda:
    """The built stub of libcuda.so.1, loaded before anything else may look for one."""

    def __init__(self, folder: Path) -> None:
        path = folder / "libcuda.so.1"
        source = Path(__file__).with_name("triton_libcuda.c")
        compiler = os.environ.get("CC", "cc").split()
        subprocess.run([*compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(path)], check=True)
        self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        triton.knobs.nvidia.libcuda_path = str(folder)

    def report(self, signature: list[str], launched: list[Launched]) -> Any:
        """Appends launches of kernels of that signature to ``launched``, until what is returned is dropped."""
        types = {"fp64": ctypes.c_double, "i64": ctypes.c_int64}

        @ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint * 6), ctypes.c_uint, ctypes.c_size_t, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p))
        def on_launch(sizes, shared, stream, function, parameters) -> None:
            grid_and_block = tuple(sizes.contents)
            values = [ctypes.cast(parameters[i], ctypes.POINTER(types.get(kind, ctypes.c_size_t)))[0] for i, kind in enumerate(signature)]
            launched.append(Launched(function.decode(), grid_and_block[:3], grid_and_block[3:], stream, values))

        ctypes.c_void_p.in_dll(self.library, "on_launch").value = ctypes.cast(on_launch, ctypes.c_void_p).value
        return on_launch


def cuda_driver(target: GPUTarget) -> Any:
    """Triton's own driver and launchers for CUDA, once a `Libcuda` is loaded."""
    from triton.backends.nvidia import driver as nvidia

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher

        def get_current_target(self) -> GPUTarget:
            return target

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return STREAM

    return Driver()


def activate(active: Any) -> Any:
    """Has Triton launch through ``active``; returns it."""
    driver.set_active(active)
    launch._warp_size.cache_clear()
    return active
