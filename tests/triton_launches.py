"""Every specialisation of a kernel that the conformance suite asks for, taken through Triton's own launch path.

The suite itself tells: it runs with a backend that notes what the Triton backend would launch and lets the CPU backend
do the work. `python -m tests.triton_launches TARGET...` then launches each for each target, on GPUs that are not
there, and prints how many there were; `TARGET:ir` stops before the compiler proper, and costs a tenth. With `--third
SEED` it goes as far with a random third of them, and with the others to the binder.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "0"

import pytest
import torch
import triton
from triton._C.libtriton import ir

from fsam_ext.backends import ops
from fsam_ext.backends.triton import NAMESPACE, kernels, launch, passes

from . import triton_gpu

SUITE = (
    *("tests/test_conformance.py", "tests/test_mixed_precision.py", "tests/test_count_steps.py"),
    *("tests/test_reuse_ops.py", "tests/test_reuse_updates.py"),
)


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

    def _note(self, *arguments: Any, **constants: Any) -> None:
        self.seen[specialisation(*arguments, **constants)] = None

    def _call(self, name: str) -> Any:
        ours, cpus = (getattr(getattr(torch.ops, space), name).default for space in (NAMESPACE, "fsam_ext"))
        names = [argument.name for argument in ours._schema.arguments]

        def call(*arguments: Any) -> None:
            with patch.object(passes, "launch", self._note):
                ours(*arguments)
            if any(argument is not None for name, argument in zip(names, arguments) if name == "journal"):
                arguments[names.index("journal")].sub_(1)  # the CPU backend counts the call
            cpus(*arguments)

        return call


def record(suite: Iterable[str] = SUITE) -> list[Specialisation]:
    """What the tests of these files launch. Raises RuntimeError where one of them fails."""
    recorder = Recorder()
    triton_gpu.serve_cpu_tensors()
    status = pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", "-k", "triton", *suite], plugins=[recorder])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(f"{' '.join(suite)} ended with {status!r}: what they launch is not known")
    return list(recorder.seen)


class Uncompiled:
    """In the place of a compiled kernel: translated to Triton's first representation at most; a launch does nothing."""

    function = packed_metadata = None

    def __init__(self, source: Any, target: Any, options: dict[str, Any], until: str) -> None:
        self.source = source
        if until == "ir":
            self._translate(target, options)

    def _translate(self, target: Any, options: dict[str, Any]) -> None:
        backend = triton.compiler.make_backend(target)
        options = backend.parse_options(dict(options))
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        self.source.make_ir(target, options, functions, modules, context)

    def run(self, *arguments: Any) -> None:
        """The launch: what its kernel would get is checked."""
        triton_gpu.checked_arguments(self.source.signature, arguments[9:])

    def launch_metadata(self, *arguments: Any) -> None:
        """What a hook would be told of a launch."""


def launch_all(found: Iterable[Specialisation], target: str, until: str = "binary") -> int:
    """Launches them for a target; returns how many kernels they came to.

    ``until``: "binder" stops before anything is translated, "ir" before what is translated is compiled.
    """
    with ExitStack() as stack:
        if until != "binary":
            stack.enter_context(patch.object(triton.compiler, "compile", partial(Uncompiled, until=until)))
        active = triton_gpu.activate(triton_gpu.FakeDriver(triton_gpu.TARGETS[target]))
        for one in found:
            one.launch()
    caches = (getattr(kernels, name).device_caches.pop(active.device, ({},))[0] for name in kernels.__all__)
    made = [kernel for cache in caches for kernel in cache.values()]
    for kernel in made if until == "binary" else ():
        passed = [kind for kind in kernel.src.signature.values() if kind != "constexpr"]
        assert triton_gpu.kernel_parameters(kernel) == [8] * len(passed), kernel.src.signature
    return len(made)


def main() -> None:
    """Records, then launches for each target as far as it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+", metavar="TARGET[:binder|:ir]", help=", ".join(triton_gpu.TARGETS))
    parser.add_argument("--third", type=int, metavar="SEED", help="only a random third beyond the binder")
    options = parser.parse_args()
    found = record()
    for wanted in options.targets:
        target, _, until = wanted.partition(":")
        count = launch_all(found, target, "binder" if options.third is not None else until or "binary")
        if options.third is not None and until != "binder":
            launch_all(random.Random(options.third).sample(found, len(found) // 3), target, until or "binary")
        print(f"{target}: {count} kernels of {len(found)} calls", flush=True)


if __name__ == "__main__":
    main()
