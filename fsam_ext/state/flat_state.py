"""Optimizer state as flat buffers: one contiguous tensor per state, dtype and device, instead of one per parameter.

The kernels then take one pointer and an offset per row, a call boxes two lists instead of six, and ``state[p][...]``
are views that checkpoints and users read as ever.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _library
from ..backends.ops import QUANTIZED, compute_dtype
from .quantization import count_blocks
from .shards import Sharding, address, like, local

# Each slice starts on a line of 128 bytes: what a GPU fetches at once, and two lines of a CPU.
ALIGNMENT_BYTES = 128

# What a new buffer holds. NaN marks an element that has seen no gradient: see NOTE [an unset state is NaN] in
# csrc/formulas.h. The paper's form of the EMA starts at zero instead.
FILL = {
    "ema": float("nan"),
    "ema_scale": float("nan"),
    "master": 0.0,
    "momentum_buffer": float("nan"),
    "exp_avg": 0.0,
    "exp_avg_sq": 0.0,
    "step": 0.0,
    "backup": 0.0,
}


def aligned_numel(numel: int, dtype: torch.dtype, quantized: bool = False) -> int:
    """``numel`` rounded up so that the next slice is aligned in buffers of ``dtype`` and of its state's dtype.

    ``quantized``: and starts a block of an int8 average.
    """
    unit = max(ALIGNMENT_BYTES // dtype.itemsize, QUANTIZED if quantized else 1)
    return -(-numel // unit) * unit


def memory_view(flat: Tensor, offset: int, like: Tensor) -> Tensor:
    """The slice of ``flat`` at ``offset`` with the shape and the memory order of ``like``."""
    return flat.as_strided(like.shape, like.stride(), flat.storage_offset() + offset)


def filled_flat(numel: int, dtype: torch.dtype, device: torch.device, value: float) -> Tensor:
    """A flat buffer, on huge pages where the system gives them: csrc/cpu/ops.cpp, NOTE [huge pages]."""
    flat = torch.empty(numel, dtype=dtype, device=device)
    if device.type == "cpu" and _library.CPU_REASON is None:
        torch.ops.fsam_ext.advise_huge_pages(flat)
    for part in _library.unshared_parts(flat):
        part.fill_(value)
    return flat


class Kind(NamedTuple):
    """What parameters whose state shares flat buffers have in common.

    Attributes:
        ema_dtype: what stores the average: float32 (float64 for float64), bfloat16 or int8.
        masters: keep float32 master weights, of which the parameters are the rounded copies.
        sharding: of sharded parameters, of which the buffers hold this rank's shards.
    """

    dtype: torch.dtype
    device: torch.device
    ema_dtype: torch.dtype
    masters: bool
    sharding: Sharding | None = None


# NOTE [layouts are replaced, not changed]
# An interrupt may come between any two lines. So nothing that says where state lies is edited in place: a layout that
# grows is a new one, made aside and swapped in by one assignment (step/layout.py), and what was made from the old one
# goes on describing the old buffers. Values move by copying, from what ``state`` holds to where it will lie: cut short,
# it is done again from the same values.


def _form(param: Tensor) -> tuple[Any, ...]:
    """What a parameter's slice was laid out for."""
    part = local(param)
    return part.shape, part.stride()


