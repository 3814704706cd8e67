"""What may be called when, and the sentences for what may not."""

from __future__ import annotations

import sys
from typing import Any, Protocol

from .accumulation import BackwardCount
from .amp import Scaler
from .transaction import Stage, Transaction


class Ascents(Protocol):
    """What tells which steps make an ascent: :class:`fsam_ext.schedule.Schedule`."""

    def ascends(self, step: int) -> bool:
        """Whether step number ``step`` makes an ascent."""

    def describe(self, step: int) -> str:
        """The schedule and the step, for messages."""


def refuse_sharding_wrapper() -> None:
    """Raises TypeError where torch's ZeroRedundancyOptimizer makes this optimizer, of its rank's share of parameters.

    Each rank would take the norm over its own share: another algorithm. It says so nowhere but in the call itself.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe(2)
    while module is not None and frame is not None:
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):
            raise TypeError(
                "ZeroRedundancyOptimizer gives each rank a share of the parameters, so no rank knows the norm over "
                "all of them; use torch.distributed.fsdp.fully_shard, which shards the state as well"
            )
        frame = frame.f_back


def check_first_step(stage: Stage, schedule: Ascents, step: int) -> None:
    """Raises RuntimeError where no ascent may begin."""
    if stage is Stage.ASCENDED:
        raise RuntimeError(
            "first_step was called after `with perturbed():`; call step() to finish the step, or restore()"
        )
    if stage is not Stage.CLEAN:
        raise RuntimeError(
            "first_step was called twice: the weights are perturbed; call second_step() to finish the step, or "
            "restore()"
        )
    if not schedule.ascends(step):
        raise RuntimeError(
            f"first_step was called in a step without an ascent ({schedule.describe(step)}); call step() after one "
            "backward, and first_step() only where optimizer.ascends is true"
        )


def check_second_step(stage: Stage) -> None:
    """Raises RuntimeError where there is no first step."""
    if stage is Stage.CLEAN:
        raise RuntimeError("second_step was called without first_step; call first_step() first")


def check_step(
    stage: Stage, lacks_ascent: bool, closure: object, accumulate: object, scaled: bool, scaler: Scaler | None
) -> None:
    """Raises RuntimeError or TypeError where step() cannot make what is left of a step.

    Args:
        lacks_ascent: whether the present step is to make an ascent and has made none yet.
        closure, accumulate: as given to step(), or None.
        scaled: whether the call came through ``GradScaler.step``.
        scaler: of the first pass.
    """
    if closure is not None:
        _check_closure(stage, scaled or scaler is not None)
    elif accumulate is not None:
        raise TypeError("step(accumulate=...) needs a closure, which it calls with each micro-batch")
    elif lacks_ascent:
        raise RuntimeError(
            "step() was called without first_step and without a closure, which would be a plain step of the base "
            "optimizer; call first_step() before the second backward, or pass a closure"
        )
    else:
        check_scaler(stage, scaled, scaler)


def _check_closure(stage: Stage, scaled: bool) -> None:
    if stage is Stage.ASCENDED:
        raise RuntimeError(
            "step(closure) was called after `with perturbed():`, whose second gradient it would replace; call step() "
            "without a closure"
        )
    if scaled:
        raise RuntimeError(
            "step(closure) was called with a GradScaler, which does not see the closure's gradients; call "
            "first_step(grad_scaler=scaler), make the second backward, then scaler.step(optimizer)"
        )


def check_gradients(transaction: Transaction, groups: list[dict[str, Any]], count: BackwardCount) -> None:
    """Raises RuntimeError where weights are perturbed and the second gradient is missing."""
    some = any(param.grad is not None for group in groups for param in group["params"])
    if (not some or count.second_is_missing(groups)) and transaction.has_perturbed:
        raise RuntimeError(
            "the step was to be finished without a second gradient: after first_step(), compute the loss anew, call "
            "backward, then second_step(); restore() gives the step up"
        )


def check_scaler(stage: Stage, scaled: bool, scaler: Scaler | None) -> None:
    """Raises RuntimeError where only one of the two gradients was scaled."""
    if stage is Stage.CLEAN or scaled == (scaler is not None):
        return
    raise RuntimeError(
        "the second gradient came through scaler.step(optimizer) but the first did not: call "
        "first_step(grad_scaler=scaler), or the average would be of scaled gradients"
        if scaled
        else "first_step(grad_scaler=scaler) was called, so the second gradient is scaled as well; finish the step "
        "with scaler.step(optimizer)"
    )


def refuse_while_perturbed(stage: Stage, what: str) -> None:
    """Raises RuntimeError where the weights are perturbed, or half updated."""
    if stage in (Stage.PERTURBED, Stage.UPDATING):
        raise RuntimeError(
            f"{what} was called while the weights are perturbed; call it after second_step(), or call restore() first"
        )
