"""The Triton backend: the six ops on any GPU that Triton serves, as `torch.ops.fsam_ext_triton.*`.

This file is the host side: it checks the arguments, tells the kernels (triton_kernels.py) where the rows are and
registers the ops. Under ``TRITON_INTERPRET=1`` the ops serve CPU tensors, for tests and debugging.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import attrgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from . import triton_kernels as kernels

NAMESPACE = "fsam_ext_triton"
INTERPRETED = triton.knobs.runtime.interpret

# csrc/schema.cpp, word for word (a test compares them): this backend has to work where no C++ was built.
SCHEMAS = {
    "noise_norm": "(Tensor[] params, Tensor[] grads, Tensor offsets, Tensor? ema, Tensor? ema_scale, Tensor? "
    "grad_scale, float sigma, float lmbda, bool adaptive, bool ema_updated, Tensor(a!) partials, "
    "Tensor(b!) stats) -> ()",
    "perturb": "(Tensor(a!)[] params, Tensor[] grads, Tensor offsets, Tensor(b!)? ema, Tensor(c!)? ema_scale, "
    "Tensor(d!) backup, Tensor stats, Tensor? grad_scale, float rho, Tensor? rho_tensor, float "
    "sigma, float lmbda, float eps, bool adaptive, bool ema_updated, bool feeds, int forward, "
    "Tensor(e!)? effect) -> ()",
    "update_ema": "(Tensor[] params, Tensor[] grads, Tensor offsets, Tensor(a!) ema, Tensor(b!)? ema_scale, "
    "Tensor? stats, Tensor? grad_scale, Tensor? found_inf, float lmbda) -> ()",
    "restore": "(Tensor(a!)[] params, Tensor offsets, Tensor backup) -> ()",
    "restore_sgd": "(Tensor(a!)[] params, Tensor[] grads, Tensor offsets, Tensor(b!)? backup, Tensor(c!)? "
    "momentum_buffer, Tensor? stats, Tensor? grad_scale, Tensor? found_inf, float lr, Tensor? "
    "lr_tensor, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, "
    "Tensor? rounding) -> ()",
    "restore_adam": "(Tensor(a!)[] params, Tensor[] grads, Tensor offsets, Tensor(b!)? backup, Tensor(c!) exp_avg, "
    "Tensor(d!) exp_avg_sq, Tensor steps, Tensor? stats, Tensor? grad_scale, Tensor? found_inf, "
    "float lr, Tensor? lr_tensor, float beta1, float beta2, float eps, float weight_decay, bool "
    "decoupled, bool maximize, Tensor? rounding) -> ()",
}

_TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,  # averages only
}


def unavailable(device: torch.device) -> str | None:
    """Returns why this backend cannot serve ``device``, or None where it can."""
    if INTERPRETED:
        return None if device.type == "cpu" else "TRITON_INTERPRET is set: Triton runs on the CPU"
    if device.type not in ("cuda", "xpu"):
        return "it serves GPUs only (cuda, ROCm, xpu), and the CPU under TRITON_INTERPRET=1"
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError as error:
        return f"Triton finds no driver for a GPU: {error}"
    if target.backend == "cuda" and torch.cuda.get_device_capability(device) < (7, 5):
        return "Triton needs compute capability 7.5 or later"
    return None


# ---- How the work is cut -------------------------------------------------------------------------

# NOTE [tiles]
# The norm takes its chunk in one tile: a reduction then synchronises once. The other passes walk
# the chunk in tiles of 1024 (fp64: 512) elements with 128 threads, so that each thread holds 8
# elements (4 of fp64) of up to four tensors: one or two 128-bit accesses for each tensor, no
# spills, and enough programs on a multiprocessor to hide the memory's latency. Eight elements are
# also the fewest that give 16-bit types 128-bit accesses: 1024 elements on 256 threads (4 waves of
# an AMD CDNA) give 64-bit ones. It is a table, not a search: nothing is tuned at import or in the
# first step, and a run always gives the same bits.


def tile(dtype: torch.dtype) -> int:
    """Elements that a program of an elementwise pass handles at once."""
    return 512 if dtype == torch.float64 else 1024


def threads(kernel: str, dtype: torch.dtype) -> int:
    """Threads of a program of ``kernel``, whatever the size of a warp is."""
    if kernel == "sum_partials":
        return 256
    if kernel == "noise_norm":
        return 512 if dtype == torch.float64 else 256
    return 128


SUM_BLOCK = 2048  # chunks that the norm's second stage adds at once


@functools.cache
def _warp_size() -> int:
    return 32 if INTERPRETED else triton.runtime.driver.active.get_current_target().warp_size


def _launch(kernel: str, dtype: torch.dtype, programs: int, *args: Any, **constants: Any) -> None:
    """``enable_fp_fusion=False``: separate multiplications and additions, as in every backend."""
    getattr(kernels, kernel)[(programs,)](
        *args,
        **constants,
        num_warps=threads(kernel, dtype) // _warp_size(),
        enable_fp_fusion=False,
    )


# ---- Rows: checked, and on the device ------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Rows:
    """What a call's tensors look like, but not where they are. Equal rows are one cached object."""

    numels: tuple[int, ...]
    offsets: tuple[int, ...]
    first_chunks: tuple[int, ...]
    chunks: int
    extent: int  # elements that a flat buffer needs
    in_blocks: bool  # each row starts a block of an int8 average
    reordered: tuple[int, ...]  # rows whose gradient lies in memory in another order


