"""How the oracle stores what it computes: int8 averages, stochastic rounding, and all writes of an op in one go.

Like reference.py it shares nothing with what it judges: csrc/storage.h says the same in C++.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from .calls import in_one_go
from .ops import QUANTIZED


def compute(tensor: Tensor) -> Tensor:
    """In the dtype of the arithmetic."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def in_memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    """The elements of ``tensor`` in the order in which those of ``like`` lie in memory, in one dimension."""
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor).as_strided((like.numel(),), (1,))


def known(state: Tensor) -> Tensor:
    """A state that has seen no gradient (NaN) counts as zero."""
    return torch.where(state.isnan(), 0.0, state)


class Writes:
    """What an op stores: gathered first and written in one call, so that no interrupt comes in its middle."""

    def __init__(self) -> None:
        self._targets: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, target: Tensor, value: Tensor) -> None:
        """``target`` gets ``value``, which shares no memory with any target."""
        self._targets.append(target)
        self._values.append(value)

    def commit(self, journal: Tensor | None) -> None:
        """Writes, and counts it: step/transaction.py, NOTE [an interrupt at any moment]."""
        calls = [partial(torch._foreach_copy_, self._targets, self._values)] if self._targets else []
        in_one_go(*calls, *([] if journal is None else [partial(journal.add_, 1)]))


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    """The values of int8 ``codes`` with one scale for each block of 128; NaN where a block is unset."""
    return codes.to(scales.dtype) * scales.repeat_interleave(QUANTIZED)[: codes.numel()]


def quantized(values: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 codes and the scales of ``values``, one-dimensional; a NaN counts as zero.

    A scale is the largest magnitude of its block over 127, rounded up to 17 significant bits, so that no code is
    clipped and 127 times the scale is exact in float32; and 0 below 2^-100.
    """
    blocks = -(-values.numel() // QUANTIZED)
    padded = values.new_zeros(blocks * QUANTIZED)
    padded[: values.numel()] = known(values)
    padded = padded.view(blocks, QUANTIZED)
    largest = padded.abs().amax(1)
    zero = largest < 2.0**-100
    # Tensors on both sides: PyTorch may multiply by the rounded inverse of a number.
    steps = torch.full_like(largest, 127.0)
    mantissa, exponent = torch.frexp(largest / steps)
    scales = torch.where(zero, 0.0, torch.ldexp((mantissa * 2**17).ceil(), exponent - 17))
    inverse = torch.where(zero, 0.0, 1 / scales)
    codes = (padded * inverse[:, None]).round().to(torch.int8)  # half to even
    return codes.flatten()[: values.numel()], scales


class Average:
    """One row's part of the average, in whichever dtype stores it."""

    def __init__(self, like: Tensor, offset: int, ema: Tensor, ema_scale: Tensor | None) -> None:
        self.like = like
        self.stored = ema.reshape(-1)[offset : offset + like.numel()]
        self.scales = None
        if ema.dtype == torch.int8:
            first = offset // QUANTIZED
            self.scales = ema_scale.reshape(-1)[first : first - (-like.numel() // QUANTIZED)]

    def read(self) -> Tensor:
        """Its values, shaped like the parameter; NaN where no gradient has been seen."""
        values = compute(self.stored) if self.scales is None else dequantized(self.stored, self.scales)
        return values.as_strided(self.like.shape, self.like.stride(), values.storage_offset())

    def write(self, values: Tensor, applies: Tensor, writes: Writes) -> None:
        """Stores ``values`` where ``applies``."""
        values = in_memory_order(values, self.like)
        if self.scales is not None:
            values, scales = quantized(values)
            writes.add(self.scales, torch.where(applies, scales, self.scales))
        writes.add(self.stored, torch.where(applies, values.to(self.stored.dtype), self.stored))


def _signed(number: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return number - (number >> 63 << 64)


def _shifted(x: Tensor, by: int) -> Tensor:
    """An int64 shifted to the right as an unsigned one."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def random_bits(positions: Tensor, rounding: Tensor) -> Tensor:
    """32 random bits (in int64) for each of the ``positions``: the finalisers of SplitMix64 and of MurmurHash3.

    ``rounding`` is [seed, number of the step]. Integers wrap around.
    """
    mask = 0xFFFFFFFF
    x = rounding[0] + rounding[1] * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    key = (x ^ _shifted(x, 31)) + (positions >> 32) * 0x9E3779B9
    x = (positions ^ key) & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    return x ^ (x >> 16)


def stochastically_rounded(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """float32 numbers rounded to a 16-bit dtype: up with the probability of the part that is cut off.

    |x| in units in the last place, plus a random fraction below one, rounded down. Where float16 has no number above
    (65504 and more), and for inf and NaN: rounded to nearest.
    """
    info = torch.finfo(dtype)
    digits, lowest = round(-math.log2(info.eps)), round(math.log2(info.smallest_normal))
    cut = 23 - digits  # bits of a float32 beyond those of the dtype
    magnitude = x.double().abs()
    unit = torch.exp2((torch.frexp(magnitude).exponent - 1).clamp_min(lowest) - digits)
    fraction = (random & ((1 << cut) - 1)).double() * 2.0**-cut
    rounded = ((magnitude / unit).float() + fraction.float()).floor() * unit
    by_chance = x.isfinite()
    if dtype == torch.float16:
        by_chance = by_chance & (magnitude < info.max)
    return torch.where(by_chance, rounded.copysign(x), x.double()).to(dtype)