class FlatState:
    """The layout of some parameters' state, and the flat buffers that follow it.

    NOTE [layouts are replaced, not changed].

    Attributes:
        offset: parameter -> position of its slice, in elements.
        index: parameter -> its number, by which its step is counted.
        buffers: name of a state -> flat buffer.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.state_dtype = compute_dtype(kind.dtype)
        self.offset: dict[Tensor, int] = {}
        self.index: dict[Tensor, int] = {}
        self._form: dict[Tensor, tuple[Any, ...]] = {}
        self.numel = 0
        self.buffers: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.kind.device

    @property
    def masters(self) -> bool:
        """Whether the weights are kept in float32."""
        return self.kind.masters

    @property
    def quantized(self) -> bool:
        """Whether the average is int8, with a scale for each block."""
        return self.kind.ema_dtype == torch.int8

    @property
    def saved(self) -> str:
        """The buffer that the weights are restored from."""
        return "master" if self.masters else "backup"

    def extended(self, params: Iterable[Tensor], names: Iterable[str]) -> FlatState:
        """This layout with a slice for each of ``params`` and a buffer for each of ``names``; itself where it has them.

        A parameter of another shape or order than its slice gets one at the end.
        """
        changed = {}
        for param in params:
            form = _form(param)
            if self._form.get(param) != form:
                changed[param] = form
        missing = [name for name in names if name not in self.buffers]
        if not changed and not missing:
            return self
        new = copy.copy(self)
        new.offset, new.index, new._form = dict(self.offset), dict(self.index), {**self._form, **changed}
        for param, (shape, _) in changed.items():
            new.index.setdefault(param, len(new.index))
            new.offset[param] = new.numel
            new.numel += aligned_numel(math.prod(shape), self.kind.dtype, self.quantized)
        new.buffers = {name: new._grown(name) for name in (*self.buffers, *missing)}
        return new

    def _grown(self, name: str) -> Tensor:
        """The buffer of a state, or a larger copy of it where it is too small or not there."""
        buffer, size = self.buffers.get(name), self._size(name)
        if buffer is not None and buffer.numel() >= size:
            return buffer
        dtypes = {"step": torch.float32, "backup": self.kind.dtype, "ema": self.kind.ema_dtype}
        dtype = dtypes.get(name, self.state_dtype)
        grown = filled_flat(size, dtype, self.device, FILL[name] if dtype.is_floating_point else 0)
        if buffer is not None:
            for to, value in zip(*map(_library.unshared_parts, (grown[: buffer.numel()], buffer)), strict=True):
                to.copy_(value)
        return grown

    def _size(self, name: str) -> int:
        if name == "step":
            return len(self.index)
        return count_blocks(self.numel) if name == "ema_scale" else self.numel

    def part(self, name: str, param: Tensor) -> Tensor:
        """The part of a flat buffer that belongs to a parameter, or to this rank's shard of it."""
        if name == "step":
            return self.buffers[name][self.index[param]]
        offset = self.offset[param]
        if name == "ema_scale":
            first = offset // QUANTIZED
            return self.buffers[name][first : first + count_blocks(param.numel())]
        return memory_view(self.buffers[name], offset, local(param))

    def entry(self, name: str, param: Tensor) -> Tensor:
        """The same as ``state`` shows it: a DTensor where the parameter is one."""
        part = self.part(name, param)
        return part if name in ("step", "ema_scale") else like(param, part)

    def saved_part(self, param: Tensor) -> Tensor:
        """The weights that a parameter is restored to, in the form that it had when it got its slice."""
        shape, stride = self._form[param]
        buffer = self.buffers[self.saved]
        return buffer.as_strided(shape, stride, buffer.storage_offset() + self.offset[param])

    def is_mostly_unused(self, params: Iterable[Tensor]) -> bool:
        """Whether more than half of the layout, once it is :meth:`extended`, is not of ``params``."""
        used = added = 0
        for param in params:
            if param in self._form:
                form = _form(param)
                numel = aligned_numel(math.prod(form[0]), self.kind.dtype, self.quantized)
                used += numel
                added += numel if form != self._form[param] else 0
        return self.numel + added > 2 * used

    def has(self, name: str, param: Tensor, like: FlatState) -> bool:
        """Whether a parameter's slice of a buffer was there before, where ``like`` has it: not filled anew, that is."""
        return name in self.buffers and param in self.offset and self.offset[param] == like.offset[param]

    def shares(self, name: str, param: Tensor, value: Tensor) -> bool:
        """Whether ``value`` lies in the buffer of ``name``, but not where the parameter's slice is."""
        buffer = self.buffers.get(name)
        if buffer is None or not address(value) or value.device != buffer.device:
            return False
        begin = address(buffer)
        if not begin <= address(value) < begin + buffer.nbytes:
            return False
        return param not in self.offset or address(value) != address(self.part(name, param))

    def fill_of(self, name: str) -> float:
        """What a new buffer holds."""
        return FILL[name] if self.buffers[name].dtype.is_floating_point else 0

    def fill(self, name: str, param: Tensor, value: Tensor | float) -> None:
        """Writes a value into a parameter's slice, unless it is that slice."""
        part = self.part(name, param)
        if isinstance(value, Tensor):
            value = local(value)
            if address(value) == address(part) and (value.dtype, value.stride()) == (part.dtype, part.stride()):
                return
            part.copy_(value)
        else:
            part.fill_(value)
