"""Optimizer state as flat buffers: one contiguous tensor per state, dtype and device, instead of one per parameter.

The kernels then take one pointer and an offset per row, a call boxes two lists instead of six, and ``state[p][...]``
are views that checkpoints and users read as ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import _library
from .distributed import Sharding, like, local
from .ops import compute_dtype

# Each slice starts on a line of 128 bytes: what a GPU fetches at once, and two lines of a CPU.
ALIGNMENT_BYTES = 128

# What a new buffer holds. NaN marks an element that has seen no gradient: see NOTE [an unset state is NaN] in
# csrc/formulas.h. The paper's form of the EMA starts at zero instead.
FILL = {
    "ema": float("nan"),
    "momentum_buffer": float("nan"),
    "exp_avg": 0.0,
    "exp_avg_sq": 0.0,
    "step": 0.0,
    "backup": 0.0,
}


def aligned_numel(numel: int, dtype: torch.dtype) -> int:
    """``numel`` rounded up so that the next slice is aligned in buffers of ``dtype`` and of its state's dtype."""
    unit = ALIGNMENT_BYTES // dtype.itemsize
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
    """The layout of the parameters of one dtype on one device, and the flat buffers that follow it.

    Of sharded parameters, which have ``sharding`` in common, it holds this rank's shards.

    ``generation`` changes whenever a buffer may have moved, so that views of it have to be taken anew.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, sharding: Sharding | None = None) -> None:
        self.dtype = dtype
        self.device = device
        self.sharding = sharding
        self.offset: dict[Tensor, int] = {}
        self.index: dict[Tensor, int] = {}
        self.numel = 0
        self.buffers: dict[str, Tensor] = {}
        self.partials = torch.empty(0, dtype=compute_dtype(dtype), device=device)
        self.generation = 0

    def add(self, params: Iterable[Tensor]) -> None:
        """Gives each parameter that has none a slice at the end of the layout."""
        for param in params:
            if param not in self.offset:
                self.index[param] = len(self.index)
                self.offset[param] = self.numel
                self.numel += aligned_numel(local(param).numel(), self.dtype)

    def buffer(self, name: str) -> Tensor:
        """The flat buffer of a state, made or grown to the present layout where needed."""
        size = len(self.index) if name == "step" else self.numel
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            dtype = {"step": torch.float32, "backup": self.dtype}.get(name, compute_dtype(self.dtype))
            grown = empty_flat(size, dtype, self.device).fill_(FILL[name])
            if buffer is not None:
                grown[: buffer.numel()].copy_(buffer)
                self.generation += 1
            self.buffers[name] = buffer = grown
        return buffer

    def view(self, name: str, param: Tensor) -> Tensor:
        """The part of a flat buffer that belongs to a parameter, or to this rank's shard of it."""
        if name == "step":
            return self.buffers[name][self.index[param]]
        return memory_view(self.buffers[name], self.offset[param], local(param))

    def publish(
        self,
        name: str,
        params: Iterable[Tensor],
        state: dict[Tensor, dict[str, Any]],
        start: float | None = None,
    ) -> None:
        """Makes ``state[p][name]`` a view of the flat buffer, taking over the value that it had.

        Where it had none it gets ``start``, or what the buffer was filled with.
        """
        self.buffer(name)
        for param in params:
            view = self.view(name, param)
            value = state[param].get(name)
            if isinstance(value, Tensor):
                value = local(value)
                if value.data_ptr() == view.data_ptr() and value.dtype == view.dtype:
                    continue
                view.copy_(value)
            elif value is not None:  # torch.optim once kept `step` as a number
                view.fill_(value)
            elif start is not None:
                view.fill_(start)
            state[param][name] = view if name == "step" else like(param, view)
