"""Every specialisation of a kernel that the conformance suite asks for, taken through Triton's own launch path.

The suite itself tells: it runs with a backend that notes what the Triton backend would launch and lets the CPU backend
do the work. `python -m tests.triton_launches TARGET...` then launches each of them for each target, on a GPU that is not
there, and prints how many there were; `--until ir` stops before the compiler proper, where a launch costs a tenth.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "0"

import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from triton._C.libtriton import ir  # noqa: E402

from fsam_ext import ops  # noqa: E402
from fsam_ext.backends.triton import kernels, launch, passes  # noqa: E402

from . import triton_gpu  # noqa: E402

SUITE = ("tests/test_conformance.py", "tests/test_mixed_precision.py")


@dataclass(frozen=True)
class Pointer:
    """What a specialisation depends on of a tensor."""

    dtype: torch.dtype
    is_aligned: bool

    def data_ptr(self) -> int:
        """An address of that alignment."""
        return 4096 if self.is_aligned else 4096 + self.dtype.itemsize

    def ptr_range(self) -> int:
        """The bytes that may be reached: few, for AMD's 32-bit offsets."""
        return 4096


@dataclass(frozen=True)
class Specialisation:
    """A call of `launch.launch`, but for the values of its numbers."""

    kernel: str
    dtype: torch.dtype
    arguments: tuple
    constants: tuple[tuple[str, Any], ...]

    def launch(self) -> None:
        """Launches it on the active driver's GPU."""
        numbers = {int: 1 << 20, float: 0.5}
        arguments = (numbers.get(a, a) if isinstance(a, type) else a for a in self.arguments)
        launch.launch(self.kernel, self.dtype, 1, *arguments, **dict(self.constants))


def specialisation(kernel: str, dtype: torch.dtype, programs: int, *arguments: Any, **constants: Any) -> Specialisation:
    """Of such a call of `launch.launch`."""

    def described(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return Pointer(value.dtype, value.data_ptr() % 16 == 0)
        return value if value is None else type(value)

    return Specialisation(kernel, dtype, tuple(map(described, arguments)), tuple(sorted(constants.items())))


class Recorder:
    """A plugin of pytest: the suite's backend `triton` notes what it would launch, and computes on the CPU."""

    def __init__(self) -> None:
        self.seen: dict[Specialisation, None] = {}

    def pytest_collection_finish(self) -> None:
        """Takes the place of the backend once the suite is imported."""
        from . import conformance

        calls = {name: self._call(name) for name in ops.NAMES}
        conformance.BACKENDS["triton"] = lambda: SimpleNamespace(**calls)
        conformance.DEVICE["triton"] = "cpu"

    def _call(self, name: str) -> Any:
        def call(*arguments: Any) -> None:
            with patch.object(passes, "launch", lambda *args, **kwargs: self.seen.setdefault(specialisation(*args, **kwargs))):
                getattr(passes, name)(*arguments)
            getattr(torch.ops.fsam_ext, name).default(*arguments)

        return call


def record(suite: Iterable[str] = SUITE) -> list[Specialisation]:
    """What ``suite`` launches. Raises RuntimeError where one of its tests fails."""
    recorder = Recorder()
    status = pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", "-k", "triton", *suite], plugins=[recorder])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(f"{' '.join(suite)} ended with {status!r}: what it launches is not known")
    return list(recorder.seen)


class Translated:
    """In the place of a compiled kernel: translated to Triton's first representation only, and launched as nothing."""

    function = packed_metadata = None

    def __init__(self, source: Any, target: Any, options: dict[str, Any]) -> None:
        backend = triton.compiler.make_backend(target)
        options = backend.parse_options(dict(options))
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
        self.run = lambda *args: triton_gpu.check_arguments(source.signature, dict(zip(source.signature, args[9:], strict=True)))

    def launch_metadata(self, *arguments: Any) -> None:
        """What a hook would be told of a launch."""


def replay(specialisations: Iterable[Specialisation], target: str, compiles: bool) -> int:
    """Launches them for a target; returns how many kernels they came to.

    ``compiles``: to the binary; else to Triton's first representation.
    """
    with ExitStack() as stack:
        if not compiles:
            stack.enter_context(patch.object(triton.compiler, "compile", Translated))
        active = triton_gpu.activate(triton_gpu.FakeDriver(triton_gpu.TARGETS[target]))
        for one in specialisations:
            one.launch()
        made = [kernel for name in kernels.__all__ for kernel in getattr(kernels, name).device_caches[active.device][0].values()]
    if compiles:
        for kernel in made:
            passed = [kind for kind in kernel.src.signature.values() if kind != "constexpr"]
            assert triton_gpu.kernel_parameters(kernel) == [8] * len(passed), kernel.src.signature
    return len(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+", choices=triton_gpu.TARGETS)
    parser.add_argument("--until", choices=("ir", "binary"), default="binary")
    arguments = parser.parse_args()
    found = record()
    for target in arguments.targets:
        print(f"{target}: {replay(found, target, arguments.until == 'binary')} kernels", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
