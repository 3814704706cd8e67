"""SecondPass: the micro-batches of a step, kept in the first pass and replayed at the perturbed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map

from .batch_norm import freeze_stats
from .optimizer import FriendlySAM
from .step.closures import with_a_graph_of_its_own
from .step.random_state import RandomState


class SecondPass:
    """Makes the second pass of a step for loops that make the first one as they are used to.

    The second pass sees what the first saw: the same micro-batches, the same random numbers (dropout masks), running
    statistics that it does not touch; data-parallel ranks exchange gradients in its last micro-batch only::

        second_pass = SecondPass(optimizer, model)
        for batch in micro_batches:
            second_pass.keep(batch)                      # before its forward pass
            (loss_of(batch) / len(micro_batches)).backward()
        second_pass.run(lambda batch: (loss_of(batch) / len(micro_batches)).backward())
        optimizer.step()                                 # clip the second gradient before it, if you clip

    Args:
        optimizer: a :class:`fsam_ext.FriendlySAM`. In the steps of its schedule without an ascent ``run`` does nothing.
        model: whose running statistics are frozen (:func:`fsam_ext.freeze_stats`), and whose ``no_sync()`` (or, of
            ``fully_shard``, ``set_requires_gradient_sync``) keeps gradients local until the last micro-batch; or None.
        replay_rng: draw the same random numbers again. After the second pass the generators are where the first pass
            left them.

    Raises:
        TypeError: the optimizer is none of this package.
    """

    def __init__(self, optimizer: FriendlySAM, model: nn.Module | None = None, *, replay_rng: bool = True) -> None:
        if not isinstance(optimizer, FriendlySAM):
            raise TypeError(f"optimizer must be a fsam_ext.FriendlySAM or SAM, not {type(optimizer).__name__}")
        self._optimizer = optimizer
        self._model = model
        self._replay_rng = replay_rng
        self._kept: list[tuple[Any, RandomState | None]] = []

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, batch: Any) -> None:
        """Keeps a micro-batch, and where the random numbers are, for the second pass.

        Raises:
            TypeError: the batch is or holds a generator or another iterator, which the first pass uses up.
        """
        self._kept.append((tree_map(_kept, batch), self._random_state()))

    def forget(self) -> None:
        """Drops what was kept: the step is given up, or made without a second pass."""
        self._kept = []

    def run(self, backward: Callable[[Any], Any], grad_scaler: Any = None) -> list[Any]:
        """Perturbs the weights and replays the kept micro-batches; then ``optimizer.step()`` finishes the step.

        Args:
            backward: called with each micro-batch, makes its forward and backward pass.
            grad_scaler: the torch.amp.GradScaler that scaled the losses, or None; finish the step with
                ``grad_scaler.step(optimizer)`` then.

        Returns:
            What ``backward`` returned for each: losses at the perturbed weights. Nothing in a step without an ascent.

        Raises:
            RuntimeError: nothing was kept. Whatever is raised in the second pass goes on, with the weights restored.
        """
        kept, self._kept = self._kept, []
        if not self._optimizer.ascends:
            return []
        if not kept:
            raise RuntimeError("run() has no micro-batches to replay; call keep(batch) before each forward pass")
        after = self._random_state()
        try:
            self._optimizer.first_step(zero_grad=True, grad_scaler=grad_scaler)
            with freeze_stats(self._model) if self._model is not None else nullcontext(), with_a_graph_of_its_own():
                results = []
                for number, (batch, state) in enumerate(kept):
                    if state is not None:
                        state.replay()
                    with self._exchange(number == len(kept) - 1):
                        results.append(backward(batch))
            return results
        except BaseException:
            self._optimizer.restore()
            raise
        finally:
            if after is not None:
                after.replay()

    def _random_state(self) -> RandomState | None:
        groups = self._optimizer.param_groups
        return RandomState(param for group in groups for param in group["params"]) if self._replay_rng else None

    def _exchange(self, last: bool) -> AbstractContextManager[Any]:
        """What has ranks exchange gradients in the last micro-batch only."""
        if last:
            return nullcontext()
        if hasattr(self._model, "no_sync"):
            return self._model.no_sync()
        return _kept_local(self._model) if hasattr(self._model, "set_requires_gradient_sync") else nullcontext()


def _kept(part: Any) -> Any:
    """A part of a batch; its containers are copied, because first passes pop labels from them."""
    if isinstance(part, Iterator):
        raise TypeError(
            f"a batch of type {type(part).__name__} is used up by the first pass, so the second could not see it; "
            "make a list or a tensor of it before the first pass"
        )
    return copy(part) if isinstance(part, MutableMapping) else part


@contextmanager
def _kept_local(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
