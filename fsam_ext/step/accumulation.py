"""Gradient accumulation: both passes have to see the same micro-batches."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ..state.flatten import REGISTRY
from ..state.shards import is_dtensor

_VERSION = Tensor._version.__get__


def evaluate(closure: Callable[..., Any], batches: list[Any] | None) -> Any:
    """Calls ``closure`` for each micro-batch and returns the sum of what it returned; or once, where there are none."""
    if batches is None:
        return closure()
    losses = [closure(batch) for batch in batches]
    return sum(losses[1:], losses[0]) if losses[0] is not None else None


def as_list(batches: Iterable[Any]) -> list[Any]:
    """The micro-batches, kept, because both passes go through them.

    Raises:
        ValueError: there are none.
    """
    kept = list(batches)
    if not kept:
        raise ValueError("accumulate has no micro-batches; pass at least one, or leave it out")
    return kept


def mark(param: Tensor) -> tuple[int, int] | None:
    """What changes wherever a backward pass adds to a parameter's gradient."""
    grad = param.grad
    return None if grad is None else (id(grad), -1 if grad.is_inference() else _VERSION(grad))


class BackwardCount:
    """Counts backward passes, to notice a second pass that replays another number of micro-batches than the first, and
    gradients that nobody has used.

    One parameter stands for all. Autograd does not reach sharded ones as leaves, so none of those is watched: torch
    cannot convert a DTensor that something refers to.

    The parameter does not know the count but weakly, because Python's collector does not see through a parameter's
    hooks; the count knows the parameter's identity only, because torch swaps no tensor that something refers to weakly.
    """

    def __init__(self) -> None:
        self._watched: int | None = None
        self._stop_watching: Callable[[], Any] = lambda: None
        self._count = 0
        self._ascent: int | None = None
        self._warned = False
        self._used: tuple[int, tuple[int, int] | None] | None = None
        self._given_up = False

    def are_new(self, params: Iterable[Tensor]) -> bool:
        """Whether gradients have come since the last pass of a step used, or cleared, those that were there then."""
        if self._count > 0 or self._given_up:
            return self._count > 0
        if self._used is None:  # before the first step; flattened gradients are there from the start
            return any(param.grad is not None and REGISTRY.get(param) is None for param in params)
        number, before = self._used
        param = next((param for param in params if id(param) == number), None)
        return param is not None and mark(param) not in (None, before)

    def used(self, param: Tensor) -> None:
        """A pass has read the gradients, of which this parameter's stands for all."""
        self._used = id(param), mark(param)
        self._given_up = False

    def second_is_missing(self, groups: Iterable[dict[str, Any]]) -> bool:
        """Whether backward passes made the first gradient, and none a second one."""
        if not self._ascent or self._count > 0:
            return False
        return not self.are_new(param for group in groups for param in group["params"])

    def ascended(self, param: Tensor) -> None:
        """The first pass is over; from now on the second one's backward passes count."""
        watched = self._watched == id(param)
        self._ascent = self._count if watched else None  # None: it was not watched yet
        if not watched and param.is_leaf and param.requires_grad and not is_dtensor(param):
            self._watch(param)
        self._count = 0
        self.used(param)

    def _watch(self, param: Tensor) -> None:
        this = weakref.ref(self)

        def count(param: Tensor) -> None:
            self = this()
            if self is not None and self._watched == id(param):
                self._count += 1

        self._stop_watching()
        self._watched = id(param)
        hook = param.register_post_accumulate_grad_hook(count)
        self._stop_watching = weakref.finalize(self, hook.remove)
        self._stop_watching.atexit = False

    def finished(self) -> str | None:
        """The second pass is over: what there is to warn of, once, where it made another number of backward passes."""
        first, second = self._ascent, self._count
        self.forget()
        if not (first and second and second != first) or self._warned:
            return None
        self._warned = True
        return (
            f"the first pass made {first} backward passes and the second {second}: with accumulated gradients the "
            "second pass has to replay the same micro-batches, or the two gradients are of different losses; "
            "step(closure, accumulate=batches) does it"
        )

    def cleared(self, params: Iterable[Tensor]) -> None:
        """Gradients were thrown away, and the backward passes that made them do not count."""
        self._count = 0
        self._given_up = False
        number = None if self._used is None else self._used[0]
        param = next((param for param in params if id(param) == number), None)
        self._used = None if param is None else (number, mark(param))

    def forget(self) -> None:
        """The next backward pass is the first of a step."""
        self._ascent, self._count = None, 0

    def given_up(self) -> None:
        """A step ends without an update: its gradients are of no use, and nobody's loss."""
        self.forget()
        self._given_up = True
