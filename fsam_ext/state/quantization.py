"""int8 averages outside the kernels: csrc/storage.h, NOTE [int8 averages], in PyTorch, for checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.ops import QUANTIZED
from .tensors import is_dense


def count_blocks(numel: int) -> int:
    """Number of scales of a parameter."""
    return -(-numel // QUANTIZED)


def _in_memory(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _dense(tensor: Tensor) -> Tensor:
    """The same elements without gaps, in the order that they have in memory."""
    if is_dense(tensor):
        return tensor
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).contiguous().permute(sorted(range(tensor.dim()), key=order.__getitem__))


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 values of an int8 average, in the shape and memory order of ``codes``, which may have gaps."""
    codes = _dense(codes)
    values = _in_memory(codes).float() * scales.float().repeat_interleave(QUANTIZED)[: codes.numel()]
    return values.as_strided(codes.shape, codes.stride())


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 codes in the shape and memory order of ``values``, float32 scales). A block with a NaN is unset.

    Values that :func:`dequantize` gave come back as they were, to the bit.
    """
    numel = values.numel()
    blocks = torch.zeros(count_blocks(numel) * QUANTIZED, dtype=torch.float32, device=values.device)
    blocks[:numel] = _in_memory(values)
    blocks = blocks.view(-1, QUANTIZED)
    unset = blocks.isnan().any(1)
    largest = blocks.nan_to_num(nan=0.0).abs().amax(1)
    steps = torch.full_like(largest, 127.0)  # a tensor: a number would be multiplied with its rounded inverse
    bits = (largest / steps).view(torch.int32)
    scales = ((bits + 0x7F) & ~0x7F).view(torch.float32)
    scales = torch.where(largest >= 2.0**-100, scales, 0.0)
    inverse = torch.where(scales > 0, 1.0 / scales, 0.0)
    codes = (blocks.nan_to_num(nan=0.0) * inverse[:, None]).round().to(torch.int8)
    codes = codes.flatten()[:numel].as_strided(values.shape, values.stride())
    return codes, torch.where(unset, torch.nan, scales)