def _is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements fill one block of memory without gaps or overlap, in any order."""
    expected = 1
    for step, length in sorted((st, n) for st, n in zip(stride, size) if n != 1):
        if step != expected:
            return False
        expected *= length
    return True


# NOTE [what is checked in each call]
# A row costs a few hundred nanoseconds a call: sizes, strides and addresses are read each time,
# because a gradient may be another tensor at the address of the last one. What follows from sizes
# and strides is cached under them, and the table on the device under the addresses.
@functools.lru_cache(maxsize=1024)
def _rows(sizes: tuple, strides: tuple, grad_sizes: tuple, grad_strides: tuple, offsets: tuple[int, ...]) -> _Rows:
    reordered = []
    for i, (size, stride) in enumerate(zip(sizes, strides)):
        if grad_sizes and grad_sizes[i] != size:
            raise RuntimeError(f"fsam_ext: grads[{i}] has another shape than its parameter")
        if 0 in size:
            continue
        if not _is_dense(size, stride):
            raise RuntimeError(
                f"fsam_ext: params[{i}] has gaps or overlaps in memory; only dense strides are "
                "supported: call .contiguous() on it"
            )
        # A stride along a dimension of size 1 means nothing.
        if grad_sizes and any(a != b and n != 1 for a, b, n in zip(stride, grad_strides[i], size)):
            reordered.append(i)
    if any(offset < 0 for offset in offsets):
        raise RuntimeError("fsam_ext: offsets must not be negative")
    numels = tuple(torch.Size(size).numel() for size in sizes)
    chunks = [-(-numel // ops.CHUNK) for numel in numels]
    return _Rows(
        numels,
        offsets,
        tuple(accumulate(chunks[:-1], initial=0)),
        sum(chunks),
        max(offset + numel for offset, numel in zip(offsets, numels)),
        not any(offset % ops.QUANTIZED for offset in offsets),
        tuple(reordered),
    )


def _capturing(device: torch.device) -> bool:
    """Whether the current stream records a graph."""
    is_capturing = getattr(torch.get_device_module(device), "is_current_stream_capturing", lambda: False)
    return is_capturing()


# NOTE [tables under graph capture]
# A graph replays its copies: one from the host would read memory that has long been freed. So
# under capture the numbers travel as arguments of kernels, which the graph keeps, and the table lives
# in the graph's own memory pool; it is not cached, because it holds nothing before the first replay.
def _to_device(values: Sequence[int], device: torch.device, capturing: bool) -> Tensor:
    """The int64 values on the device, without a synchronisation."""
    signed = [value - (value >> 63 << 64) for value in values]  # Intel's addresses have the top bit
    if capturing:
        numbers = torch.zeros(len(signed), dtype=torch.int64, device=device)
        torch._foreach_add_(numbers.unbind(), signed)
        return numbers
    # The pinned buffer's allocator keeps it until the copy is done.
    host = torch.tensor(signed, dtype=torch.int64, pin_memory=device.type != "cpu")
    return host.to(device, non_blocking=True)


@functools.lru_cache(maxsize=256)
def _rows_of_chunks(rows: _Rows, device: torch.device, stream: int, capturing: bool = False) -> Tensor:
    """The row of each chunk, int32."""
    first = _to_device(rows.first_chunks, device, capturing)
    chunks = torch.arange(rows.chunks, device=device)
    return torch.searchsorted(first, chunks, right=True, out_int32=True) - 1


@functools.lru_cache(maxsize=1024)
def _table(
    rows: _Rows,
    addresses: tuple[int, ...],
    grad_addresses: tuple[int, ...],
    device: torch.device,
    stream: int,
    capturing: bool = False,
) -> Tensor:
    """One entry a row: address, gradient's address, numel, offset, first chunk.

    Cached for each stream: it is written in the order of the stream that reads it.
    """
    columns = (addresses, grad_addresses, rows.numels, rows.offsets, rows.first_chunks)
    return _to_device(list(chain.from_iterable(zip(*columns))), device, capturing)


@dataclass
class _Call:
    """The checked rows of a call, and the arguments by which a kernel finds them."""

    rows: _Rows
    device: torch.device
    dtype: torch.dtype
    where: tuple  # params, grads, numel, offset, table, rows_of_chunks
    alive: list[Tensor]  # reordered gradients


def _check_like(first: Tensor, tensors: Sequence[Tensor], name: str, other_dtype: str, other_device: str) -> None:
    """All strided, with the dtype and device of ``first``: sets tell, the loop only finds the one to name."""
    dtype, device = first.dtype, first.get_device()
    if (
        set(map(attrgetter("layout"), tensors)) == {torch.strided}
        and set(map(attrgetter("dtype"), tensors)) == {dtype}
        and set(map(Tensor.get_device, tensors)) == {device}
    ):
        return
    for i, tensor in enumerate(tensors):
        if tensor.layout != torch.strided:
            raise RuntimeError(
                f"fsam_ext: {name}[{i}] is sparse; only dense (strided) tensors are supported: "
                "use sparse=False, or to_dense()"
            )
        if tensor.dtype != dtype:
            raise RuntimeError(f"fsam_ext: {name}[{i}] {other_dtype}")
        if tensor.get_device() != device:
            raise RuntimeError(f"fsam_ext: {name}[{i}] {other_device}")


def _call(params: Sequence[Tensor], grads: Sequence[Tensor] | None, offsets: Tensor) -> _Call:
    """Checks the rows; raises what csrc/op_arguments.h raises, in the same words."""
    dtype, device = params[0].dtype, params[0].device
    if dtype not in _TRITON_DTYPES or not dtype.is_floating_point:
        raise RuntimeError("fsam_ext: params[0] must be float64, float32, bfloat16 or float16")
    if not (
        offsets.is_cpu and offsets.dtype == torch.int64 and offsets.is_contiguous() and offsets.numel() == len(params)
    ):
        raise RuntimeError(
            "fsam_ext: offsets must be a contiguous int64 tensor on the CPU with one entry for "
            f"each of the {len(params)} parameters"
        )
    if grads is not None and len(grads) != len(params):
        raise RuntimeError(
            f"fsam_ext: {len(params)} params but {len(grads)} grads; each parameter of a call needs a gradient"
        )
    differs = "differs from params[0] in dtype or device; make one call for each dtype and device"
    _check_like(params[0], params, "params", differs, differs)
    if grads is not None:
        _check_like(
            params[0],
            grads,
            "grads",
            "has another dtype than its parameter; convert it",
            "is on another device than its parameter; move it",
        )
    rows = _rows(
        tuple(map(Tensor.size, params)),
        tuple(map(Tensor.stride, params)),
        tuple(map(Tensor.size, grads or ())),
        tuple(map(Tensor.stride, grads or ())),
        tuple(offsets.reshape(-1).tolist()),
    )
    alive = []
    if grads is not None and rows.reordered:
        grads = list(grads)
        for i in rows.reordered:
            grads[i] = torch.empty_like(params[i]).copy_(grads[i])
            alive.append(grads[i])
    # NOTE [one row needs no table]
    # Flattened models, and groups that share one flat buffer, have one row: its addresses go to the
    # kernel as arguments, so nothing is kept, copied or looked up.
    if len(params) == 1:
        grad = None if grads is None else grads[0]
        where = (params[0], grad, rows.numels[0], rows.offsets[0], None, None)
    else:
        where = (None, None, 0, 0, *_tables(rows, params, grads, device))
    return _Call(rows, device, dtype, where, alive)


def _tables(
    rows: _Rows,
    params: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    addresses = tuple(map(Tensor.data_ptr, params))
    grad_addresses = addresses if grads is None else tuple(map(Tensor.data_ptr, grads))
    if device.type == "cpu":
        stream, capturing = 0, False
    else:
        stream = triton.runtime.driver.active.get_current_stream(device.index)
        capturing = _capturing(device)
    if capturing:
        return (
            _table.__wrapped__(rows, addresses, grad_addresses, device, stream, True),
            _rows_of_chunks.__wrapped__(rows, device, stream, True),
        )
    return (
        _table(rows, addresses, grad_addresses, device, stream),
        _rows_of_chunks(rows, device, stream),
    )


def _small(tensor: Tensor | None, name: str, numel: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """The small tensor, checked."""
    if tensor is not None and not (
        tensor.device == device and tensor.dtype == dtype and tensor.is_contiguous() and tensor.numel() >= numel
    ):
        raise RuntimeError(
            f"fsam_ext: {name} must be a contiguous {str(dtype).removeprefix('torch.')} tensor of "
            f"at least {numel} elements on the parameters' device"
        )
    return tensor


def _flat(buffer: Tensor | None, name: str, call: _Call, dtype: torch.dtype) -> Tensor | None:
    """The flat state buffer, checked."""
    return _small(buffer, name, call.rows.extent, call.device, dtype)


def _average(ema: Tensor | None, ema_scale: Tensor | None, call: _Call) -> tuple[Tensor | None, Tensor | None]:
    """The average and its scales, checked; no scales where it has none."""
    if ema is None:
        return None, None
    compute = ops.compute_dtype(call.dtype)
    if ema.dtype == compute or (ema.dtype == torch.bfloat16 and compute == torch.float32):
        return _flat(ema, "ema", call, ema.dtype), None
    if ema.dtype != torch.int8 or compute != torch.float32:
        raise RuntimeError("fsam_ext: ema must be float32, bfloat16 or int8 (float64 for float64 parameters)")
    if ema_scale is None:
        raise RuntimeError(f"fsam_ext: an int8 ema needs ema_scale, one float32 for each {ops.QUANTIZED} elements")
    if not call.rows.in_blocks:
        raise RuntimeError(f"fsam_ext: with an int8 ema each offset must be a multiple of {ops.QUANTIZED}")
    _flat(ema, "ema", call, torch.int8)
    return ema, _small(ema_scale, "ema_scale", -(-call.rows.extent // ops.QUANTIZED), call.device, torch.float32)


def _backup(backup: Tensor | None, call: _Call) -> torch.dtype:
    """The dtype of the unperturbed weights, checked: that of the parameters, or float32 for masters."""
    has_masters = backup is not None and call.dtype.itemsize == 2 and backup.dtype == torch.float32
    dtype = torch.float32 if has_masters else call.dtype
    _flat(backup, "backup", call, dtype)
    return dtype


def _rounding(rounding: Tensor | None, call: _Call, unperturbed: torch.dtype) -> Tensor | None:
    """The seed and the step, checked; None where weights are rounded to nearest."""
    _small(rounding, "rounding", 2, call.device, torch.int64)
    return rounding if call.dtype.itemsize == 2 and unperturbed == call.dtype else None


# ---- The ops: documented in fsam_ext/ops.py ------------------------------------------------------


def _on_device(op: Callable) -> Callable:
    """Triton launches on the current device: makes the parameters' device current."""

    @functools.wraps(op)
    def run(params: Sequence[Tensor], *args: Any) -> None:
        device = params[0].device if params else torch.device("cpu")
        if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
            op(params, *args)
        else:
            with torch.accelerator.device_index(device.index):
                op(params, *args)

    return run


