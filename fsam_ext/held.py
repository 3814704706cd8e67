"""Looks whether parameters have gradients and are what they were: from C++, which holds on to them, or from Python."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from itertools import repeat
from operator import is_

import torch
from torch import Tensor

from . import _library
from .distributed import PLAIN, local

# The last torch whose headers were read: csrc/held.h, NOTE [symbols outside the stable ABI].
NEWEST_TORCH = (2, 14)

# A descriptor called by map() costs a third of an attribute in a loop.
_GRAD = Tensor.grad.__get__
_DTYPE = Tensor.dtype.__get__
_DATA_PTR = Tensor.data_ptr


def current_grads(params: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients that ``params`` have now."""
    return list(map(_GRAD, params))


class Listed:
    """Looks from Python: at any tensors, with any torch."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self._parts = list(map(local, params))
        self._addresses = self._forms = None
        self._have_their_forms()
        self._places = self._find()

    def _have_their_forms(self) -> bool:
        """Whether dtype, device, shape and strides are what they were. Asked where memory has moved, which is cheap."""
        try:
            addresses = [*map(_DATA_PTR, self._parts)], [*map(_DTYPE, self._parts)]
        except (TypeError, RuntimeError):  # a subclass that has no memory of its own: asked each time
            addresses = None
        if addresses is not None and addresses == self._addresses:
            return True
        forms = [(part.dtype, part.device, part.shape, part.stride()) for part in self._parts]
        self._forms = self._forms or forms
        if forms != self._forms:
            return False
        self._addresses = addresses
        return True

    def _find(self) -> tuple[list[int], list[int]] | None:
        try:
            return list(map(_DATA_PTR, self._params)), list(map(_DATA_PTR, map(_GRAD, self._params)))
        except (TypeError, RuntimeError):  # a gradient is missing, or has no memory of its own: a sparse one
            return None

    def have_grads(self) -> bool:
        """Whether each parameter has a gradient, and the form that it had when this was made."""
        return not any(map(is_, map(_GRAD, self._params), repeat(None))) and self._have_their_forms()

    def in_place(self) -> bool:
        """Whether each parameter and its gradient lie where they did when this was made."""
        return self._places is not None and self._places == self._find() and self._have_their_forms()

    def written(self) -> None:
        """Tells autograd that the parameters were written to."""
        torch.autograd.graph.increment_version(self._params)


class Held:
    """The same looks from C++, which holds the parameters under a tensor that stands for them.

    csrc/held.h, NOTE [held parameters], says how, and how ops take such parameters.
    """

    def __init__(self, params: Sequence[Tensor], key: Tensor) -> None:
        namespace = torch.ops.fsam_ext
        namespace.hold(params, key)
        weakref.finalize(self, namespace.release.default, key.data_ptr()).atexit = False
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
    return type(grad) in PLAIN and not grad.is_neg() and not grad._is_zerotensor()


def look_at(params: Sequence[Tensor], key: Tensor) -> Held | Listed:
    """The fastest look at ``params`` that there is; ``key``: an int64 CPU tensor of the caller's own, not empty."""
    plain = all(
        type(param) in PLAIN and not param.is_inference() and (param.grad is None or _is_plain(param.grad))
        for param in params
    )
    return Held(params, key) if _REASON is None and plain and key.numel() else Listed(params)
