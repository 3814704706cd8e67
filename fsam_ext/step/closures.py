"""step(closure): its passes, and what becomes of gradients that were there before the closure ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..state.flatten import REGISTRY
from .accumulation import BackwardCount, mark

THROWN_AWAY = (
    "step(closure) threw away gradients that were there before it, because the closure made its own: for accumulated "
    "gradients call step(closure, accumulate=batches), whose closure gets each micro-batch in both passes, or "
    "first_step() and second_step()"
)

# NOTE [closures that do nothing]
# Frameworks that let a user write the two passes by hand still hand a closure to step(), one that does nothing. The
# gradient that is there is then the one that the step is to be made with.


class SetAside:
    """Gradients that nobody has used, set aside while a closure runs: NOTE [closures that do nothing].

    Args:
        params: all parameters.
        count: tells whether their gradients are new.
        clear: clears them.
    """

    def __init__(self, params: Sequence[Tensor], count: BackwardCount, clear: Callable[[], None]) -> None:
        self.some = count.are_new(params)
        self._params = params
        kept = [param for param in params if param.grad is not None] if self.some else []
        # Flattened gradients are zeroed in place.
        self._kept = [(p, p.grad if REGISTRY.get(p) is None else p.grad.clone()) for p in kept]
        clear()
        self._before = list(map(mark, params)) if self.some else []

    def is_replaced(self) -> bool:
        """Whether the closure has made a gradient."""
        return self._before != list(map(mark, self._params))

    def put_back(self) -> None:
        """Brings back what was set aside."""
        for param, grad in self._kept:
            if REGISTRY.get(param) is None:
                param.grad = grad
            else:
                param.grad.copy_(grad)


@contextmanager
def with_a_graph_of_its_own() -> Iterator[None]:
    """Says what to do where a second pass goes back through the graph of the first."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            "the second pass went back through the graph of the first: it needs a forward pass of its own, at the "
            "perturbed weights; compute the loss within the closure, or anew after first_step()"
        ) from error


def one_pass(evaluate: Callable[[], Any], aside: SetAside, warn: Callable[[str], None]) -> Any:
    """The pass of a step that needs one gradient more."""
    with with_a_graph_of_its_own():
        loss = evaluate()
    if not aside.some:
        return loss
    if aside.is_replaced():
        warn(THROWN_AWAY)
    else:
        aside.put_back()
    return loss


def first_pass(evaluate: Callable[[], Any], aside: SetAside, warn: Callable[[str], None]) -> Any:
    """The first of two passes.

    Raises:
        RuntimeError: the closure does nothing, and there is one gradient only.
    """
    loss = evaluate()
    if aside.some:
        if not aside.is_replaced():
            aside.put_back()
            raise RuntimeError(
                "step(closure) needs a closure that computes the loss and calls backward, for two gradients, and this "
                "one made none; call first_step() with the gradient that is there, make a second backward, then step()"
            )
        warn(THROWN_AWAY)
    return loss