def _check_numbers(call: _Call, **tensors: Tensor | None) -> None:
    """Each is float64 or float32 and has an element."""
    for name, tensor in tensors.items():
        is_double = tensor is not None and tensor.dtype == torch.float64
        _small(tensor, name, 1, call.device, torch.float64 if is_double else torch.float32)


def _types(call: _Call, **others: torch.dtype | None) -> dict[str, Any]:
    """NOTE [types of a kernel] in triton_kernels.py; ``others`` are M and B."""
    dtypes = {"T": call.dtype, "S": ops.compute_dtype(call.dtype), **others}
    return {name: None if dtype is None else _TRITON_DTYPES[dtype] for name, dtype in dtypes.items()}


@_on_device
def noise_norm(
    params, grads, offsets, ema, ema_scale, grad_scale, sigma, lmbda, adaptive, ema_updated,
    partials, stats,
) -> None:  # fmt: skip
    """Pass A; see :func:`fsam_ext.ops.noise_norm`."""
    if not params:
        _small(stats, "stats", ops.STATISTICS, stats.device, torch.float64).zero_()
        return
    call = _call(params, grads, offsets)
    compute = ops.compute_dtype(call.dtype)
    chunks = call.rows.chunks
    _small(stats, "stats", ops.STATISTICS, call.device, torch.float64)
    ema, ema_scale = _average(ema, ema_scale, call)
    _small(partials, "partials", chunks * ops.STATISTICS, call.device, compute)
    _check_numbers(call, grad_scale=grad_scale)
    if chunks:
        _launch(
            "noise_norm", call.dtype, chunks,
            *call.where, ema, ema_scale, grad_scale, sigma, lmbda, partials,
            ADAPTIVE=adaptive, UPDATED=ema_updated, **_types(call, M=None if ema is None else ema.dtype),
        )  # fmt: skip
    _launch(
        "sum_partials", call.dtype, ops.STATISTICS,
        partials, chunks, stats, BLOCK=SUM_BLOCK,
    )  # fmt: skip


