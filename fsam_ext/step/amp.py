"""The protocol between this package's optimizers and torch.amp.GradScaler.

NOTE [one scaler, two gradients]
A scaled loss gives scaled gradients in both passes, and GradScaler knows of one of them. The first pass reads the scale
from the scaler and divides by it where the kernels read gradients; the second goes through ``scaler.step(optimizer)``,
which hands over its scale and what it found (``_step_supports_amp_scaling``). An overflow of the first pass is found by
the norm, stays on the device, and is put with what the scaler found in the second, so that ``scaler.update()``
backs off once for the step. Nothing here reads a value on the host.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer


def is_asked_by_torch() -> bool:
    """Whether the caller's caller is a GradScaler of torch, which then leaves unscaling and skipping to step().

    Lightning asks for the same attribute, and refuses to clip gradients where it is true, in bfloat16 too.
    """
    return sys._getframe(2).f_globals.get("__name__", "").partition(".")[0] == "torch"


def scaler_of(grad_scaler: Any, optimizer: Optimizer) -> Scaler | None:
    """The scaler of a first pass; None where there is none, or a disabled one.

    Raises:
        TypeError: it is no GradScaler.
    """
    if grad_scaler is None:
        return None
    if not isinstance(grad_scaler, torch.amp.GradScaler):
        raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, not {type(grad_scaler).__name__}")
    return Scaler(grad_scaler, optimizer) if grad_scaler.is_enabled() else None


class Scaler:
    """A GradScaler and the optimizer that it knows by its identity."""

    def __init__(self, grad_scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
        self._grad_scaler = grad_scaler
        self._optimizer = optimizer

    @property
    def _state(self) -> dict[str, Any]:
        return self._grad_scaler._per_optimizer_states[id(self._optimizer)]

    def ascent_scale(self, device: torch.device) -> Tensor | None:
        """The scale of the first pass's gradients, float32 on ``device``; None where they were unscaled already."""
        if self._state["stage"] is OptState.UNSCALED:
            return None
        return self._grad_scaler.scale(torch.ones((), device=device))

    def count_overflow(self, totals: dict[torch.device, Tensor]) -> None:
        """Makes the sums of the first pass infinite where ``grad_scaler.unscale_()`` found that a gradient was.

        Clipping or clamping may have made it finite since, which makes it no gradient.
        """
        state = self._state
        if state["stage"] is OptState.UNSCALED:
            for device, total in totals.items():
                found = sum(one.to(device, non_blocking=True) for one in state["found_inf_per_device"].values())
                if isinstance(found, Tensor):
                    total[0].add_(torch.where(found.reshape(()) > 0, torch.inf, 0.0))

    def forget_unscaling(self) -> None:
        """Lets the next gradients be unscaled although the last ones were: to clip those of both passes, say."""
        self._state["stage"] = OptState.READY

    def report_overflow(self, noise_sq: Tensor) -> None:
        """Makes ``grad_scaler.update()`` back off where the first pass's squared norm was not finite."""
        for found in self._state["found_inf_per_device"].values():
            found.add_((~noise_sq.isfinite()).to(found.device, found.dtype, non_blocking=True))
