"""Optimizer state as flat buffers: one contiguous tensor per state, dtype and device, instead of one per parameter.

The kernels then take one pointer and an offset per row, a call boxes two lists instead of six, and ``state[p][...]``
are tensors over parts of them that checkpoints and users read as ever: ownership.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import TensorWeakRef

from .. import _library
from ..backends.ops import QUANTIZED, compute_dtype
from .keys import EMA, EMA_SCALE, MASTER, REUSE
from .ownership import owning_part
from .quantization import count_blocks
from .shards import Sharding, address, like, local

# Each slice starts on a line of 128 bytes: what a GPU fetches at once, and two lines of a CPU.
ALIGNMENT_BYTES = 128

# What a new buffer holds. NaN marks an element that has seen no gradient: see NOTE [an unset state is NaN] in
# csrc/formulas.h. The paper's form of the EMA starts at zero instead.
FILL = {
    EMA: float("nan"),
    EMA_SCALE: float("nan"),
    MASTER: 0.0,
    REUSE: 0.0,
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
        perturbed: take part in ascents.
        reuse_dtype: what stores the reused part of gradients; None where nothing is reused.
        in_order: slices follow each other as all parameters of the groups do: NOTE [which bits an element draws].
    """

    dtype: torch.dtype
    device: torch.device
    ema_dtype: torch.dtype
    masters: bool
    perturbed: bool = True
    reuse_dtype: torch.dtype | None = None
    sharding: Sharding | None = None
    in_order: bool = False


# NOTE [layouts are replaced, not changed]
# An interrupt may come between any two lines. So nothing that says where state lies is edited in place: a layout that
# grows is a new one, made aside and swapped in by one assignment (step/layout.py), and what was made from the old one
# goes on describing the old buffers. Values move by copying, from what ``state`` holds to where it will lie: cut short,
# it is done again from the same values.

# NOTE [which bits an element draws]
# Stochastic rounding draws by an element's position in the flat state. A resumed run has to draw what the uninterrupted
# one does, whatever the order in which parameters got their first gradients. So where it is asked for, slices are laid
# out for all parameters of the groups, in their order, whether they have a gradient yet or not.


def _form(param: Tensor) -> tuple[Any, ...]:
    """What a parameter's slice was laid out for."""
    part = local(param)
    return part.shape, part.stride()