@_on_device
def perturb(
    params, grads, offsets, ema, ema_scale, backup, stats, grad_scale, rho, rho_tensor, sigma,
    lmbda, eps, adaptive, ema_updated, feeds, forward, effect,
) -> None:  # fmt: skip
    """Pass B; see :func:`fsam_ext.ops.perturb`."""
    if not params:
        return
    call = _call(params, grads, offsets)
    compute = ops.compute_dtype(call.dtype)
    chunks = call.rows.chunks
    ema, ema_scale = _average(ema, ema_scale, call)
    unperturbed = _backup(backup, call)
    if forward not in (0, 1, 2) or (forward and call.dtype == torch.float64):
        raise RuntimeError("fsam_ext: forward must be 0 (as stored), 1 (bfloat16) or 2 (float16), and 0 for float64")
    _small(effect, "effect", chunks * ops.EFFECT, call.device, compute)
    _small(stats, "stats", ops.STATISTICS, call.device, torch.float64)
    _check_numbers(call, grad_scale=grad_scale, rho_tensor=rho_tensor)
    if chunks:
        _launch(
            "perturb", call.dtype, chunks,
            *call.where, ema, ema_scale, backup, stats, grad_scale, rho_tensor, rho, sigma, lmbda,
            eps, effect, ADAPTIVE=adaptive, UPDATED=ema_updated, FEEDS=feeds, FORWARD=forward,
            BLOCK=tile(call.dtype), **_types(call, M=None if ema is None else ema.dtype, B=unperturbed),
        )  # fmt: skip


