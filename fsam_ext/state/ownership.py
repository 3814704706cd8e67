"""Tensors in ``state`` own their memory, though it is part of a flat buffer; and what tells that one was replaced.

NOTE [state owns its memory]
Tools take state for plain tensors: they move it to the CPU for a while, save one parameter's alone, put other tensors
in its place. So nothing here keeps a flat buffer alive but the tensors in ``state`` that lie in it. Each has a storage
of its own over its part of the buffer (DLPack makes it, and holds the buffer until the storage goes): a file has its
own bytes, and when the last of them is let go, or given other memory (``tensor.data = ...``), the buffer is freed. A
FlatState knows its buffers by weak references.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.dlpack import from_dlpack, to_dlpack
from torch.utils.weak import TensorWeakRef

from .. import _library
from .shards import PLAIN, address


def owning_part(
    flat: Tensor, begin: int, numel: int, shape: Sequence[int], stride: Sequence[int]
) -> tuple[Tensor, TensorWeakRef | None]:
    """(a tensor of its own over elements of a flat buffer, what dies with its storage).

    The buffer lives as long as that storage does. A fake tensor has no storage to own: its part is a view.
    """
    if isinstance(flat, FakeTensor):
        return flat.as_strided(shape, stride, begin), None
    with torch.inference_mode(False):  # a view made there does not keep what it is a view of
        part = flat[begin : begin + numel]
        storage = from_dlpack(to_dlpack(part)).untyped_storage()
        return torch.empty(0, dtype=flat.dtype, device=flat.device).set_(storage, 0, shape, stride), TensorWeakRef(part)


class Watch:
    """Tells whether ``state`` still holds the tensors that were put there: NOTE [identity, never equality].

    Args:
        state: the optimizer's.
        names: those of an entry that count, or None for all.
        parts: what dies with the storages of those tensors.
    """

    # NOTE [identity, never equality]
    # A tensor that a user put into ``state`` counts, whatever its size and value: the one that it replaces lies in a
    # flat buffer, which a kernel would go on with. Identities are compared as addresses of objects. They are no proof
    # once an object has died and another one got its address, so what dies here says so. And a tensor may be given
    # other memory, or be transposed over its own, and stay the same object: so each has to lie where and as it did.

    # NOTE [one look at places a step]
    # What torch knows of a tensor is spread over memory, and to read where each one lies takes several times as long as
    # to compare objects. So only the first pass of a step asks for places. Between the two passes a tensor that stays
    # the same object may be transposed over its memory, or be given other memory while somebody keeps the old one: the
    # second pass writes to where it lay, which is there still, and the next step takes what it finds. Old memory that
    # nobody keeps is gone, and says so.

    def __init__(self, state: Any, names: tuple[str, ...] | None, parts: Iterable[TensorWeakRef]) -> None:
        self._names = names
        self._lost: list[Any] = []
        self._params = list(state)
        entries = [entry for entry in state.values() if isinstance(entry, dict)]
        self._keys = [name for entry in entries for name in entry]
        values = list(self._values(state))
        things = [*values, *(part() for part in parts)]
        self._references = [weakref.ref(thing, self._lost.append) for thing in things if isinstance(thing, Tensor)]
        self._objects = array("Q", self._find_objects(state))
        self._in_c = names is None and _SAME_STATE is not None
        if self._in_c:
            self._tensors = array("Q", (id(value) + _HANDLE for value in values if _is_somewhere(value)))
            self._places = array("Q", self._tensors)
            where = (*self._tensors.buffer_info(), self._places.buffer_info()[0])
            _NOTE_PLACES(*where)
            self._arguments = (*self._objects.buffer_info(), *where)
        else:
            self._places = array("Q", map(_place, values))

    def holds(self, state: Any, in_place: bool = True) -> bool:
        """Whether ``state`` holds what it did; where ``in_place``, each tensor where and as it lay, too."""
        if self._lost:
            return False
        if self._in_c:
            return bool(_SAME_STATE(state, *self._arguments, in_place))
        if self._objects != array("Q", self._find_objects(state)):
            return False
        return not in_place or self._places == array("Q", map(_place, self._values(state)))

    def _find_objects(self, state: Any) -> Iterator[int]:
        """The addresses of each key and of names and values of its entry: csrc/same_state.cpp."""
        for key, entry in state.items():
            yield id(key)
            if not isinstance(entry, dict):
                continue
            if self._names is not None:
                yield from map(id, map(entry.get, self._names))
                continue
            for name, value in entry.items():
                yield id(name)
                yield id(value)

    def _values(self, state: Any) -> Iterator[Any]:
        """What counts in ``state``."""
        for entry in state.values():
            if isinstance(entry, dict):
                yield from map(entry.get, entry if self._names is None else self._names)


def _is_somewhere(value: Any) -> bool:
    """Whether it is a tensor that has an address."""
    return type(value) in PLAIN and value.layout is torch.strided and not value.is_meta


def _place(value: Any) -> int:
    """Where a tensor is and how it lies, as a number; 0 for what is none."""
    if not _is_somewhere(value):
        return 0
    return hash((address(value), value.shape, value.stride())) & (2**64 - 1) | 1


def _handle_offset() -> int | None:
    """Where in a tensor's Python object the at::Tensor is, in bytes; None where it is not where it has been."""
    tensor = torch.empty(0, device="cpu")
    words = (ctypes.c_void_p.from_address(id(tensor) + offset).value for offset in _OFFSETS)
    return next((offset for offset, word in zip(_OFFSETS, words) if word == getattr(tensor, "_cdata", None)), None)


# After the head of the object; or after that and a flag.
_OFFSETS = (object.__basicsize__, object.__basicsize__ + 8)


def _in_c() -> tuple[Any, Any]:
    """The same comparison in C, where it was built: a tenth of the time; and what notes the places for it."""
    if _library.CPU_REASON is not None or _HANDLE is None:
        return None, None
    library = ctypes.PyDLL(str(_library.LIBRARY_DIR / "_C.abi3.so"))
    same, note = getattr(library, "fsam_same_state", None), getattr(library, "fsam_note_places", None)
    if same is None or note is None:
        return None, None
    numbers = (ctypes.c_void_p, ctypes.c_int64)
    same.argtypes = (ctypes.py_object, *numbers, *numbers, ctypes.c_void_p, ctypes.c_int)
    same.restype = ctypes.c_int
    note.argtypes, note.restype = (*numbers, ctypes.c_void_p), None
    return same, note


_HANDLE = _handle_offset()
_SAME_STATE, _NOTE_PLACES = _in_c()
