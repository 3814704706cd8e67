"""Calls of the kernels as the optimizer makes them: which kernel, and the bytes of its parameters.

Tables are filled as csrc/cuda/launch.cuh fills them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from bench.sass.binary import Entry
from bench.sass.layout import Parameters
from bench.sass.machine import Block, Memory

CHUNK = 4096  # csrc/tensor_table.h
WARP_ROW = 2048  # csrc/cuda/kernels.cuh
WARPS = 8
THREADS = 32 * WARPS
TABLES = (64, 800)


@dataclass(frozen=True)
class Kernel:
    """A kernel and the struct of its arguments."""

    op: str
    arguments: str
    template: str  # its arguments, where {T} is the type of the parameters
    threads: int = THREADS
    has_table: bool = True

    def name(self, storage: str, rows: int) -> str:
        """With its template arguments, for a type of parameters and the smallest table that takes so many rows."""
        table = f"Table<{min(size for size in TABLES if size >= rows)}>"
        return f"{self.op}_kernel<{self.template.format(T=storage, table=table)}>"


# With an average in fp32, a backup and no masters; SGD with momentum.
KERNELS = [
    Kernel("noise_norm", "NoiseNormArguments", "{T}, float, false, {table}"),
    Kernel("perturb", "PerturbArguments", "{T}, float, false, {table}"),
    Kernel("update_ema", "UpdateEmaArguments", "{T}, float, {table}"),
    Kernel("restore", "RestoreArguments", "{T}, false, {table}"),
    Kernel("restore_sgd", "SgdArguments", "{T}, false, true, {table}"),
    Kernel("restore_adam", "AdamArguments", "{T}, false, {table}"),
]
COUNT_STEPS = Kernel("count_steps", "CountArguments", "float", 128, False)  # compiled with the kernels of fp32
STORAGE = {"fp32": "float", "bf16": "fsam::bfloat16"}


def number(otherwise: float, data: int = 0, is_double: bool = False) -> dict:
    """A Number of arguments.h: on the device where `data` is an address."""
    return {"data": data, "is_double": is_double, "otherwise": otherwise}


def average(data: int) -> dict:
    """An Average in the type of the arithmetic."""
    return {"storage": 1 if data else 0, "data": data, "scales": 0}


# What a step hands over beside addresses: F-SAM with the defaults of the optimizer, SGD and AdamW as they are used.
DEFAULTS = {
    "sigma": 1.0, "lmbda": 0.9, "updated": False, "adaptive": False, "feeds": True, "forward": 0, "eps": 1e-12,
    "momentum": 0.9, "dampening": 0.0, "weight_decay": 1e-4, "nesterov": False, "maximize": False,
    "beta1": 0.9, "beta2": 0.999, "decoupled": True,
    "grad_scale": number(1.0), "found_inf": number(0.0), "rho": number(0.05), "lr": number(0.1),
    "master": 0, "effect": 0, "rounding": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of the table: the addresses of its tensors, its size and its place in the flat buffers."""

    param: int
    grad: int
    numel: int
    offset: int
    id: int


def table(rows: list[Row], capacity: int) -> tuple[dict, int]:
    """The values of a Table, and the number of blocks."""
    large = [row for row in rows if row.numel > WARP_ROW]
    small = [row for row in rows if 0 < row.numel <= WARP_ROW]
    ordered = large + small
    starts = np.cumsum([0] + [-(-row.numel // CHUNK) for row in large])

    def column(values: list) -> list:
        return [*map(int, values), *[0] * (capacity - len(values))]

    values = {
        name: column([getattr(row, name) for row in ordered]) for name in ("param", "grad", "offset", "numel", "id")
    }
    values["first_block"] = column(list(starts[:-1]))
    values |= {"large": len(large), "rows": len(ordered), "large_blocks": int(starts[-1])}
    return values, int(starts[-1]) + -(-len(small) // WARPS)


class ChangedParameters(Exception):
    """The binary takes parameters of another size than the headers say."""


def block_of(kernel: Kernel, entry: Entry, rows: list[Row], values: dict, memory: Memory, block: int) -> Block:
    """A block of a call. The parameters have to be as many bytes as the binary takes."""
    result = Parameters()
    if kernel.has_table:
        capacity = capacity_of(entry.shown)
        result.struct("Table", table(rows, capacity)[0], {"kRows": capacity})
    result.struct(kernel.arguments, DEFAULTS | values)
    if len(result.data) != entry.parameter_bytes:
        raise ChangedParameters(
            f"{kernel.op}: {len(result.data)} bytes of parameters from the headers, {entry.parameter_bytes} in the "
            "binary: build it again, or mend bench/sass/layout.py"
        )
    # What the driver writes before the parameters counts as zeros: no stack is used.
    banks = {0: bytes(entry.parameter_base) + bytes(result.data), 2: entry.own_constants}
    return Block(kernel.threads, block, banks, memory)


def capacity_of(name: str) -> int:
    """The rows of the table in a kernel's name."""
    return int(re.search(r"Table<(\d+)>", name)[1])


# ---- The call that is counted


BLOCK = 5  # of a row so long that every block is alike
ROW_CHUNKS = 1_000_000


def _window(memory: Memory, dtype: str, fill: float) -> int:
    """The address of a row of which the block's part is there."""
    values = np.full(CHUNK, fill, np.float32)
    data = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else values
    return memory.place(data) - BLOCK * data.nbytes


def default_block(kernel: Kernel, dtype: str, entry: Entry, further_rows: int = 0) -> Block:
    """One block amid a long row of aligned parameters, before which come `further_rows` shorter ones."""
    memory = Memory()
    param, grad, backup = (_window(memory, dtype, fill) for fill in (1.0, 0.5, 1.25))
    ema, first, second = (_window(memory, "fp32", fill) for fill in (0.25, 0.5, 0.0625))
    stats = memory.place(np.array([7.0, 0, 0, 0, 0]))
    slots = memory.place(np.zeros(8 * ROW_CHUNKS, np.float32))
    corrections = memory.place(np.tile(np.array([1e-3, 0.5], np.float32), 1 + further_rows))
    values = {
        "ema": average(ema), "backup": backup, "stats": stats, "slots": slots, "chunks": ROW_CHUNKS,
        "momentum_buffer": first, "exp_avg": first, "exp_avg_sq": second, "corrections": corrections,
    }  # fmt: skip
    if kernel.op == "count_steps":
        steps, index = np.full(kernel.threads, 10, np.float32), np.arange(kernel.threads)
        corrections = memory.place(np.zeros((kernel.threads, 2), np.float32))
        values |= {
            "steps": memory.place(steps), "index": memory.place(index), "members": kernel.threads,
            "rows": kernel.threads, "corrections": corrections,
        }  # fmt: skip
        return block_of(kernel, entry, [], values, memory, 0)
    if kernel.op == "restore_adam":
        values |= {"weight_decay": 1e-2, "eps": 1e-8}
    rows = [Row(0, 0, CHUNK, 0, i) for i in range(further_rows)]
    rows.append(Row(param, grad, CHUNK * ROW_CHUNKS, 0, further_rows))
    return block_of(kernel, entry, rows, values, memory, further_rows + BLOCK)
