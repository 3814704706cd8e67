"""Calls of the kernels as the optimizer makes them: which kernel, and the bytes of its parameters.

Tables are filled as csrc/cuda/launch.cuh fills them.
"""

from __future__ import annotations

import bisect
import itertools
import re
from dataclasses import dataclass

import numpy as np

from bench.sass.binary import Entry
from bench.sass.layout import Parameters, constant
from bench.sass.machine import Block, Memory

CHUNK = constant("kChunk")
WARP_ROW = constant("kWarpRow")
WARPS = constant("kWarps")
THREADS = 32 * WARPS
TABLES = tuple(constant(f"k{size}Table") for size in ("Small", "Middle", "Large"))
REUSE_TABLES = (constant("kMiddleTable"),)


@dataclass(frozen=True)
class Kernel:
    """A kernel and the struct of its arguments."""

    op: str
    arguments: str
    template: str  # its arguments, where {T} is the type of the parameters
    threads: int = THREADS
    has_table: bool = True
    tables: tuple[int, ...] = TABLES
    variant: str = ""  # of the op, by the arguments that it gets

    @property
    def call(self) -> str:
        """The op, and what is special about its arguments: a key of MOVED in bench/gpu_model.py."""
        return "_".join(filter(None, [self.op, self.variant]))

    def name(self, storage: str, rows: int) -> str:
        """With its template arguments, for a type of parameters and the smallest table that takes so many rows."""
        table = f"Table<{min(size for size in self.tables if size >= rows)}>"
        return f"{self.op}_kernel<{self.template.format(T=storage, table=table)}>"


# With an average in fp32, a backup and no masters; SGD with momentum; kept in fp32, and without a backup between
# ascents.
KERNELS = [
    Kernel("noise_norm", "NoiseNormArguments", "{T}, float, false, {table}"),
    Kernel("perturb", "PerturbArguments", "{T}, float, false, {table}"),
    Kernel("update_ema", "UpdateEmaArguments", "{T}, float, false, {table}"),
    Kernel("restore", "RestoreArguments", "{T}, false, {table}"),
    Kernel("restore_sgd", "SgdArguments", "{T}, false, true, false, {table}"),
    Kernel("restore_adam", "AdamArguments", "{T}, false, false, {table}"),
    Kernel("perturb", "PerturbArguments", "{T}, float, false, {table}", variant="keeping"),
    Kernel("dots", "DotsArguments", "{T}, {table}", tables=REUSE_TABLES),
    Kernel("project", "ProjectArguments", "{T}, {table}", tables=REUSE_TABLES),
    Kernel("update_ema", "UpdateEmaArguments", "{T}, float, true, {table}", tables=REUSE_TABLES, variant="measuring"),
    Kernel("restore_sgd", "SgdArguments", "{T}, false, true, true, {table}", tables=REUSE_TABLES, variant="reusing"),
    Kernel("restore_adam", "AdamArguments", "{T}, false, true, {table}", tables=REUSE_TABLES, variant="reusing"),
]
COUNT_STEPS = Kernel("count_steps", "CountArguments", "float", 128, False)  # compiled with the kernels of fp32
STORAGE = {"fp32": "float", "bf16": "fsam::bfloat16"}


def number(otherwise: float, data: int = 0, is_double: bool = False) -> dict:
    """A Number of arguments.h: on the device where `data` is an address."""
    return {"data": data, "is_double": is_double, "otherwise": otherwise}


def average(data: int) -> dict:
    """An Average in the type of the arithmetic."""
    return {"storage": 1 if data else 0, "data": data, "scales": 0}


def kept(data: int) -> dict:
    """A Kept of kept.h in the type of the arithmetic."""
    return {"data": data, "narrow": False}


