"""What happens at the restored weights: SGD, Adam and AdamW in one pass with the restore, any other optimizer after it.

A base update is told about segments (segments.py) and never about the state machine around it. It does nothing itself:
it gives the ops of an update, which transaction.py runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..backends import ops
from ..backends.calls import in_one_go
from ..state.entries import at_home, base_part
from ..state.keys import OWN_STATE
from .base_options import take_back, theirs
from .segments import Guards, Segment
from .transaction import Journal

_VERSION = Tensor._version.__get__


def number_or_tensor(value: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """An option as the ops take it: (number, None), or (unused, tensor) where it lives on the device."""
    if isinstance(value, Tensor):
        if value.device == device and value.dtype in (torch.float32, torch.float64):
            return 0.0, value
        return float(value), None
    return value, None


class FusedBase(ABC):
    """A base optimizer whose update runs in pass C.

    Attributes:
        optimizer: torch's own, which never makes a step: it knows its options and checkpoints.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @abstractmethod
    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The state that a parameter of this group needs."""

    @abstractmethod
    def ops(
        self,
        segment: Segment,
        grads: Sequence[Tensor],
        saved: Tensor | None,
        guards: Guards,
        group: dict[str, Any],
        rounding: Tensor | None,
        adopts: bool,
        journal: Journal,
        reused: Sequence[Any] | None = None,
    ) -> list[Callable[[], None]]:
        """What restores a segment from ``saved`` (where there is one) and updates it, unless ``guards`` say otherwise.

        ``adopts``: the weights are not perturbed, and what others wrote into those with masters counts. The last op
        writes the weights, and each counts in the journal. ``reused``: what is added to the gradient: reuse.py.
        """


class FusedSGD(FusedBase):
    """``torch.optim.SGD`` in pass C."""

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """A momentum buffer, where there is momentum."""
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def ops(
        self,
        segment: Segment,
        grads: Sequence[Tensor],
        saved: Tensor | None,
        guards: Guards,
        group: dict[str, Any],
        rounding: Tensor | None,
        adopts: bool,
        journal: Journal,
        reused: Sequence[Any] | None = None,
    ) -> list[Callable[[], None]]:
        """:func:`fsam_ext.backends.ops.restore_sgd`."""
        update = partial(
            ops.restore_sgd,
            segment.backend,
            segment.rows,
            grads,
            segment.offsets,
            saved,
            segment.flat.buffer("momentum_buffer") if group["momentum"] != 0 else None,
            *guards,
            *number_or_tensor(group["lr"], segment.flat.device),
            group["momentum"],
            group["dampening"],
            group["weight_decay"],
            group["nesterov"],
            group["maximize"],
            rounding,
            adopts,
            journal.cell,
            *(reused or ()),
        )
        return [update]


class FusedAdam(FusedBase):
    """``torch.optim.Adam`` and ``AdamW`` in pass C."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.decoupled = type(optimizer) is AdamW

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Both moments and the step count."""
        return ("exp_avg", "exp_avg_sq", "step")

    def ops(
        self,
        segment: Segment,
        grads: Sequence[Tensor],
        saved: Tensor | None,
        guards: Guards,
        group: dict[str, Any],
        rounding: Tensor | None,
        adopts: bool,
        journal: Journal,
        reused: Sequence[Any] | None = None,
    ) -> list[Callable[[], None]]:
        """:func:`fsam_ext.backends.ops.count_steps` and :func:`fsam_ext.backends.ops.restore_adam`."""
        lr, lr_tensor = number_or_tensor(group["lr"], segment.flat.device)
        beta1, beta2 = map(float, group["betas"])
        steps = segment.flat.buffer("step")
        count = partial(
            ops.count_steps,
            segment.backend,
            steps,
            segment.step_index,
            segment.corrections,
            guards.stats,
            guards.found_inf,
            lr,
            lr_tensor,
            beta1,
            beta2,
            journal.cell,
        )
        update = partial(
            ops.restore_adam,
            segment.backend,
            segment.rows,
            grads,
            segment.offsets,
            saved,
            segment.flat.buffer("exp_avg"),
            segment.flat.buffer("exp_avg_sq"),
            segment.corrections,
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
            adopts,
            journal.cell,
            *(reused or ()),
        )
        return [count, partial(_update_or_uncount, update, segment, guards, journal)]


def _update_or_uncount(update: Callable[[], None], segment: Segment, guards: Guards, journal: Journal) -> None:
    """Takes the counts back where an update is refused before it has written anything."""
    before = journal.count()
    try:
        update()
    except RuntimeError:
        if journal.count() == before:
            steps = segment.flat.buffer("step")
            one = guards.applied(steps).expand(len(segment.step_index))
            in_one_go(partial(steps.index_add_, 0, segment.step_index, one, alpha=-1), partial(journal.cell.sub_, 1))
        raise


class GenericBase:
    """Any other optimizer: its own ``step`` runs on the restored weights, with its part of our state.

    It sees no state of ours, because optimizers take a parameter with an empty state for one they have not met.

    Attributes:
        optimizer: the base, which has state and groups only while it runs.
        made: the state that it made when it was made.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        # Some make their state when they are made, and count on it: Adagrad does before torch 2.13.
        self.made = dict(optimizer.state)

    def prepare(self, state: dict[Any, Any], param_groups: list[dict[str, Any]]) -> Callable[[], int]:
        """Gives the base its groups and its part of ``state``; returns what tells whether it has written (1) since."""
        parts = {key: at_home(base_part(entry), key) for key, entry in state.items()}
        parts.update((key, entry) for key, entry in self.made.items() if not parts.get(key))  # loaded state counts
        set_state(self.optimizer, {key: part for key, part in parts.items() if part != {}})
        self.optimizer.param_groups = theirs(param_groups)
        before = self._marks()
        return lambda: int(self._marks() != before)

    def _marks(self) -> list[int]:
        """What changes wherever the base writes: versions of weights and of state, or, the first time, its keys."""
        return [-1 if tensor.is_inference() else _VERSION(tensor) for tensor in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        """Every tensor that a step may write."""
        groups, entries = self.optimizer.param_groups, self.optimizer.state.values()
        params = [param for group in groups for param in group["params"] if param.grad is not None]
        values = [entry.values() if isinstance(entry, dict) else (entry,) for entry in entries]
        return params + [value for part in values for value in part if isinstance(value, Tensor)]

    def step(self, applied: Tensor | None = None) -> None:
        """Runs the base's step without its hooks: ours have fired already.

        Args:
            applied: None, or a 0-d tensor that tells on the device whether the step counts: where it is 0, weights and
                state get their old values back. Costs a copy of them.

        Raises:
            RuntimeError: ``applied`` is given and the base has no state yet, for which there are no old values; or the
                base differentiates the gradients.
        """
        tensors = [] if applied is None else self._tensors()
        before = [tensor.clone() for tensor in tensors]
        step = type(self.optimizer).step
        try:
            getattr(step, "__wrapped__", step)(self.optimizer)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(
                f"{type(self.optimizer).__name__} differentiates the gradients in its step, which are of the perturbed "
                "weights; the weights are restored by then, so choose a base that takes gradients as they are"
            ) from error
        if applied is None:
            return
        if len(self._tensors()) != len(tensors):
            raise RuntimeError(
                f"{type(self.optimizer).__name__} made its state within a CUDA graph, where a step that is not "
                "finite could not be undone; make one step before the capture"
            )
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(torch.where(applied.to(tensor.device) != 0, tensor, value))

    def merge(self, state: dict[Any, Any], param_groups: list[dict[str, Any]]) -> None:
        """Puts the base's part back into ``state`` and the groups; may be done twice."""
        take_back(self.optimizer.param_groups, param_groups)
        for key, part in self.optimizer.state.items():
            entry = state.get(key)
            if not isinstance(part, dict) or not isinstance(entry, dict):
                state[key] = part
                continue
            entry.update(part)
            for name in [name for name in entry if name not in part and name not in OWN_STATE]:
                del entry[name]
        self.made = {}
        set_state(self.optimizer, {})  # or it would keep what a user moves elsewhere


def set_state(optimizer: Optimizer, state: dict[Any, Any]) -> None:
    """Gives a base optimizer the state that it works on."""
    try:
        optimizer.state = defaultdict(dict, state)
    except AttributeError:  # it has no setter
        optimizer.state.clear()
        optimizer.state.update(state)


def is_fused(base_optimizer: type[Optimizer], group: dict[str, Any]) -> bool:
    """Whether pass C can do this base's update with these options."""
    return (
        base_optimizer in (SGD, Adam, AdamW)
        and not group.get("amsgrad", False)
        and not group.get("differentiable", False)
    )


def base_of(optimizer: Optimizer) -> FusedBase | GenericBase:
    """What updates the weights as this base optimizer does."""
    if not all(is_fused(type(optimizer), group) for group in optimizer.param_groups):
        return GenericBase(optimizer)
    return FusedSGD(optimizer) if type(optimizer) is SGD else FusedAdam(optimizer)
