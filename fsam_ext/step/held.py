"""Looks whether parameters have gradients and are what they were: from C++, which holds on to them, or from Python."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..state.shards import PLAIN, local

# The last torch whose headers were read: csrc/held.h, NOTE [symbols outside the stable ABI].
NEWEST_TORCH = (2, 15)

# NOTE [who is held]
# C++ that holds a parameter is one reference more, which torch.utils.swap_tensors refuses. So few parameters, whose
# lists cost less than a kernel's launch, are never held, and none are where modules convert by swapping. What holding
# wins where there are many: docs/design.md, Ops. To delete it: this file's Held and the last line of look_at,
# csrc/held.*, the ops of schema.cpp that name it, and takes_held.
FEWEST = 33

# A descriptor called by map() costs a third of an attribute in a loop.
_GRAD = Tensor.grad.__get__
_DTYPE, _DEVICE, _SHAPE = Tensor.dtype.__get__, Tensor.device.__get__, Tensor.shape.__get__
_STRIDE = Tensor.stride
_DATA_PTR = Tensor.data_ptr

_PLAIN = frozenset(PLAIN)


def _addresses(tensors: Sequence[Tensor]) -> list[int] | None:
    """Where tensors lie; None where one has no memory of its own."""
    if not _PLAIN.issuperset(map(type, tensors)):
        return None
    try:
        return list(map(_DATA_PTR, tensors))
    except RuntimeError:
        return None


def current_grads(params: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients that ``params`` have now."""
    return list(map(_GRAD, params))


class Listed:
    """Looks from Python: at any tensors, with any torch."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self._parts = list(map(local, params))
        self._forms = self._find_forms()
        self._addresses = _addresses(self._parts)
        grads = current_grads(params)
        self._grads = None if any(grad is None for grad in grads) else _addresses(grads)

    def _find_forms(self) -> list[Any]:
        parts = self._parts
        return [*map(_DTYPE, parts), *map(_DEVICE, parts), *map(_SHAPE, parts), *map(_STRIDE, parts)]

    def have_their_forms(self, in_place: bool = False) -> bool:
        """Whether dtype, device, shape and strides are what they were when this was made, and addresses if asked."""
        return self._forms == self._find_forms() and (not in_place or self._addresses == _addresses(self._parts))

    def have_grads(self) -> bool:
        """Whether each parameter has a gradient, and lies where and how it did when this was made."""
        return NoneType not in map(type, map(_GRAD, self._params)) and self.have_their_forms(in_place=True)

    def in_place(self) -> bool:
        """Whether each parameter and its gradient lie where they did when this was made, in the same order."""
        if self._grads is None or not self.have_grads() or self._grads != _addresses(current_grads(self._params)):
            return False
        grads = current_grads(self._params)
        return all(list(map(ask, grads)) == list(map(ask, self._params)) for ask in (_SHAPE, _STRIDE))

    def written(self) -> None:
        """Tells autograd that the parameters were written to."""
        torch.autograd.graph.increment_version(self._params)


class Held:
    """The same looks from C++, which holds the parameters under a tensor that stands for them.

    csrc/held.h, NOTE [held parameters], says how, and how ops take such parameters.
    """

    def __init__(self, params: Sequence[Tensor], key: Tensor) -> None:
        namespace = torch.ops.fsam_ext
        # Before there is anything to release: an interrupt may come between any two lines.
        release = weakref.finalize(self, namespace.release.default, key.data_ptr())
        release.atexit = False
        try:
            namespace.hold(params, key)
        except RuntimeError:  # refused: what is held under this key is another's
            release.detach()
            raise
        self.have_their_forms = partial(namespace.have_their_forms.default, key)
        self.have_grads = partial(namespace.have_grads.default, key)
        self.in_place = partial(namespace.in_place.default, key)
        self.written = partial(namespace.written.default, key)


def unavailable() -> str | None:
    """Why C++ cannot hold parameters with this torch, or None where it can."""
    if _library.CPU_REASON is not None:
        return _library.CPU_REASON
    version = torch.__version__.split(".")
    if (int(version[0]), int(version[1])) > NEWEST_TORCH:
        newest = ".".join(map(str, NEWEST_TORCH))
        return f"torch {torch.__version__} is newer than {newest}, the last one that was checked"
    if not torch.ops.fsam_ext.can_hold():
        return f"torch {torch.__version__} lacks the functions that it needs"
    return None


_REASON = unavailable()


def _is_plain(grad: Tensor) -> bool:
    """Whether a gradient's values are in its memory as they are, with no sign or zeros that are yet to be written."""
    if type(grad) not in PLAIN or grad.is_neg() or grad._is_zerotensor():
        return False
    return grad.layout == torch.strided and (grad.numel() == 0 or grad.data_ptr() != 0)


def swaps() -> bool:
    """Whether modules convert by swapping tensors, which what holds a parameter would stop: NOTE [who is held]."""
    return torch.__future__.get_swap_module_params_on_conversion()


def look_at(params: Sequence[Tensor], key: Tensor) -> Held | Listed:
    """The fastest look at ``params`` that there is; ``key``: an int64 CPU tensor of the caller's own."""
    holds = _REASON is None and len(params) >= FEWEST and key.numel() > 0 and not swaps()
    plain = holds and all(
        type(param) in PLAIN and not param.is_inference() and (param.grad is None or _is_plain(param.grad))
        for param in params
    )
    return Held(params, key) if plain else Listed(params)
