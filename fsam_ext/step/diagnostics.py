"""What rounding leaves of a perturbation, and a warning where that is little.

NOTE [swallowed perturbations]
A perturbation is small beside the weights: rho over the square root of the number of parameters. bfloat16 has 8 bits,
so most weights may round back to where they were and a few move too far. Training then runs without a sign of it, only
that SAM does nothing. So pass B counts what is left, and a user can ask: ``stats()["effective_cosine"]``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backends import ops
from ..backends.capture import capturing

ENOUGH = 0.7


def total_effect(effects: Sequence[Tensor]) -> Tensor:
    """[sum e^2, sum e i, sum i^2] over all chunks, float64, on the device of the first segment."""
    sums = [effect.view(-1, ops.EFFECT).sum(0, dtype=torch.float64) for effect in effects]
    return sum((one.to(sums[0].device) for one in sums[1:]), sums[0])


def effective_norm_and_cosine(effect: Tensor) -> tuple[Tensor, Tensor]:
    """|e|, and the cosine of e and i: 0 where nothing is left of i, NaN where i is zero."""
    effective_sq, dot, intended_sq = effect.unbind()
    cosine = dot / (effective_sq.sqrt() * intended_sq.sqrt())
    swallowed = (effective_sq == 0) & (intended_sq > 0)
    return effective_sq.sqrt(), cosine.masked_fill(swallowed, 0.0)


class EffectWatch:
    """Looks at the first ascent, the 10th, the 100th, ... and warns once where too little of a perturbation is left.

    The numbers travel to the host behind the step and are read when they have arrived: no step waits. On devices that
    are neither the CPU nor CUDA, where that cannot be had in this way, it does not look.
    """

    def __init__(self) -> None:
        self._ascents = 0
        self._next = 1
        self._arriving: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._warned = False

    def look(self, effects: Sequence[Tensor], names: Callable[[], str]) -> str | None:
        """To be called after each ascent with the segments' effects; returns what there is to warn of.

        ``names`` tells what weights are rounded to.
        """
        if self._warned or not effects:
            return None
        device = effects[0].device
        if device.type not in ("cpu", "cuda") or capturing(device):
            return None
        self._ascents += 1
        if self._ascents >= self._next:
            self._next *= 10
            effect, event = total_effect(effects), None
            if device.type == "cuda":
                host = torch.empty(ops.EFFECT, dtype=torch.float64, pin_memory=True)
                host.copy_(effect, non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(device))
                effect = host
            self._arriving = effect, event
        if self._arriving is None or not (self._arriving[1] is None or self._arriving[1].query()):
            return None
        arrived, self._arriving = self._arriving[0], None
        return self._judge(arrived.cpu(), names())

    def _judge(self, effect: Tensor, names: str) -> str | None:
        cosine = float(effective_norm_and_cosine(effect)[1])
        if not cosine < ENOUGH:
            return None
        self._warned = True
        return (
            f"rounding to {names} leaves little of the perturbation: the cosine of what is left with what was meant is "
            f"{cosine:.2f}. A larger rho, master_weights=True, or forward passes in float32 or float16 help; "
            'stats()["effective_cosine"] tells'
        )


def warn_user(message: str) -> None:
    """Warns at the line of the user's that the call came from, through whatever decorators lie between."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fsam_ext", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
