"""Hugging Face Accelerate: a step of the loop with both passes in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ..second_pass import SecondPass

# NOTE [who opens accumulate]
# accelerator.accumulate counts micro-batches, so it must be opened once for each: by the loop, as Accelerate's own
# examples do, or else by TwoPass. Accelerate does not tell whether it is open, so TwoPass puts a method around it on
# the accelerator it is given.

_WITHOUT_A_SECOND_PASS = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


class TwoPass:
    """Trains on one micro-batch; with the last micro-batch of a step come its second pass and the update::

        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        step = TwoPass(accelerator, model, optimizer, loss_fn, clip=1.0)
        for batch in loader:
            loss = step(batch)                  # within accelerator.accumulate(model) or not
            scheduler.step()

    It makes forward and backward passes, clips, steps and clears gradients. The micro-batches of a step are kept until
    its second pass. With ``ascent_sync=False`` ranks exchange no gradients in first passes.

    Args:
        accelerator: the loop's Accelerator, with its mixed precision and its ``gradient_accumulation_steps``.
        model: as ``accelerator.prepare`` returned it.
        optimizer: as ``accelerator.prepare`` returned it, made of a :class:`fsam_ext.FriendlySAM`.
        loss_fn: ``loss_fn(model, batch)`` makes the forward pass and returns the loss, a tensor of one element.
        clip: the norm that the second gradient is clipped to, or None. The first is never clipped, which would change
            the average.

    Raises:
        TypeError: the optimizer is none of this package, is not prepared, or there are several.
        ValueError: the accelerator trains in a way that has no second pass: DeepSpeed, Megatron-LM, XLA, FSDP 1.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        clip: float | None = None,
    ) -> None:
        _check(accelerator, optimizer)
        self._accelerator = accelerator
        self._model = model
        self._optimizer = optimizer
        self._loss_fn = loss_fn
        self._clip = clip
        self._own = _unwrapped(optimizer)
        self._second_pass = SecondPass(self._own, model)
        self._accumulating = False
        accelerator.accumulate = self._noted(accelerator.accumulate)

    def __call__(self, batch: Any) -> Tensor:
        """Trains on a micro-batch.

        Returns:
            Its loss at the unperturbed weights, detached, and not divided by the number of micro-batches.

        Raises:
            TypeError: the batch is an iterator, which the first pass would use up. Whatever ``loss_fn`` raises goes on;
                the step is given up then, and the weights are what they were before it.
        """
        self._second_pass.keep(batch)
        try:
            with nullcontext() if self._accumulating else self._accelerator.accumulate(self._model):
                with self._exchange():
                    loss = self._backward(batch)
                if self._accelerator.sync_gradients:
                    self._finish()
        except BaseException:
            self._second_pass.forget()
            self._own.restore()
            self._own.zero_grad()
            raise
        return loss

    def stats(self) -> dict[str, Tensor]:
        """What the last ascent measured, for ``accelerator.log``: :meth:`fsam_ext.FriendlySAM.stats`, as "fsam/..."."""
        return {f"fsam/{name}": value for name, value in self._own.stats().items()}

    def _backward(self, batch: Any) -> Tensor:
        loss = self._loss_fn(self._model, batch)
        self._accelerator.backward(loss)
        return loss.detach()

    def _exchange(self) -> AbstractContextManager[Any]:
        """What keeps the gradients of a first pass on their rank where the optimizer asks for that."""
        local = self._own.ascends and not self._own.ascent_sync
        return self._accelerator.no_sync(self._model) if local else nullcontext()

    def _finish(self) -> None:
        self._second_pass.run(self._backward, grad_scaler=self._accelerator.scaler)
        if self._clip is not None:
            self._accelerator.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _noted(self, accumulate: Callable[..., AbstractContextManager[Any]]) -> Callable[..., Any]:
        """accelerator.accumulate, which notes that it is open: NOTE [who opens accumulate]."""

        @contextmanager
        def noted(*models: nn.Module) -> Iterator[None]:
            with accumulate(*models):
                self._accumulating = True
                try:
                    yield
                finally:
                    self._accumulating = False

        return noted


def _unwrapped(optimizer: Any) -> Any:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _check(accelerator: Accelerator, optimizer: Any) -> None:
    if isinstance(optimizer, list | tuple):
        raise TypeError(
            f"optimizer must be one optimizer, not {len(optimizer)}; give all parameters to one FriendlySAM"
        )
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise TypeError(
            f"optimizer must be what accelerator.prepare() returned, not a bare {type(optimizer).__name__}; call "
            "model, optimizer = accelerator.prepare(model, optimizer) before TwoPass"
        )
    kind = accelerator.distributed_type
    if kind in _WITHOUT_A_SECOND_PASS or (kind is DistributedType.FSDP and not accelerator.is_fsdp2):
        raise ValueError(
            f"accelerator trains with {kind.value}, which has no room for a second pass; use "
            "DistributedDataParallel or FSDP 2 (fsdp_version=2)"
        )
