"""A `Problem` of tests/cuda_problem.py for the interpreter of SASS: tensors, rows and numbers as a kernel gets them."""

from __future__ import annotations

import pytest
import torch

from bench.sass import calls, figures
from bench.sass.binary import Entry
from bench.sass.calls import Kernel, Row
from bench.sass.machine import Memory
from bench.sass.program import Program
from bench.sass.walk import Walk
from fsam_ext.backends import ops

from .cuda_problem import Problem

# Those whose code is walked: sm_80's with -m large.
ARCHITECTURES = [pytest.param(arch, marks=pytest.mark.large if arch == "80" else ()) for arch in figures.ARCHITECTURES]


def place(memory: Memory, tensor: torch.Tensor) -> int:
    """The tensor's own bytes at an address that is aligned as the tensor is."""
    return memory.place(tensor.view(torch.uint8).numpy(), tensor.data_ptr() % 16)


def values_of(problem: Problem, kernel: Kernel, memory: Memory, chunks: int) -> dict:
    """The fields of the kernel's arguments, as the methods of Problem hand them over by default."""
    names = (
        "ema", "backup", "first", "second", "stats", "partials", "steps", "index", "corrections", "grad_scale",
        "found_inf", "rho", "lr", "kept", "sums", "squares",
    )  # fmt: skip
    at = {name: place(memory, getattr(problem, name).reshape(-1)) for name in names}
    values = {
        "ema": calls.average(at["ema"]), "backup": at["backup"], "stats": at["stats"], "slots": at["partials"],
        "chunks": chunks, "momentum_buffer": at["first"], "exp_avg": at["first"], "exp_avg_sq": at["second"],
        "steps": at["steps"], "index": at["index"], "corrections": at["corrections"],
        "members": len(problem.index), "rows": len(problem.corrections),
        "grad_scale": calls.number(1.0, at["grad_scale"]), "found_inf": calls.number(0.0, at["found_inf"]),
        "lr": calls.number(0.0, at["lr"]), "rho": calls.number(0.0, at["rho"], is_double=True),
        "sums": at["sums"], "sigma": 0.9, "lmbda": 0.6, "dampening": 0.1, "weight_decay": 0.01,
    }  # fmt: skip
    if kernel.op in ("dots", "project") or kernel.variant == "keeping":
        values["kept"] = calls.kept(at["kept"])
    if kernel.variant == "reusing":
        values |= {"backup": 0, "reused": {"v": calls.kept(at["kept"]), "squares": at["squares"]}}
    return values | ({"eps": 1e-8} if kernel.op == "restore_adam" else {})


def execute(problem: Problem, kernel: Kernel, entry: Entry, program: Program, span: int = 1) -> None:
    """Every block of the op's kernel, one after another; the problem's tensors hold the results.

    `span`: how many chunks a block takes.
    """
    memory, rows, chunks = Memory(), [], 0
    for i, (param, grad) in enumerate(zip(problem.params, problem.grads, strict=True)):
        numel = param.numel()
        addresses = [place(memory, tensor) if numel else 0 for tensor in (param, grad)]
        rows.append(Row(*addresses, numel, int(problem.offsets[i]), i if kernel.op == "restore_adam" else chunks))
        chunks += ops.count_chunks([numel])
    values = values_of(problem, kernel, memory, chunks)
    if kernel.has_table:
        table, blocks = calls.table(rows, calls.capacity_of(entry.shown), span)
    else:
        table, blocks = {}, -(-len(problem.index) // kernel.threads)
    for block in range(blocks):
        Walk(program, calls.block_of(kernel, entry, table, values, memory, block)).run()
