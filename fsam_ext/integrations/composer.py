"""MosaicML Composer: what its closures need for their second call."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from composer import Algorithm, Event, Logger, State
from composer.algorithms import GradientClipping
from composer.core import Precision
from composer.trainer._scaler import ClosureGradScaler

from ..batch_norm import freeze_stats
from ..optimizer import FriendlySAM
from .versions import require

# NOTE [Composer's closures]
# The trainer calls optimizer.step(closure=...), and its closure makes all micro-batches of a batch, algorithms and
# callbacks included. How SAM tells it to be silent in a second call (loss_dict) and to stay on its rank in a first
# (ddp_sync) is said by Composer's own SAM and nowhere else. A closure that is handed to a ClosureGradScaler returns
# None where a gradient of any rank overflowed.


class ComposerFriendlySAM(Algorithm):
    """Makes Composer's training steps those of F-SAM, around a :class:`fsam_ext.FriendlySAM`::

        optimizer = FriendlySAM(model.parameters(), torch.optim.AdamW, lr=1e-3)
        trainer = Trainer(model=model, optimizers=optimizer, algorithms=[ComposerFriendlySAM()])

    The second pass has the micro-batches and the random numbers of the first. It leaves running statistics, train
    metrics and the loss that is logged alone, and callbacks do not see it. GradientClipping clips the second gradient
    only. Other algorithms act in both passes. After each batch ``fsam/...`` is logged.

    Raises:
        ImportError: another version of Composer than the tested one.
        TypeError: when the trainer is made: the optimizer is none of this package.
    """

    def __init__(self) -> None:
        require("mosaicml", "0.32")

    def match(self, event: Event, state: State) -> bool:
        """Whether the algorithm acts at an event."""
        return event in (Event.AFTER_LOAD, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Attaches to the optimizer, or logs what its last ascent measured."""
        (optimizer,) = state.optimizers
        if event is Event.BATCH_END:
            stats = optimizer.stats()
            values = torch.stack([value.double() for value in stats.values()]).tolist()  # the device is waited for once
            logger.log_metrics({f"fsam/{name}": value for name, value in zip(stats, values)})
            return
        if not isinstance(optimizer, FriendlySAM):
            raise TypeError(
                f"optimizers must be a fsam_ext.FriendlySAM or SAM for ComposerFriendlySAM, not "
                f"{type(optimizer).__name__}; wrap its class: FriendlySAM(params, base_optimizer, ...)"
            )
        optimizer._step_supports_amp_closure = True  # what Composer asks optimizers for, with float16
        if state.precision is Precision.AMP_FP16:
            state.scaler = ClosureGradScaler()

        def with_both_passes(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if kwargs.get("closure") is None:
                return None
            closure = _BothPasses(kwargs["closure"], state, optimizer)
            return args, {**kwargs, "closure": closure, "replay_rng": True}

        optimizer.register_step_pre_hook(with_both_passes)


class _BothPasses:
    """The closure of one step: tells its first call from its second. NOTE [Composer's closures]."""

    def __init__(self, closure: Callable[..., Any], state: State, optimizer: FriendlySAM) -> None:
        self._closure = closure
        self._state = state
        self._ascends = optimizer.ascends
        self._local = self._ascends and not optimizer.ascent_sync
        self._first: Any = None
        self._overflowed = False
        self._drawn = numpy.random.get_state(), random.getstate()

    def __call__(self) -> Any:
        if not self._ascends:
            return self._closure()
        if self._first is None:
            with self._without_clipping():
                self._first = self._closure(ddp_sync=False) if self._local else self._closure()
            if self._first is None:  # an overflow: the step is given up, which a second None says
                self._first, self._overflowed = math.nan, True
            return self._first
        if self._overflowed:
            return None
        numpy.random.set_state(self._drawn[0])
        random.setstate(self._drawn[1])
        with self._unseen(), freeze_stats(self._state.model):
            return self._closure(loss_dict={})

    @contextmanager
    def _without_clipping(self) -> Iterator[None]:
        state, algorithms = self._state, list(self._state.algorithms)
        state.algorithms = [one for one in algorithms if not isinstance(one, GradientClipping)]
        try:
            yield
        finally:
            state.algorithms = algorithms

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        state = self._state
        kept = {name: getattr(state, name) for name in ("train_metrics", "loss", "outputs")}
        callbacks = list(state.callbacks)
        state.callbacks, state.train_metrics = [], None
        try:
            yield
        finally:
            state.callbacks = callbacks
            for name, value in kept.items():
                setattr(state, name, value)