# What a step hands over beside addresses: F-SAM with the defaults of the optimizer, SGD and AdamW as they are used.
DEFAULTS = {
    "sigma": 1.0, "lmbda": 0.9, "updated": False, "adaptive": False, "feeds": True, "forward": 0, "eps": 1e-12,
    "momentum": 0.9, "dampening": 0.0, "weight_decay": 1e-4, "nesterov": False, "maximize": False,
    "beta1": 0.9, "beta2": 0.999, "decoupled": True,
    "grad_scale": number(1.0), "found_inf": number(0.0), "rho": number(0.05), "lr": number(0.1),
    "master": 0, "effect": 0, "rounding": 0, "adopts": False,
    "kept": kept(0), "reused": {"v": kept(0), "squares": 0}, "reuse": 0.3, "reuse_eps": 1e-12,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of the table: the addresses of its tensors, its size and its place in the flat buffers."""

    param: int
    grad: int
    numel: int
    offset: int
    id: int


def span_of(chunks: int) -> int:
    """How many chunks a block takes in a call of so many."""
    span = 1
    while span < constant("kMaxSpan") and chunks // (2 * span) >= constant("kBlocksToSpare"):
        span *= 2
    return span


def hints(starts: list[int], blocks: int) -> dict:
    """Where the search for a block's row begins: the row of every so many blocks."""
    count, shift = constant("kHints"), 0
    while blocks >> shift >= count:
        shift += 1
    rows = [max(bisect.bisect_right(starts, i << shift) - 1, 0) for i in range(count + 1)]
    return {"hint_shift": shift, "hint": rows}


def table(rows: list[Row], capacity: int, span: int) -> tuple[dict, int]:
    """The values of a Table, and the number of blocks."""
    large = [row for row in rows if row.numel > WARP_ROW]
    small = [row for row in rows if 0 < row.numel <= WARP_ROW]
    ordered = large + small
    starts = [0, *itertools.accumulate(-(-row.numel // (span * CHUNK)) for row in large)]
    blocks = starts.pop()

    def column(values: list) -> list:
        return [*values, *[0] * (capacity - len(values))]

    columns = ("param", "grad", "offset", "numel", "id")
    values = {name: column([getattr(row, name) for row in ordered]) for name in columns}
    values |= {"first_block": column(starts), "large": len(large), "rows": len(ordered), "large_blocks": blocks}
    values |= {"span": span, **hints(starts, blocks)}
    return values, blocks + -(-len(small) // WARPS)


class ChangedParameters(Exception):
    """The binary takes parameters of another size than the headers say."""


def block_of(kernel: Kernel, entry: Entry, rows: dict, values: dict, memory: Memory, block: int) -> Block:
    """A block of a call. The parameters have to be as many bytes as the binary takes."""
    result = Parameters()
    if kernel.has_table:
        result.struct("Table", rows, {"kRows": capacity_of(entry.shown)})
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


# ---- The calls that are counted


@dataclass(frozen=True)
class Model:
    """The sizes of a call's rows, and the row of which a block is looked at."""

    name: str
    sizes: tuple[int, ...]
    row: int = 0

    @property
    def chunks(self) -> int:
        """How many chunks its rows have."""
        return sum(-(-size // CHUNK) for size in self.sizes)

    @property
    def span(self) -> int:
        """How many chunks a block takes."""
        return span_of(self.chunks)


_WIDTH = 768
_LAYER = (
    *(_WIDTH, _WIDTH, 3 * _WIDTH**2, 3 * _WIDTH, _WIDTH**2, _WIDTH),  # norm, attention
    *(_WIDTH, _WIDTH, 4 * _WIDTH**2, 4 * _WIDTH, 4 * _WIDTH**2, _WIDTH),  # norm, two linear layers
)
MODELS = [
    Model("100M, flat", (100_000_000,)),
    Model("10M, flat", (10_000_000,)),
    Model("GPT-2", (50257 * _WIDTH, 1024 * _WIDTH, *12 * _LAYER, _WIDTH, _WIDTH), 2 + 6 * len(_LAYER) + 8),
]
BLOCK = 5  # of the row: neither its first nor its last one


def default_block(kernel: Kernel, dtype: str, entry: Entry, model: Model) -> Block:
    """One block of a kernel's default call, of aligned parameters."""
    memory, elements = Memory(), model.span * CHUNK

    def window(type_: str, fill: float) -> int:
        """The address of a row of which the block's part is there."""
        values = np.full(elements, fill, np.float32)
        data = (values.view(np.uint32) >> 16).astype(np.uint16) if type_ == "bf16" else values
        return memory.place(data) - BLOCK * data.nbytes

    param, grad, backup = (window(dtype, fill) for fill in (1.0, 0.5, 1.25))
    ema, first, second, direction = (window("fp32", fill) for fill in (0.25, 0.5, 0.0625, 0.125))
    squares = memory.place(np.array([2.0, 3.0]))
    corrections = np.tile(np.array([1e-3, 0.5], np.float32), (max(len(model.sizes), kernel.threads), 1))
    values = {
        "ema": average(ema), "backup": backup, "momentum_buffer": first, "exp_avg": first, "exp_avg_sq": second,
        "stats": memory.place(np.array([7.0, 0, 0, 0, 0])), "corrections": memory.place(corrections),
        "slots": memory.place(np.zeros(5 * model.chunks, np.float32)), "chunks": model.chunks,
        "steps": memory.place(np.full(kernel.threads, 10, np.float32)),
        "index": memory.place(np.arange(kernel.threads)), "members": kernel.threads, "rows": kernel.threads,
        "sums": squares,
    }  # fmt: skip
    if kernel.op in ("dots", "project") or kernel.variant == "keeping":
        values["kept"] = kept(direction)
    if kernel.variant == "reusing":
        values |= {"backup": 0, "reused": {"v": kept(direction), "squares": squares}}
    if kernel.op == "restore_adam":
        values |= {"weight_decay": 1e-2, "eps": 1e-8}
    if not kernel.has_table:
        return block_of(kernel, entry, {}, values, memory, 0)
    rows = [Row(param, grad, size, 0, i) for i, size in enumerate(model.sizes)]
    filled, _ = table(rows, capacity_of(entry.shown), model.span)
    return block_of(kernel, entry, filled, values, memory, filled["first_block"][filled["id"].index(model.row)] + BLOCK)
