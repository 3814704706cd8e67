"""The arguments of an op, checked before anything is written, in the words of csrc/op_arguments.h."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from .. import ops
from .rows import Rows, rows_of
from .tables import tables

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Call:
    """The checked rows of a call, and the arguments by which a kernel finds them."""

    rows: Rows
    device: torch.device
    dtype: torch.dtype
    where: tuple  # params, grads, numel, offset, table, rows_of_chunks
    alive: list[Tensor]  # reordered gradients


def refuse_sparse(tensors: Sequence[Tensor], name: str) -> None:
    """Raises RuntimeError for the first tensor of a list that is not strided."""
    for i, tensor in enumerate(tensors):
        if tensor.layout != torch.strided:
            raise RuntimeError(
                f"fsam_ext: {name}[{i}] is sparse; only dense (strided) tensors are supported: "
                "use sparse=False, or to_dense()"
            )


def _check_like(first: Tensor, tensors: Sequence[Tensor], name: str, other_dtype: str, other_device: str) -> None:
    """All with the dtype and device of ``first``: sets tell, the loop only finds the one to name."""
    dtype, device = first.dtype, first.get_device()
    if set(map(attrgetter("dtype"), tensors)) == {dtype} and set(map(Tensor.get_device, tensors)) == {device}:
        return
    for i, tensor in enumerate(tensors):
        if tensor.dtype != dtype:
            raise RuntimeError(f"fsam_ext: {name}[{i}] {other_dtype}")
        if tensor.get_device() != device:
            raise RuntimeError(f"fsam_ext: {name}[{i}] {other_device}")


def checked_call(params: Sequence[Tensor], grads: Sequence[Tensor] | None, offsets: Tensor) -> Call:
    """Checks the rows; raises what csrc/op_arguments.h raises, in the same words."""
    dtype, device = params[0].dtype, params[0].device
    if dtype not in DTYPES:
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
    rows = rows_of(
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
        where = (None, None, 0, 0, *tables(rows, params, grads, device))
    return Call(rows, device, dtype, where, alive)


def small(tensor: Tensor | None, name: str, numel: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """The small tensor, checked."""
    if tensor is not None and not (
        tensor.device == device and tensor.dtype == dtype and tensor.is_contiguous() and tensor.numel() >= numel
    ):
        raise RuntimeError(
            f"fsam_ext: {name} must be a contiguous {str(dtype).removeprefix('torch.')} tensor of "
            f"at least {numel} elements on the parameters' device"
        )
    return tensor


def flat(buffer: Tensor | None, name: str, call: Call, dtype: torch.dtype) -> Tensor | None:
    """The flat state buffer, checked."""
    return small(buffer, name, call.rows.extent, call.device, dtype)


def average(ema: Tensor | None, ema_scale: Tensor | None, call: Call) -> tuple[Tensor | None, Tensor | None]:
    """The average and its scales, checked; no scales where it has none."""
    if ema is None:
        return None, None
    compute = ops.compute_dtype(call.dtype)
    if ema.dtype == compute or (ema.dtype == torch.bfloat16 and compute == torch.float32):
        return flat(ema, "ema", call, ema.dtype), None
    if ema.dtype != torch.int8 or compute != torch.float32:
        raise RuntimeError("fsam_ext: ema must be float32, bfloat16 or int8 (float64 for float64 parameters)")
    if ema_scale is None:
        raise RuntimeError(f"fsam_ext: an int8 ema needs ema_scale, one float32 for each {ops.QUANTIZED} elements")
    if not call.rows.in_blocks:
        raise RuntimeError(f"fsam_ext: with an int8 ema each offset must be a multiple of {ops.QUANTIZED}")
    flat(ema, "ema", call, torch.int8)
    return ema, small(ema_scale, "ema_scale", -(-call.rows.extent // ops.QUANTIZED), call.device, torch.float32)


def kept_gradient(buffer: Tensor | None, name: str, call: Call) -> Tensor | None:
    """What is kept of gradients, or reused, checked."""
    if buffer is None:
        return None
    compute = ops.compute_dtype(call.dtype)
    if buffer.dtype != compute and not (buffer.dtype == torch.bfloat16 and compute == torch.float32):
        raise RuntimeError(f"fsam_ext: {name} must be float32 or bfloat16 (float64 for float64 parameters)")
    return flat(buffer, name, call, buffer.dtype)


def reused_direction(reused: Tensor | None, reuse_sq: Tensor | None, call: Call) -> tuple[Tensor | None, Tensor | None]:
    """What an update reuses and the squared norms, checked; neither where it reuses nothing."""
    if reused is None:
        return None, None
    if reuse_sq is None:
        raise RuntimeError("fsam_ext: reused needs reuse_sq, the squared norms of the gradient and of it")
    kept_gradient(reused, "reused", call)
    return reused, small(reuse_sq, "reuse_sq", 2, call.device, torch.float64)


def square_sums(partials: Tensor | None, grad_sq: Tensor | None, call: Call) -> Tensor | None:
    """Where each chunk's sum of squares goes, checked; None where `grad_sq` is not asked for."""
    if grad_sq is None:
        return None
    if partials is None:
        raise RuntimeError("fsam_ext: grad_sq needs partials, an element for each chunk")
    small(grad_sq, "grad_sq", 1, call.device, torch.float64)
    return small(partials, "partials", call.rows.chunks, call.device, ops.compute_dtype(call.dtype))


def backup_dtype(backup: Tensor | None, call: Call) -> torch.dtype:
    """The dtype of the unperturbed weights, checked: that of the parameters, or float32 for masters."""
    has_masters = backup is not None and call.dtype.itemsize == 2 and backup.dtype == torch.float32
    dtype = torch.float32 if has_masters else call.dtype
    flat(backup, "backup", call, dtype)
    return dtype


def effective_rounding(rounding: Tensor | None, call: Call, unperturbed: torch.dtype) -> Tensor | None:
    """The seed and the step, checked; None where weights are rounded to nearest."""
    small(rounding, "rounding", 2, call.device, torch.int64)
    return rounding if call.dtype.itemsize == 2 and unperturbed == call.dtype else None


def check_numbers(device: torch.device, **tensors: Tensor | None) -> None:
    """Each is float64 or float32 and has an element."""
    for name, tensor in tensors.items():
        is_double = tensor is not None and tensor.dtype == torch.float64
        small(tensor, name, 1, device, torch.float64 if is_double else torch.float32)