@_on_device
def update_ema(params, grads, offsets, ema, ema_scale, stats, grad_scale, found_inf, lmbda) -> None:
    """The average without an ascent; see :func:`fsam_ext.ops.update_ema`."""
    if not params:
        return
    call = _call(params, grads, offsets)
    ema, ema_scale = _average(ema, ema_scale, call)
    _check_numbers(call, stats=stats, grad_scale=grad_scale, found_inf=found_inf)
    if call.rows.chunks:
        _launch(
            "update_ema", call.dtype, call.rows.chunks,
            *call.where, ema, ema_scale, stats, grad_scale, found_inf, lmbda,
            BLOCK=tile(call.dtype), **_types(call, M=ema.dtype),
        )  # fmt: skip


@_on_device
def restore(params, offsets, backup) -> None:
    """Pass C without a base; see :func:`fsam_ext.ops.restore`."""
    if not params:
        return
    call = _call(params, None, offsets)
    unperturbed = _backup(backup, call)
    if call.rows.chunks:
        types = _types(call, B=unperturbed)
        _launch(
            "restore", call.dtype, call.rows.chunks,
            *call.where, backup, T=types["T"], B=types["B"], BLOCK=tile(call.dtype),
        )  # fmt: skip


@_on_device
def restore_sgd(
    params, grads, offsets, backup, momentum_buffer, stats, grad_scale, found_inf, lr, lr_tensor,
    momentum, dampening, weight_decay, nesterov, maximize, rounding,
) -> None:  # fmt: skip
    """Pass C with SGD; see :func:`fsam_ext.ops.restore_sgd`."""
    if not params:
        return
    call = _call(params, grads, offsets)
    unperturbed = _backup(backup, call)
    _check_numbers(call, stats=stats, grad_scale=grad_scale, found_inf=found_inf, lr_tensor=lr_tensor)
    _flat(momentum_buffer, "momentum_buffer", call, ops.compute_dtype(call.dtype))
    rounding = _rounding(rounding, call, unperturbed)
    if call.rows.chunks:
        _launch(
            "restore_sgd", call.dtype, call.rows.chunks,
            *call.where, backup, momentum_buffer, stats, grad_scale, found_inf, lr_tensor,
            lr, momentum, dampening, weight_decay, rounding,
            DECAY=weight_decay != 0, NESTEROV=nesterov, MAXIMIZE=maximize,
            BLOCK=tile(call.dtype), **_types(call, B=unperturbed),
        )  # fmt: skip


