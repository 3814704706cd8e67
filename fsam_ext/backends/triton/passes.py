"""The ops, documented in fsam_ext/backends/ops.py: each checks its arguments and launches its kernel."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .. import ops
from ..capture import capturing
from .checks import (
    Call,
    average,
    backup_dtype,
    check_numbers,
    checked_call,
    effective_rounding,
    flat,
    kept_gradient,
    reused_direction,
    small,
    square_sums,
)
from .launch import COUNT_BLOCK, SUM_BLOCK, launch, tile, without_compiling

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,  # averages only
}
DOTS = 2  # the sums of `dots`


def _on_device(op: Callable) -> Callable:
    """Triton launches on the current device: makes that of the first argument current. No rows need no device."""

    def call(device: torch.device, *args: Any) -> None:
        if capturing(device):
            without_compiling(op, *args)
        else:
            op(*args)

    @functools.wraps(op)
    def run(first: Sequence[Tensor] | Tensor, *args: Any) -> None:
        device = first.device if isinstance(first, Tensor) else first[0].device if first else torch.device("cpu")
        if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
            call(device, first, *args)
        else:
            with torch.accelerator.device_index(device.index):
                call(device, first, *args)

    return run


def _counted(op: Callable) -> Callable:
    """Counts in the journal that an op has written: step/transaction.py, NOTE [an interrupt at any moment]."""
    place = list(inspect.signature(op).parameters).index("journal")

    @functools.wraps(op)
    def run(*args: Any) -> None:
        journal = small(args[place] if len(args) > place else None, "journal", 1, torch.device("cpu"), torch.int64)
        _ = op(*args), journal is not None and journal.add_(1)

    return run


def _types(call: Call, **others: torch.dtype | Tensor | None) -> dict[str, Any]:
    """NOTE [types of a kernel] in kernels/memory.py; ``others`` are M, B and K, or tensors of that type."""
    dtypes = {"T": call.dtype, "S": ops.compute_dtype(call.dtype)}
    dtypes |= {name: other.dtype if isinstance(other, Tensor) else other for name, other in others.items()}
    return {name: None if dtype is None else TYPES[dtype] for name, dtype in dtypes.items()}


def _add_slots(call: Call, partials: Tensor, sums: Tensor, width: int) -> None:
    """The second stage of a sum: ``width`` values of each chunk."""
    launch("sum_partials", call.dtype, width, partials, call.rows.chunks, sums, WIDTH=width, BLOCK=SUM_BLOCK)


@_on_device
def noise_norm(
    params, grads, offsets, ema, ema_scale, grad_scale, sigma, lmbda, adaptive, ema_updated,
    partials, stats,
) -> None:  # fmt: skip
    """Pass A; see :func:`fsam_ext.backends.ops.noise_norm`."""
    if not params:
        small(stats, "stats", ops.STATISTICS, stats.device, torch.float64).zero_()
        return
    call = checked_call(params, grads, offsets)
    compute = ops.compute_dtype(call.dtype)
    chunks = call.rows.chunks
    small(stats, "stats", ops.STATISTICS, call.device, torch.float64)
    ema, ema_scale = average(ema, ema_scale, call)
    small(partials, "partials", chunks * ops.STATISTICS, call.device, compute)
    check_numbers(call.device, grad_scale=grad_scale)
    if chunks:
        launch(
            "noise_norm", call.dtype, chunks,
            *call.where, ema, ema_scale, grad_scale, sigma, lmbda, partials,
            ADAPTIVE=adaptive, UPDATED=ema_updated, **_types(call, M=ema),
        )  # fmt: skip
    _add_slots(call, partials, stats, ops.STATISTICS)


@_counted
@_on_device
def perturb(
    params, grads, offsets, ema, ema_scale, backup, stats, grad_scale, rho, rho_tensor, sigma,
    lmbda, eps, adaptive, ema_updated, feeds, forward, effect, journal=None, kept=None,
) -> None:  # fmt: skip
    """Pass B; see :func:`fsam_ext.backends.ops.perturb`."""
    if not params:
        return
    call = checked_call(params, grads, offsets)
    compute = ops.compute_dtype(call.dtype)
    chunks = call.rows.chunks
    ema, ema_scale = average(ema, ema_scale, call)
    unperturbed = backup_dtype(backup, call)
    if forward not in (0, 1, 2) or (forward and call.dtype == torch.float64):
        raise RuntimeError("fsam_ext: forward must be 0 (as stored), 1 (bfloat16) or 2 (float16), and 0 for float64")
    small(effect, "effect", chunks * ops.EFFECT, call.device, compute)
    small(stats, "stats", ops.STATISTICS, call.device, torch.float64)
    check_numbers(call.device, grad_scale=grad_scale, rho_tensor=rho_tensor)
    kept_gradient(kept, "kept", call)
    if chunks:
        launch(
            "perturb", call.dtype, chunks,
            *call.where, ema, ema_scale, backup, stats, grad_scale, rho_tensor, rho, sigma, lmbda,
            eps, effect, kept, ADAPTIVE=adaptive, UPDATED=ema_updated, FEEDS=feeds, FORWARD=forward,
            BLOCK=tile(call.dtype), **_types(call, M=ema, B=unperturbed, K=kept),
        )  # fmt: skip


@_counted
@_on_device
def update_ema(
    params, grads, offsets, ema, ema_scale, stats, grad_scale, found_inf, lmbda, journal=None,
    partials=None, grad_sq=None,
) -> None:  # fmt: skip
    """The average without an ascent; see :func:`fsam_ext.backends.ops.update_ema`."""
    if not params:
        if grad_sq is not None:
            small(grad_sq, "grad_sq", 1, grad_sq.device, torch.float64).zero_()
        return
    call = checked_call(params, grads, offsets)
    ema, ema_scale = average(ema, ema_scale, call)
    check_numbers(call.device, stats=stats, grad_scale=grad_scale, found_inf=found_inf)
    partials = square_sums(partials, grad_sq, call)
    if call.rows.chunks:
        launch(
            "update_ema", call.dtype, call.rows.chunks,
            *call.where, ema, ema_scale, stats, grad_scale, found_inf, lmbda, partials,
            BLOCK=tile(call.dtype), **_types(call, M=ema),
        )  # fmt: skip
    if grad_sq is not None:
        _add_slots(call, partials, grad_sq, 1)


@_on_device
def dots(params, grads, offsets, kept, grad_scale, partials, sums) -> None:
    """Products with what pass B kept; see :func:`fsam_ext.backends.ops.dots`."""
    if not params:
        small(sums, "sums", DOTS, sums.device, torch.float64).zero_()
        return
    call = checked_call(params, grads, offsets)
    kept_gradient(kept, "kept", call)
    check_numbers(call.device, grad_scale=grad_scale)
    small(partials, "partials", call.rows.chunks * DOTS, call.device, ops.compute_dtype(call.dtype))
    small(sums, "sums", DOTS, call.device, torch.float64)
    if call.rows.chunks:
        launch(
            "dots", call.dtype, call.rows.chunks,
            *call.where, kept, grad_scale, partials, **_types(call, K=kept),
        )  # fmt: skip
    _add_slots(call, partials, sums, DOTS)


@_counted
@_on_device
def project(
    params, grads, offsets, kept, sums, stats, grad_scale, found_inf, partials, kept_sq, journal=None,
) -> None:  # fmt: skip
    """What is reused, of what pass B kept; see :func:`fsam_ext.backends.ops.project`."""
    if not params:
        _square_of_nothing(small(kept_sq, "kept_sq", 1, kept_sq.device, torch.float64), stats)
        return
    call = checked_call(params, grads, offsets)
    kept_gradient(kept, "kept", call)
    small(sums, "sums", DOTS, call.device, torch.float64)
    check_numbers(call.device, stats=stats, grad_scale=grad_scale, found_inf=found_inf)
    small(partials, "partials", call.rows.chunks, call.device, ops.compute_dtype(call.dtype))
    small(kept_sq, "kept_sq", 1, call.device, torch.float64)
    if not call.rows.chunks:
        _square_of_nothing(kept_sq, stats)
        return
    launch(
        "project", call.dtype, call.rows.chunks,
        *call.where, kept, sums, stats, grad_scale, found_inf, partials, BLOCK=tile(call.dtype),
        **_types(call, K=kept),
    )  # fmt: skip
    _add_slots(call, partials, kept_sq, 1)


def _square_of_nothing(kept_sq: Tensor, stats: Tensor | None) -> None:
    """Where no row has an element: 0, and NaN where the norm is not finite."""
    if stats is None:
        kept_sq.zero_()
    else:
        torch.mul(stats.view(-1)[:1], 0.0, out=kept_sq.view(-1)[:1])


@_on_device
def restore(params, offsets, backup) -> None:
    """Pass C without a base; see :func:`fsam_ext.backends.ops.restore`."""
    if not params:
        return
    call = checked_call(params, None, offsets)
    unperturbed = backup_dtype(backup, call)
    if call.rows.chunks:
        types = _types(call, B=unperturbed)
        launch(
            "restore", call.dtype, call.rows.chunks,
            *call.where, backup, T=types["T"], B=types["B"], BLOCK=tile(call.dtype),
        )  # fmt: skip


@_counted
@_on_device
def restore_sgd(
    params, grads, offsets, backup, momentum_buffer, stats, grad_scale, found_inf, lr, lr_tensor,
    momentum, dampening, weight_decay, nesterov, maximize, rounding, adopts=False, journal=None,
    reused=None, reuse_sq=None, reuse=0.0, reuse_eps=0.0,
) -> None:  # fmt: skip
    """Pass C with SGD; see :func:`fsam_ext.backends.ops.restore_sgd`."""
    if not params:
        return
    call = checked_call(params, grads, offsets)
    unperturbed = backup_dtype(backup, call)
    check_numbers(call.device, stats=stats, grad_scale=grad_scale, found_inf=found_inf, lr_tensor=lr_tensor)
    flat(momentum_buffer, "momentum_buffer", call, ops.compute_dtype(call.dtype))
    rounding = effective_rounding(rounding, call, unperturbed)
    reused, reuse_sq = reused_direction(reused, reuse_sq, call)
    if call.rows.chunks:
        launch(
            "restore_sgd", call.dtype, call.rows.chunks,
            *call.where, backup, momentum_buffer, stats, grad_scale, found_inf, lr_tensor,
            lr, momentum, dampening, weight_decay, rounding, reused, reuse_sq, reuse, reuse_eps,
            DECAY=weight_decay != 0, NESTEROV=nesterov, MAXIMIZE=maximize,
            ADOPTS=adopts and unperturbed != call.dtype,
            BLOCK=tile(call.dtype), **_types(call, B=unperturbed, K=reused),
        )  # fmt: skip


@_counted
@_on_device
def count_steps(steps, index, corrections, stats, found_inf, lr, lr_tensor, beta1, beta2, journal=None) -> None:
    """Before pass C with Adam; see :func:`fsam_ext.backends.ops.count_steps`."""
    members, rows = index.numel(), corrections.numel() // 2
    if not (corrections.dim() == 2 and corrections.size(1) == 2 and rows <= members):
        raise RuntimeError(
            "fsam_ext: corrections must have the shape [rows, 2] with at most as many rows as index has entries, "
            f"{members}"
        )
    device, compute = steps.device, torch.float64 if corrections.dtype == torch.float64 else torch.float32
    small(steps, "steps", 0, device, torch.float32)
    small(index, "index", 0, device, torch.int64)
    small(corrections, "corrections", 0, device, compute)
    check_numbers(device, stats=stats, found_inf=found_inf, lr_tensor=lr_tensor)
    if members:
        launch(
            "count_steps", compute, -(-members // COUNT_BLOCK),
            steps, index, members, corrections, rows, stats, found_inf, lr_tensor, lr, beta1, beta2, BLOCK=COUNT_BLOCK,
        )  # fmt: skip


@_counted
@_on_device
def restore_adam(
    params, grads, offsets, backup, exp_avg, exp_avg_sq, corrections, stats, grad_scale, found_inf, lr,
    lr_tensor, beta1, beta2, eps, weight_decay, decoupled, maximize, rounding, adopts=False, journal=None,
    reused=None, reuse_sq=None, reuse=0.0, reuse_eps=0.0,
) -> None:  # fmt: skip
    """Pass C with Adam or AdamW; see :func:`fsam_ext.backends.ops.restore_adam`."""
    if not params:
        return
    call = checked_call(params, grads, offsets)
    compute = ops.compute_dtype(call.dtype)
    unperturbed = backup_dtype(backup, call)
    check_numbers(call.device, stats=stats, grad_scale=grad_scale, found_inf=found_inf, lr_tensor=lr_tensor)
    flat(exp_avg, "exp_avg", call, compute)
    flat(exp_avg_sq, "exp_avg_sq", call, compute)
    small(corrections, "corrections", 2 * len(params), call.device, compute)
    rounding = effective_rounding(rounding, call, unperturbed)
    reused, reuse_sq = reused_direction(reused, reuse_sq, call)
    if call.rows.chunks:
        launch(
            "restore_adam", call.dtype, call.rows.chunks,
            *call.where, backup, exp_avg, exp_avg_sq, corrections, stats, grad_scale, found_inf,
            lr_tensor, lr, beta1, beta2, eps, weight_decay, rounding, reused, reuse_sq, reuse, reuse_eps,
            DECAY=weight_decay != 0, DECOUPLED=decoupled, MAXIMIZE=maximize,
            ADOPTS=adopts and unperturbed != call.dtype,
            BLOCK=tile(call.dtype), **_types(call, B=unperturbed, K=reused),
        )  # fmt: skip
