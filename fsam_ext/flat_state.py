"""Optimizer state as flat buffers: one contiguous tensor per state, dtype and device, instead of one per parameter.

The kernels then take one pointer and an offset per row, a call boxes two lists instead of six, and ``state[p][...]``
are views that checkpoints and users read as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import _library
from .capture import check_state_may_be_made
from .distributed import Sharding, like, local
from .ops import QUANTIZED, compute_dtype
from .quantization import count_blocks

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


def empty_flat(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised flat buffer, on huge pages where the system gives them: csrc/cpu/ops.cpp, NOTE [huge pages]."""
    flat = torch.empty(numel, dtype=dtype, device=device)
    if device.type == "cpu" and _library.CPU_REASON is None:
        torch.ops.fsam_ext.advise_huge_pages(flat)
    return flat


class FlatState:
    """The layout of some parameters of one dtype on one device, and the flat buffers that follow it.

    Of sharded parameters, which have ``sharding`` in common, it holds this rank's shards.

    ``generation`` changes whenever a buffer may have moved, so that views of it have to be taken anew.

    Args:
        ema_dtype: what stores the average: float32 (float64 for float64), bfloat16 or int8.
        masters: keep float32 master weights, of which the parameters are the rounded copies.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        ema_dtype: torch.dtype,
        masters: bool,
        sharding: Sharding | None = None,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.sharding = sharding
        self.state_dtype = compute_dtype(dtype)
        self.masters = masters
        self.dtypes = {"step": torch.float32, "backup": dtype, "ema": ema_dtype}
        self.offset: dict[Tensor, int] = {}
        self.index: dict[Tensor, int] = {}
        self._form: dict[Tensor, tuple[Any, ...]] = {}
        self.numel = 0
        self.buffers: dict[str, Tensor] = {}
        self.partials = torch.empty(0, dtype=self.state_dtype, device=device)
        self.generation = 0

    @property
    def quantized(self) -> bool:
        """Whether the average is int8, with a scale for each block."""
        return self.dtypes["ema"] == torch.int8

    @property
    def saved(self) -> str:
        """The buffer that the weights are restored from."""
        return "master" if self.masters else "backup"

    def add(self, params: Iterable[Tensor]) -> None:
        """Gives each parameter that has none, or has another shape or order than its slice, one at the end.

        Raises:
            RuntimeError: a graph is being captured, whose replays would do this again.
        """
        check_state_may_be_made(self.device)
        for param in params:
            part = local(param)
            form = part.shape, part.stride()
            if self._form.get(param) != form:
                self.generation += param in self._form  # views of its old slice are of no use
                self._form[param] = form
                self.index.setdefault(param, len(self.index))
                self.offset[param] = self.numel
                self.numel += aligned_numel(part.numel(), self.dtype, self.quantized)

    def _size(self, name: str) -> int:
        if name == "step":
            return len(self.index)
        return count_blocks(self.numel) if name == "ema_scale" else self.numel

    def buffer(self, name: str) -> Tensor:
        """The flat buffer of a state, made or grown to the present layout where needed."""
        size = self._size(name)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            dtype = self.dtypes.get(name, self.state_dtype)
            fill = FILL[name] if dtype.is_floating_point else 0
            grown = empty_flat(size, dtype, self.device).fill_(fill)
            if buffer is not None:
                grown[: buffer.numel()].copy_(buffer)
                self.generation += 1
            self.buffers[name] = buffer = grown
        return buffer

    def view(self, name: str, param: Tensor) -> Tensor:
        """The part of a flat buffer that belongs to a parameter, or to this rank's shard of it."""
        if name == "step":
            return self.buffers[name][self.index[param]]
        offset = self.offset[param]
        if name == "ema_scale":
            first = offset // QUANTIZED
            return self.buffers[name][first : first + count_blocks(param.numel())]
        return memory_view(self.buffers[name], offset, local(param))

    def saved_view(self, param: Tensor) -> Tensor:
        """The weights that a parameter is restored to, in the form that it had when it got its slice."""
        shape, stride = self._form[param]
        buffer = self.buffers[self.saved]
        return buffer.as_strided(shape, stride, buffer.storage_offset() + self.offset[param])

    def is_mostly_unused(self, params: Iterable[Tensor]) -> bool:
        """Whether less than half of the layout is of ``params``: the others are gone, or have another slice now."""
        used = [math.prod(self._form[param][0]) for param in params if param in self._form]
        return self.numel > 2 * sum(aligned_numel(numel, self.dtype, self.quantized) for numel in used)

    def publish(
        self,
        name: str,
        params: Iterable[Tensor],
        state: dict[Tensor, dict[str, Any]],
        start: Callable[[Tensor], float | Tensor] | None = None,
    ) -> None:
        """Makes ``state[p][name]`` a view of the flat buffer, taking over the value that it had.

        Where it had none it gets ``start(p)``, or what the buffer was filled with.
        """
        filled = name not in self.buffers
        self.buffer(name)
        for param in params:
            view = self.view(name, param)
            value = state[param].get(name)
            if value is None and start is not None:
                value = start(param)
            if isinstance(value, Tensor):
                value = local(value)
                if value.data_ptr() == view.data_ptr() and (value.dtype, value.stride()) == (view.dtype, view.stride()):
                    continue
                view.copy_(value)
            elif value is not None:  # torch.optim once kept `step` as a number
                view.fill_(value)
            elif not filled:  # the slice may hold what a state had that its owner has removed since
                view.fill_(FILL[name] if view.dtype.is_floating_point else 0)
            state[param][name] = view if name in ("step", "ema_scale") else like(param, view)