@_on_device
def restore_adam(
    params, grads, offsets, backup, exp_avg, exp_avg_sq, steps, stats, grad_scale, found_inf, lr,
    lr_tensor, beta1, beta2, eps, weight_decay, decoupled, maximize, rounding,
) -> None:  # fmt: skip
    """Pass C with Adam or AdamW; see :func:`fsam_ext.ops.restore_adam`."""
    if not params:
        return
    call = _call(params, grads, offsets)
    compute = ops.compute_dtype(call.dtype)
    unperturbed = _backup(backup, call)
    _check_numbers(call, stats=stats, grad_scale=grad_scale, found_inf=found_inf, lr_tensor=lr_tensor)
    _flat(exp_avg, "exp_avg", call, compute)
    _flat(exp_avg_sq, "exp_avg_sq", call, compute)
    _small(steps, "steps", len(params), call.device, torch.float32)
    rounding = _rounding(rounding, call, unperturbed)
    if call.rows.chunks:
        _launch(
            "restore_adam", call.dtype, call.rows.chunks,
            *call.where, backup, exp_avg, exp_avg_sq, steps, stats, grad_scale, found_inf,
            lr_tensor, lr, beta1, beta2, eps, weight_decay, rounding,
            DECAY=weight_decay != 0, DECOUPLED=decoupled, MAXIMIZE=maximize,
            BLOCK=tile(call.dtype), **_types(call, B=unperturbed),
        )  # fmt: skip


# `Library.define` and `impl`, not `custom_op`: docs/triton.md has what each costs the host. Sparse tensors come in too,
# to be refused with a sentence; ROCm's tensors have the keys of CUDA's.
_KEYS = ("CPU", "SparseCPU") if INTERPRETED else ("CUDA", "SparseCUDA", "XPU", "SparseXPU")
_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in _KEYS:
        _library.impl(_name, globals()[_name], _key)
ops.register_fakes(NAMESPACE)