class FlatState:
    """The layout of some parameters' state, and the flat buffers that follow it.

    NOTE [layouts are replaced, not changed].

    Attributes:
        device: where the buffers are.
        masters: whether the weights are kept in float32.
        quantized: whether the average is int8, with a scale for each block.
        offset: parameter -> position of its slice, in elements.
        index: parameter -> its number, by which its step is counted.
        parts: (name of a state, parameter) -> what dies with the tensor in ``state``.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.device = kind.device
        self.state_dtype = compute_dtype(kind.dtype)
        self.masters = kind.masters
        self.quantized = kind.ema_dtype == torch.int8
        self.offset: dict[Tensor, int] = {}
        self.index: dict[Tensor, int] = {}
        self.parts: dict[tuple[str, Tensor], TensorWeakRef] = {}
        self._form: dict[Tensor, tuple[Any, ...]] = {}
        self.numel = 0
        self._buffers: dict[str, TensorWeakRef] = {}
        # What keeps buffers alive that no tensor in ``state`` does (yet).
        self._owned: list[Tensor] = []

    def buffer(self, name: str) -> Tensor:
        """A flat buffer, which lives as long as ``state``."""
        buffer = self._buffers[name]()
        assert buffer is not None  # step/layout.py has looked
        return buffer

    def find(self, name: str) -> Tensor | None:
        """The same, or None where there is none, or none any more."""
        reference = self._buffers.get(name)
        return None if reference is None else reference()

    @property
    def names(self) -> list[str]:
        """The buffers that there are."""
        return [name for name in self._buffers if self.find(name) is not None]

    def saved(self) -> Tensor:
        """The buffer that the weights are restored from."""
        return self.buffer(MASTER if self.masters else "backup")

    def extended(self, params: Iterable[Tensor], names: Iterable[str]) -> FlatState:
        """This layout with a slice for each of ``params`` and a buffer for each of ``names``; itself where it has them.

        A parameter of another shape or order than its slice gets one at the end. A buffer that has to grow is a new one
        without values: those are in ``state``. One that nobody asks for is left behind, for nothing would own it.
        """
        names = list(dict.fromkeys(names))
        changed = {}
        for param in params:
            form = _form(param)
            if self._form.get(param) != form:
                changed[param] = form
        if not changed and all(self.find(name) is not None for name in names):
            return self
        new = copy.copy(self)
        new.offset, new.index, new._form = dict(self.offset), dict(self.index), {**self._form, **changed}
        for param, (shape, _) in changed.items():
            new.index.setdefault(param, len(new.index))
            new.offset[param] = new.numel
            new.numel += self._numel_of(shape)
        new._owned = [new._grown(name) for name in names]
        new._buffers = dict(zip(names, map(TensorWeakRef, new._owned)))
        new.parts = dict(self.parts)
        return new

    def _numel_of(self, shape: Sequence[int]) -> int:
        """The elements of a slice."""
        return aligned_numel(math.prod(shape), self.kind.dtype, self.quantized)

    def _grown(self, name: str) -> Tensor:
        """The buffer of a state, or a new one where it is too small or not there."""
        size = len(self.index) if name == "step" else self.numel
        size = count_blocks(size) if name == EMA_SCALE else size
        buffer = self.find(name)
        if buffer is not None and buffer.numel() >= size:
            return buffer
        dtypes = {
            "step": torch.float32,
            "backup": self.kind.dtype,
            EMA: self.kind.ema_dtype,
            REUSE: self.kind.reuse_dtype,
        }
        dtype = dtypes.get(name, self.state_dtype)
        return filled_flat(size, dtype, self.device, _fill_of(name, dtype))

    def release(self) -> None:
        """Leaves the buffers to the tensors in ``state``, the backup to the first of them, if there are any."""
        buffers = {name: self.buffer(name) for name in self.names}
        backup = buffers.pop("backup", None)
        owners = [buffer for buffer in buffers.values() if buffer.numel() and not isinstance(buffer, FakeTensor)]
        for buffer in owners:
            buffer.fsam_backup = backup if buffer is owners[0] else None
        self._owned = [buffer for buffer in buffers.values() if isinstance(buffer, FakeTensor)]
        if backup is not None and not owners:
            self._owned.append(backup)

    def part(self, name: str, param: Tensor) -> Tensor:
        """The part of a flat buffer that belongs to a parameter, or to this rank's shard of it."""
        begin, numel, like = self._place(name, param)
        buffer = self.buffer(name)
        return buffer[begin : begin + numel] if like is None else memory_view(buffer, begin, like)

    def _place(self, name: str, param: Tensor) -> tuple[int, int, Tensor | None]:
        """(where a parameter's part begins, its elements, what has its shape and strides, or None)."""
        if name == "step":
            return self.index[param], 1, None
        offset = self.offset[param]
        if name == EMA_SCALE:
            return offset // QUANTIZED, count_blocks(param.numel()), None
        part = local(param)
        return offset, part.numel(), part

    def entry(self, name: str, param: Tensor) -> Tensor:
        """A tensor for ``state`` over the same memory: a DTensor where the parameter is one."""
        begin, numel, form = self._place(name, param)
        shape = () if name == "step" else (numel,)
        place = (shape, (1,) * len(shape)) if form is None else (form.shape, form.stride())
        part, reference = owning_part(self.buffer(name), begin, numel, *place)
        if reference is not None:
            self.parts[name, param] = reference
        return part if form is None else like(param, part)

    def saved_part(self, param: Tensor, saved: Tensor) -> Tensor:
        """The weights that a parameter is restored to, in the form that it had when it got its slice."""
        shape, stride = self._form[param]
        return saved.as_strided(shape, stride, saved.storage_offset() + self.offset[param])

    def is_mostly_unused(self, params: Iterable[Tensor]) -> bool:
        """Whether more than half of the layout, once it is :meth:`extended`, is not of ``params``."""
        used = added = 0
        for param in params:
            if param in self._form:
                form = _form(param)
                numel = self._numel_of(form[0])
                used += numel
                added += numel if form != self._form[param] else 0
        return self.numel + added > 2 * used

    def follows(self, params: Iterable[Tensor]) -> bool:
        """Whether the slices are just those of ``params``, in their order: NOTE [which bits an element draws]."""
        return list(self.offset) == list(params) and all(self._form[param] == _form(param) for param in params)

    def is_taken(self, param: Tensor, entry: dict[str, Any]) -> bool:
        """Whether some of a parameter's entry lies elsewhere in a buffer, or a slice of it is someone else's now."""
        for name in self.names:
            value = entry.get(name)
            if isinstance(value, Tensor) and self._lies_elsewhere(name, param, local(value)):
                return True
            part = self.parts.get((name, param))
            if part is not None and part() is not None and not self.holds(name, param, value):
                return True
        return False

    def _lies_elsewhere(self, name: str, param: Tensor, value: Tensor) -> bool:
        """Whether ``value`` lies in the buffer of ``name``, but not where the parameter's slice is."""
        buffer = self.find(name)
        if buffer is None or not address(value) or value.device != buffer.device:
            return False
        begin = address(buffer)
        if not begin <= address(value) < begin + buffer.nbytes:
            return False
        return param not in self.offset or address(value) != address(self.part(name, param))

    def holds(self, name: str, param: Tensor, value: Any) -> bool:
        """Whether ``value`` is a tensor over just the parameter's slice, in the parameter's form."""
        form = self._place(name, param)[2]
        return self.begins(name, param, value) and (form is None or local(value).stride() == form.stride())

    def begins(self, name: str, param: Tensor, value: Any) -> bool:
        """Whether ``value`` is a tensor that begins where the parameter's slice does."""
        buffer = self.find(name)
        if buffer is None or not isinstance(value, Tensor):
            return False
        value, begin = local(value), self._place(name, param)[0]
        there = address(value) == address(buffer) + begin * buffer.itemsize and value.dtype == buffer.dtype
        return there and address(value) != 0

    def fill(self, name: str, param: Tensor, value: Tensor | float | None) -> None:
        """Writes a value into a parameter's slice; None: what it has without one."""
        part = self.part(name, param)
        if isinstance(value, Tensor):
            part.copy_(local(value).reshape(part.shape))
        else:
            part.fill_(_fill_of(name, part.dtype) if value is None else value)


def _fill_of(name: str, dtype: torch.dtype) -> float:
    """What a new buffer holds."""
    return FILL[name] if dtype.is_floating_point else 0
