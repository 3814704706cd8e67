"""The code that Triton makes for sm_90, executed from its disassembly (bench/sass): what it computes, what it issues.

`python -m tests.triton_sass` calls each op on CPU tensors with a driver whose launches execute the compiled kernel,
block by block, and prints how many instructions a whole chunk takes and what differs from the CPU backend's results.
"""

from __future__ import annotations

import argparse
import bisect
import copy
import ctypes
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import numpy as np
import torch

from bench.sass import binary
from bench.sass.machine import WARP, Block, Execution, Memory, as_signed, executes
from bench.sass.memory import source_words
from bench.sass.program import Program, parse
from bench.sass.walk import Walk
from fsam_ext.backends import ops
from fsam_ext.backends.triton import passes

from . import triton_compiled, triton_gpu

TARGET = triton_gpu.TARGETS["sm_90"]

# ---- Instructions that nvcc's code has not ---------------------------------------------------------------------------


@executes("SGXT", modifiers="U32")
def extend(x: Execution) -> None:
    """As many of the lower bits as the last operand says, with their sign unless U32."""
    above = np.uint64(64) - x.integer(2).astype(np.uint64)
    moved = x.integer(1).astype(np.uint64) << above
    x.write(0, (moved >> above if x.has("U32") else moved.view(np.int64) >> above.view(np.int64)).astype(np.uint32))


@executes("REDUX", modifiers="MAX S32")
def reduce(x: Execution) -> None:
    """The maximum over the active lanes of a warp."""
    values = np.where(x.mask, as_signed(x.integer(1)), np.iinfo(np.int32).min).reshape(-1, WARP)
    x.write(0, values.max(1).astype(np.int32).repeat(WARP))


def _matrices(x: Execution, i: int) -> np.ndarray:
    """Indices into shared memory: warp, matrix, row, byte. Lane 8 m + r has the address of row r of matrix m."""
    if (x.block.whole_warps(x.mask) != x.mask).any() or not x.mask.all():
        raise x.ins.refuse()
    return (x.addresses(i).astype(np.int64)[:, None] + np.arange(16)).reshape(-1, 4, 8, 16)


@executes("LDSM", modifiers="16 M88 MT88 4")
def load_matrices(x: Execution) -> None:
    """Four matrices of 8 x 8 halves: two neighbours of a row a lane, in order; MT88: of a column."""
    halves = x.block.shared[_matrices(x, 1)].view(np.uint16)
    if x.has("MT88"):
        halves = halves.swapaxes(2, 3)
    words = np.ascontiguousarray(halves).view(np.uint32)
    x.write(0, *(np.ascontiguousarray(words[:, k]).reshape(-1) for k in range(4)))


@executes("STSM", modifiers="16 M88 MT88 4")
def store_matrices(x: Execution) -> None:
    """The reverse of LDSM."""
    index = _matrices(x, 0)
    for k, word in enumerate(source_words(x, 1, 16)):
        halves = np.ascontiguousarray(word).view(np.uint16).reshape(-1, 8, 8)
        if x.has("MT88"):
            halves = halves.swapaxes(1, 2)
        x.block.shared[index[:, k]] = np.ascontiguousarray(halves).view(np.uint8)


# ---- A GPU that executes ---------------------------------------------------------------------------------------------


class Addresses(Memory):
    """Global memory that is the process's own, where a tensor's storage was added."""

    def add(self, tensor: torch.Tensor) -> None:
        """Makes all of its storage reachable."""
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        if size and all(start != known for known, _ in self._buffers):
            data = np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)
            bisect.insort(self._buffers, (start, data), key=lambda buffer: buffer[0])


