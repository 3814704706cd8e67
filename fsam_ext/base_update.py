"""What happens at the restored weights: SGD, Adam and AdamW in one pass with the restore, any other optimizer after it.

A base update is told about segments (fsam_ext/segments.py) and never about the state machine around it.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from . import ops
from .capture import capturing
from .checkpoints import OWN_STATE
from .segments import Guards, Segment


def number_or_tensor(value: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """An option as the ops take it: (number, None), or (unused, tensor) where it lives on the device."""
    if isinstance(value, Tensor):
        if value.device == device and value.dtype in (torch.float32, torch.float64):
            return 0.0, value
        return float(value), None
    return value, None


class FusedBase(ABC):
    """A base optimizer whose update runs in pass C."""

    @abstractmethod
    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The state that a parameter of this group needs."""

    @abstractmethod
    def update(
        self,
        segment: Segment,
        grads: Sequence[Tensor],
        saved: Tensor | None,
        guards: Guards,
        group: dict[str, Any],
        rounding: Tensor | None,
    ) -> None:
        """Restores a segment from ``saved`` (where there is one) and updates it, unless ``guards`` say otherwise."""


class FusedSGD(FusedBase):
    """``torch.optim.SGD`` in pass C."""

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """A momentum buffer, where there is momentum."""
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def update(
        self,
        segment: Segment,
        grads: Sequence[Tensor],
        saved: Tensor | None,
        guards: Guards,
        group: dict[str, Any],
        rounding: Tensor | None,
    ) -> None:
        """One call of :func:`fsam_ext.ops.restore_sgd`."""
        lr, lr_tensor = number_or_tensor(group["lr"], segment.flat.device)
        ops.restore_sgd(
            segment.backend,
            segment.rows,
            grads,
            segment.offsets,
            saved,
            segment.flat.buffers["momentum_buffer"] if group["momentum"] != 0 else None,
            *guards,
            lr,
            lr_tensor,
            group["momentum"],
            group["dampening"],
            group["weight_decay"],
            group["nesterov"],
            group["maximize"],
            rounding,
        )


class FusedAdam(FusedBase):
    """``torch.optim.Adam`` and ``AdamW`` in pass C."""

    def __init__(self, decoupled: bool) -> None:
        self.decoupled = decoupled

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Both moments and the step count."""
        return ("exp_avg", "exp_avg_sq", "step")

    def update(
        self,
        segment: Segment,
        grads: Sequence[Tensor],
        saved: Tensor | None,
        guards: Guards,
        group: dict[str, Any],
        rounding: Tensor | None,
    ) -> None:
        """One call each of :func:`fsam_ext.ops.count_steps` and :func:`fsam_ext.ops.restore_adam`."""
        lr, lr_tensor = number_or_tensor(group["lr"], segment.flat.device)
        beta1, beta2 = map(float, group["betas"])
        corrections = segment.count_steps(guards, lr, lr_tensor, beta1, beta2)
        try:
            ops.restore_adam(
                segment.backend,
                segment.rows,
                grads,
                segment.offsets,
                saved,
                segment.flat.buffers["exp_avg"],
                segment.flat.buffers["exp_avg_sq"],
                corrections,
                *guards,
                lr,
                lr_tensor,
                beta1,
                beta2,
                group["eps"],
                group["weight_decay"],
                group.get("decoupled_weight_decay", self.decoupled),
                group["maximize"],
                rounding,
            )
        except RuntimeError:  # refused before it wrote anything: then nothing is counted either
            segment.take_steps_back(guards)
            raise


class GenericBase:
    """Any other optimizer: its own ``step`` runs on the restored weights, with its state inside ours."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        # Some make their state when they are made, and count on it: Adagrad does before torch 2.13.
        self._made = dict(optimizer.state)

    @contextmanager
    def _own_state_only(self, state: dict[Tensor, dict[str, Any]]):
        """Hides the EMA: optimizers take a parameter with an empty state for one they have not met."""
        hidden = [(entry, name, entry.pop(name)) for entry in state.values() for name in OWN_STATE if name in entry]
        try:
            yield
        finally:
            for entry, name, value in hidden:
                entry[name] = value

    def step(
        self,
        state: dict[Tensor, dict[str, Any]],
        param_groups: list[dict[str, Any]],
        applied: Tensor | None = None,
    ) -> None:
        """Runs the base's step without its hooks: ours have fired already.

        Args:
            applied: None, or a 0-d tensor that tells on the device whether the step counts: where it is 0, weights and
                state get their old values back. Costs a copy of them.

        Raises:
            RuntimeError: ``applied`` is given and the base has no state yet, for which there are no old values.
        """
        self.optimizer.state = state
        self.optimizer.param_groups = param_groups
        step = type(self.optimizer).step
        with self._own_state_only(state):
            while self._made:
                param, entry = self._made.popitem()
                if not state[param]:  # loaded state counts
                    state[param].update(entry)
            tensors = [] if applied is None else _all_tensors(state, param_groups)
            before = [tensor.clone() for tensor in tensors]
            getattr(step, "__wrapped__", step)(self.optimizer)
            if applied is None:
                return
            if len(_all_tensors(state, param_groups)) != len(tensors):
                raise RuntimeError(
                    f"{type(self.optimizer).__name__} made its state within a CUDA graph, where a step that is not "
                    "finite could not be undone; make one step before the capture"
                )
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(torch.where(applied.to(tensor.device) != 0, tensor, value))


def _all_tensors(state: dict[Tensor, dict[str, Any]], param_groups: list[dict[str, Any]]) -> list[Tensor]:
    """Every tensor that a step may write."""
    params = [param for group in param_groups for param in group["params"] if param.grad is not None]
    values = [value for entry in state.values() for value in entry.values() if isinstance(value, Tensor)]
    return params + values


def host_may_read(device: torch.device) -> bool:
    """Whether a value on the device can be waited for: not while a graph is captured."""
    return not capturing(device)


def base_defaults(base_optimizer: type[Optimizer], base_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The base optimizer's options, checked by the base itself.

    Raises:
        TypeError, ValueError: as the base optimizer's constructor does; and where its ``step`` needs a closure.
    """
    if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
        raise TypeError(
            f"base_optimizer must be a class of torch.optim, such as torch.optim.SGD, not {base_optimizer!r}"
        )
    closure = inspect.signature(base_optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"base_optimizer {base_optimizer.__name__} evaluates the loss inside its step, which the two passes of "
            "F-SAM rule out; choose one whose step() needs no closure"
        )
    probe = base_optimizer([torch.nn.Parameter(torch.zeros(1, 1, device="cpu"))], **base_kwargs)
    return probe.defaults


def is_fused(base_optimizer: type[Optimizer], group: dict[str, Any]) -> bool:
    """Whether pass C can do this base's update with these options."""
    return (
        base_optimizer in (SGD, Adam, AdamW)
        and not group.get("amsgrad", False)
        and not group.get("differentiable", False)
    )


def fused_base(base_optimizer: type[Optimizer]) -> FusedBase:
    """The fused update of a base class for which :func:`is_fused` holds."""
    return FusedSGD() if base_optimizer is SGD else FusedAdam(decoupled=base_optimizer is AdamW)
