"""Gradient accumulation: both passes have to see the same micro-batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


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


class BackwardCount:
    """Counts backward passes, to notice a second pass that replays another number of micro-batches than the first.

    One parameter stands for all. Where autograd does not reach it as a leaf (sharded parameters) nothing is counted and
    nothing is noticed.
    """

    def __init__(self) -> None:
        self._param: Tensor | None = None
        self._count = 0
        self._ascent: int | None = None
        self._warned = False

    def ascended(self, param: Tensor) -> None:
        """The first pass is over; from now on the second one's backward passes count."""
        self._ascent = self._count if self._param is param else None  # None: it was not watched yet
        if self._param is not param and param.is_leaf and param.requires_grad:
            self._param = param
            param.register_post_accumulate_grad_hook(self._counted)
        self._count = 0

    def _counted(self, param: Tensor) -> None:
        if param is self._param:
            self._count += 1

    def finished(self) -> None:
        """The second pass is over: warns once where it made another number of backward passes."""
        first, second = self._ascent, self._count
        self.forget()
        if first and second and second != first and not self._warned:
            self._warned = True
            warnings.warn(
                f"the first pass made {first} backward passes and the second {second}: with accumulated "
                "gradients the second pass has to replay the same micro-batches, or the two gradients are of different "
                "losses; step(closure, accumulate=batches) does it",
                stacklevel=4,
            )

    def cleared(self) -> None:
        """Gradients were thrown away, and the backward passes that made them do not count."""
        self._count = 0

    def forget(self) -> None:
        """The next backward pass is the first of a step."""
        self._ascent, self._count = None, 0