def tensors_in(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    """Those of a call, also in its lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list):
            yield from value


class Executes(triton_gpu.FakeDriver):
    """A GPU whose launches happen, block after block; ``walks`` has the first block's of each launch, by kernel."""

    def __init__(self) -> None:
        super().__init__(TARGET)
        self.utils.load_binary = self._load
        self.memory, self.walks, self._programs = Addresses(), {}, {}

    def _load(self, name: str, image: bytes, shared: int, device: int) -> tuple:
        if image not in self._programs:
            with tempfile.NamedTemporaryFile(suffix=".sm_90.cubin") as file:
                file.write(image)
                file.flush()
                path = Path(file.name)
                (entry,) = binary.entries(path)
                text = binary.disassemble(path, [entry])[entry.name]
            self._programs[image] = entry, parse(entry.name, "90", text, lambda line: False)
        return object(), self._programs[image], 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """The launcher of a compiled kernel."""

        def launch_kernel(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments) -> None:
            passed = triton_gpu.checked_arguments(source.signature, arguments)
            for tensor in tensors_in(passed.values()):
                self.memory.add(tensor)
            walks = [self._block(function, passed, metadata.num_warps * WARP, block) for block in range(x)]
            self.walks[source.name] = walks[0]

        return launch_kernel

    def _block(self, function: tuple[binary.Entry, Program], passed: dict, threads: int, block: int) -> Walk:
        entry, program = function
        numbers = (value.data_ptr() if isinstance(value, torch.Tensor) else value for value in passed.values())
        data = b"".join(struct.pack("<d" if isinstance(number, float) else "<Q", number) for number in numbers)
        assert len(data) + 16 == entry.parameter_bytes, "Triton's two pointers to scratch follow"
        banks = {0: bytes(entry.parameter_base) + data + bytes(16), 2: entry.own_constants}
        return Walk(program, Block(threads, block, banks, self.memory)).run()

    def call(self, op: str, arguments: tuple) -> None:
        """Runs an op on CPU tensors."""
        self.memory = Addresses()
        for tensor in tensors_in(arguments):
            self.memory.add(tensor)
        getattr(passes, op)(*arguments)


# ---- What is counted and compared ------------------------------------------------------------------------------------


def counts(walk: Walk) -> dict[str, float]:
    """Of a whole chunk: lane instructions a parameter; a warp's before its first load, and its first wide one."""
    loads = [[(i, x.ins) for i, x in enumerate(warp) if x.ins.opcode == "LDG"] for warp in walk.issued]
    wide = [[i for i, ins in found if "128" in ins.modifiers] for found in loads]
    return {
        "instructions": sum(map(len, walk.issued)) * WARP / ops.CHUNK,
        "before_first_load": max(found[0][0] for found in loads),
        "before_first_wide_load": max((found[0] for found in wide if found), default=0),
    }


def random_call(op: str, dtype: str, variant: str, table: bool) -> tuple:
    """A call of random numbers: a whole chunk, and with a table a partial one behind it."""
    call = triton_compiled.arguments(op, dtype, variant, table)
    for tensor in tensors_in(call):
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, dtype=torch.float64) - 0.3)
        if tensor.dtype == torch.float64 and tensor.numel() == 2:  # squared norms, or sums of which one is
            tensor.abs_()
    if op == "restore_adam":
        call[5].abs_()
    if op == "count_steps":
        call[0].copy_(torch.tensor([0.0, 12345.0]))
    for tensor in call[3:]:
        if op != "noise_norm" and isinstance(tensor, torch.Tensor) and tensor.shape == (ops.STATISTICS,):
            tensor.fill_(3.7)
    return call


def copied(value: Any) -> Any:
    """A copy of a tensor or of those in a list."""
    return [tensor.clone() for tensor in value] if isinstance(value, list) else copy.deepcopy(value)


# The arguments that are sums, which every backend adds in an order of its own.
SUMS = {"noise_norm": (10, 11), "perturb": (17,), "update_ema": (10, 11), "dots": (5, 6), "project": (8, 9)}


def differences(ours: tuple, theirs: tuple, op: str) -> list[int]:
    """The arguments that differ: in a bit where they are no sums."""
    return [
        index
        for index, (a, b) in enumerate(zip(ours, theirs))
        if not all(
            torch.allclose(x, y, *[1e-5 * (index in SUMS.get(op, ()))] * 2, equal_nan=True)
            for x, y in zip(tensors_in([a]), tensors_in([b]))
        )
    ]


def facts(gpu: Executes, op: str, dtype: str, variant: str, table: bool) -> dict[str, Any]:
    """What a call executes, and which of its arguments ``differs`` from what the CPU backend makes of it."""
    ours = random_call(op, dtype, variant, table)
    before, theirs = (tuple(map(copied, ours)) for _ in range(2))
    gpu.call(op, ours)
    getattr(torch.ops.fsam_ext, op).default(*theirs)
    assert differences(ours, before, op), "the kernel wrote nothing"
    return {"differs": differences(ours, theirs, op), **counts(gpu.walks[op])}


def cases(every: bool) -> Iterable[tuple[str, str, str, bool]]:
    """Calls of each op of float32 and bfloat16, of two rows and of one, and with what reuse adds; or all variants."""
    for name, dtype, variant in triton_compiled.rows():
        is_main = dtype in ("float32", "bfloat16") and variant in ("", "kept", "norm", "reused")
        if name in ops.NAMES and (every or is_main):
            yield from ((name, dtype, variant, table) for table in ((True, False) if variant == "" else (True,)))


def main() -> None:
    """Prints a line of JSON for each call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every dtype and variant")
    wanted = parser.parse_args()
    gpu = triton_gpu.activate(Executes())
    for case in cases(wanted.all):
        print(json.dumps([case, facts(gpu, *case)]), flush=True)


if __name__ == "__main__":
    main()
