"""Tells whether ``state`` still holds the tensors that were put there: in C where that was built, else in Python.

NOTE [identity, never equality]
A tensor that a user put into ``state`` counts, whatever its size and value: the one that it replaces lies in a flat
buffer, which a kernel would go on with. Identities are compared as addresses of objects. They are no proof once an
object has died and another one got its address, so what dies here says so. And a tensor may be given other memory, or
be transposed over its own, and stay the same object: so each has to lie where and as it did.

NOTE [one look at places a step]
What torch knows of a tensor is spread over memory, and to read where each one lies takes several times as long as to
compare objects. So only the first pass of a step asks for places. Between the two passes a tensor that stays the same
object may be transposed over its memory, or be given other memory while somebody keeps the old one: the second pass
writes to where it lay, which is there still, and the next step takes what it finds. Old memory that nobody keeps is
gone, and says so.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from .. import _library
from .shards import PLAIN, address


class Watch:
    """Tells whether ``state`` still holds the tensors that were put there: NOTE [identity, never equality].

    Args:
        state: the optimizer's.
        names: those of an entry that count, or None for all.
        parts: what dies with the storages of those tensors.
    """

    def __init__(self, state: Any, names: tuple[str, ...] | None, parts: Iterable[TensorWeakRef]) -> None:
        self._lost: list[Any] = []
        values = list(_values(state, names))
        things = [*values, *(part() for part in parts)]
        self._references = [weakref.ref(thing, self._lost.append) for thing in things if isinstance(thing, Tensor)]
        # Kept, lest another object get the address of one of them. Values are not: they may go, and say so.
        self._keys = list(state), [name for entry in state.values() if isinstance(entry, dict) for name in entry]
        in_c = names is None and _HOLDS is not None and all(map(_lies_in_words, filter(_is_somewhere, values)))
        self._look = _LookInC(state) if in_c else _Look(state, names)

    def holds(self, state: Any, in_place: bool = True) -> bool:
        """Whether ``state`` holds what it did; where ``in_place``, each tensor where and as it lay, too."""
        return not self._lost and self._look.holds(state, in_place)


def _values(state: Any, names: tuple[str, ...] | None) -> Iterator[Any]:
    """What counts in ``state``. An entry that is no dict has nothing that does."""
    for entry in state.values():
        if isinstance(entry, dict):
            yield from map(entry.get, entry if names is None else names)


def _is_somewhere(value: Any) -> bool:
    """Whether it is a tensor that has an address."""
    return type(value) in PLAIN and value.layout is torch.strided and not value.is_meta


class _Look:
    """The comparison in Python."""

    def __init__(self, state: Any, names: tuple[str, ...] | None) -> None:
        self._names = names
        self._objects = self._find_objects(state)
        self._places = self._find_places(state)

    def holds(self, state: Any, in_place: bool) -> bool:
        """As :meth:`Watch.holds`."""
        if self._objects != self._find_objects(state):
            return False
        return not in_place or self._places == self._find_places(state)

    def _find_objects(self, state: Any) -> array[int]:
        return array("Q", self._addresses(state))

    def _addresses(self, state: Any) -> Iterator[int]:
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

    def _find_places(self, state: Any) -> list[Any]:
        return list(map(_place, _values(state, self._names)))


def _place(value: Any) -> Any:
    """Where a tensor is and how it lies; None for what is none."""
    return (address(value), value.shape, value.stride()) if _is_somewhere(value) else None


# ---- In C ----------------------------------------------------------------------------------------------------------

# NOTE [a place is words of an object]
# To ask torch for a tensor's address, shape and strides takes five calls, and the address is in another object, that of
# the storage. In the tensor's own object the link to its storage and up to five sizes and strides follow each other;
# what else is between them stays as it is. So in C these words are read as they are. They tell as much: a tensor of
# ``state`` fills its storage, so over the same storage with the same strides it begins where it began, and a storage
# that lets go of its memory says so (``parts``).
_DIMENSIONS = 5


class _Words(NamedTuple):
    """Where in the object of a tensor they are, in bytes, and how many."""

    offset: int
    count: int


def _find_words() -> _Words | None:
    """None where they were not found: then each tensor is asked, in Python."""
    tensor = torch.empty(2, 3, 5, 7, 11, device="cpu")
    lies = [*tensor.shape, *tensor.stride()]
    words = (ctypes.c_uint64 * 20).from_address(tensor._cdata)  # an object has more; csrc/words.h, kFactors
    storage = tensor.untyped_storage()._cdata
    first = next((i for i, word in enumerate(words) if word == storage), len(words))
    last = next((i for i in range(first, len(words)) if words[i : i + len(lies)] == lies), None)
    return None if last is None else _Words(first * 8, last + len(lies) - first)


_WORDS = _find_words()


def _lies_in_words(tensor: Tensor) -> bool:
    return tensor.dim() <= _DIMENSIONS


class _KnownState(ctypes.Structure):
    """csrc/same_state.cpp, FsamKnownState."""

    _fields_ = (
        ("entries", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("contents", ctypes.c_void_p),
        ("tensors", ctypes.c_int64),
        ("words", ctypes.c_int64),
        ("objects", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
    )


class _LookInC:
    """The same comparison in C: a tenth of the time."""

    def __init__(self, state: Any) -> None:
        contents = [list(chain(*entry.items())) if isinstance(entry, dict) else [] for entry in state.values()]
        things = list(chain(*contents))
        tensors = array("Q", (thing._cdata + _WORDS.offset for thing in things if _is_somewhere(thing)))
        self._arrays = {
            "keys": array("Q", map(id, state)),
            "starts": array("q", accumulate(map(len, contents), initial=0)),
            "contents": array("Q", map(id, things)),
            "objects": tensors,
            "places": array("Q", tensors),  # of as many; filled now
        }
        at = {name: numbers.buffer_info()[0] for name, numbers in self._arrays.items()}
        self._known = _KnownState(entries=len(state), tensors=len(tensors), words=_WORDS.count, **at)
        _NOTE(self._known)

    def holds(self, state: Any, in_place: bool) -> bool:
        """As :meth:`Watch.holds`."""
        return bool(_HOLDS(state, self._known, in_place))


def _functions() -> tuple[Any, Any]:
    """(what notes places, what compares), or None where they were not built or could not look at tensors."""
    if _library.CPU_REASON is not None or _WORDS is None:
        return None, None
    library, known = ctypes.PyDLL(str(_library.path_of("_C"))), ctypes.POINTER(_KnownState)
    note, holds = getattr(library, "fsam_note_state", None), getattr(library, "fsam_holds_state", None)
    if note is None or holds is None:
        return None, None
    note.argtypes, note.restype = (known,), None
    holds.argtypes, holds.restype = (ctypes.py_object, known, ctypes.c_int), ctypes.c_int
    return note, holds


_NOTE, _HOLDS = _functions()
