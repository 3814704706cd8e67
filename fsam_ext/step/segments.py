"""Segments: the parameters of one group, dtype and device that take part in a pass, ready to be handed to an op."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import ops
from ..state.flat_state import FlatState, aligned_numel
from ..state.flatten import REGISTRY
from ..state.shards import PLAIN, local, local_grads
from .distributed import GatheredCopies
from .held import Held, current_grads, look_at

_REQUIRES_GRAD = Tensor.requires_grad.__get__


def same_objects(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects in the same order."""
    return len(a) == len(b) and all(map(is_, a, b))


# NOTE [lists compare themselves]
# A list takes an object for equal to itself without asking it, twenty times faster than a loop does. Tensors that
# differ are asked: one of several elements is then neither equal nor not, which raises, and one of a single element
# answers for its value and has to be compared as an object.


class KnownTensors:
    """A list of parameters, to be compared with the present ones: NOTE [lists compare themselves]."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._plain = all(type(tensor) in PLAIN for tensor in tensors)
        self._single = [i for i, tensor in enumerate(tensors) if tensor.numel() <= 1] if self._plain else []

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` are the same objects in the same order."""
        if not self._plain or type(tensors) is not list:
            return same_objects(self._tensors, tensors)
        try:
            if self._tensors != tensors:
                return False
        except RuntimeError:
            return False
        return not self._single or all(self._tensors[i] is tensors[i] for i in self._single)


class Guards(NamedTuple):
    """What may scale a gradient or have an update skipped, as tensors on the device, or None.

    Attributes:
        stats: the sums of the ascent that the update belongs to.
        grad_scale: what the gradients are divided by.
        found_inf: not zero where a gradient scaler met a non-finite gradient.
    """

    stats: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def applied(self, like: Tensor) -> Tensor:
        """1 where updates are applied, else 0, in the dtype of ``like``."""
        applied = torch.ones((), dtype=torch.bool, device=like.device)
        if self.stats is not None:
            applied = self.stats[0].isfinite()
        if self.found_inf is not None:
            applied = applied & (self.found_inf.reshape(-1)[0] == 0)
        return applied.to(like.dtype)


class Segment:
    """One op call's worth of parameters.

    Attributes:
        params: the optimizer's parameters.
        rows: what the ops take as ``params``: nothing where they take the parameters that C++ holds under ``offsets``,
            else the parameters, this rank's shards of them, or whole runs of them where
            ``flatten_parameters(module, grads=True)`` laid them one after the other.
        offsets: int64 CPU tensor, the rows' positions in the flat state.
        partials: scratch of pass A.
        effect: what pass B counts of the perturbation's effect, or None where it is not asked to.
        step_index: positions in the flat step counts of all parameters, first of those that start a row; and
        corrections: of each row; both only where there are step counts (:func:`fsam_ext.backends.ops.count_steps`).
    """

    def __init__(self, backend: Any, flat: FlatState, params: list[Tensor]) -> None:
        self.backend = backend
        self.flat = flat
        self.params = params
        self._known = KnownTensors(params)
        self._registry_generation = REGISTRY.generation
        self._sharded = flat.kind.sharding is not None
        self.rows = list(map(local, params)) if self._sharded else params
        self._gathered = GatheredCopies(params) if self._sharded else None
        self._flat_grads: list[Tensor] | None = None
        index = [flat.index[param] for param in params]
        firsts = list(range(len(params)))
        if not self._sharded and _are_flattened(params) and _steps_agree(flat, index):
            firsts = _starts_of_runs(flat, params)
            self.rows, self._flat_grads = _merged(params, firsts)
        self.offsets = torch.tensor([flat.offset[params[i]] for i in firsts], dtype=torch.int64, device="cpu")
        self._chunks = ops.count_chunks(row.numel() for row in self.rows)
        self._look = look_at(params, self.offsets)
        if isinstance(self._look, Held) and self._flat_grads is None and getattr(backend, "takes_held", False):
            self.rows = []
        self.partials = torch.empty(self._chunks * ops.STATISTICS, dtype=flat.state_dtype, device=flat.device)
        self.effect: Tensor | None = None
        if "step" in flat.names:
            others = sorted(set(range(len(params))).difference(firsts))
            self.step_index = torch.tensor([index[i] for i in [*firsts, *others]], dtype=torch.int64).to(flat.device)
            self.corrections = torch.empty(len(firsts), 2, dtype=flat.state_dtype, device=flat.device)

    def current_grads(self, params: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """The gradients that ``params`` have now, as the ops take them: none where the rows are held.

        Returns None where this segment does not describe them any more.

        The caller drops the list after the pass: a segment that kept it would keep cleared gradients alive.
        """
        if not self._known.are(params):
            return None
        if self._flat_grads is not None:
            return self._flat_grads if self._look.in_place() else None
        if self._registry_generation != REGISTRY.generation or not self._look.have_grads():
            return None
        if not self.rows:
            return []
        grads = current_grads(params)
        if self._sharded:
            return local_grads(params, grads) if same_objects(self.rows, list(map(local, params))) else None
        return grads

    def zero_flat_grads(self, params: Sequence[Tensor]) -> bool:
        """Zeroes the gradients of ``params`` where whole runs of them are this segment's rows; else returns False.

        Frozen ones have no gradient to zero, or False is returned.
        """
        if self._flat_grads is None:
            return False
        trainable = list(filter(_REQUIRES_GRAD, params))
        if len(trainable) < len(params) and any(p.grad is not None for p in params if not p.requires_grad):
            return False
        grads = self.current_grads(trainable)
        for grad in grads or ():
            grad.zero_()
        return grads is not None

    def have_their_forms(self) -> bool:
        """Whether parameters are laid out as they were when this was made, so that the rows describe them."""
        return self._look.have_their_forms(self._flat_grads is not None)

    def restore_one_by_one(self, saved: Tensor) -> list[Tensor]:
        """Restores parameters that were cast, reshaped or moved meanwhile; returns those that were resized."""
        resized = []
        for param in self.params:
            part, before = local(param), self.flat.saved_part(param, saved)
            if part.numel() == before.numel():
                part.copy_(before.reshape(part.shape))
            else:
                resized.append(param)
        return resized

    def measure_effect(self) -> None:
        """Has pass B count what rounding leaves of the perturbation."""
        self.effect = torch.zeros(self._chunks * ops.EFFECT, dtype=self.flat.state_dtype, device=self.flat.device)

    def written(self) -> None:
        """Tells autograd that the weights moved: a graph made before is of no use now."""
        self._look.written()
        if self._gathered is not None:  # FSDP has copies of its own
            torch.autograd.graph.increment_version(self.rows)
            self._gathered.give_up()


def _are_flattened(params: Sequence[Tensor]) -> bool:
    """Whether parameters and gradients are where ``flatten_parameters(module, grads=True)`` put them."""
    return all((flat := REGISTRY.get(param)) is not None and flat.holds_grad(param) for param in params)


def _steps_agree(flat: FlatState, index: list[int]) -> bool:
    """Whether one step count can stand for all: asked when a segment is made, not in a step."""
    steps = flat.find("step")
    if steps is None:
        return True
    steps = steps[torch.tensor(index, device=steps.device)]
    return bool((steps == steps[0]).all())


def _starts_of_runs(flat: FlatState, params: Sequence[Tensor]) -> list[int]:
    """Where a parameter does not follow its predecessor both in the flat parameters and in the flat state."""
    starts = [0]
    for i in range(1, len(params)):
        before, param = params[i - 1], params[i]
        owner = REGISTRY.get(before)
        step = aligned_numel(before.numel(), before.dtype)
        if not (
            REGISTRY.get(param) is owner
            and owner.offset[param] == owner.offset[before] + step
            and flat.offset[param] == flat.offset[before] + step
        ):
            starts.append(i)
    return starts


def _merged(params: Sequence[Tensor], starts: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The runs as rows: (parameters, gradients). The padding between slices is zero and stays zero."""
    rows, grads = [], []
    for start, stop in zip(starts, [*starts[1:], len(params)], strict=True):
        owner, last = REGISTRY.get(params[start]), params[stop - 1]
        begin, end = owner.offset[params[start]], owner.offset[last] + last.numel()
        rows.append(owner.data[begin:end])
        grads.append(owner.grad[begin:end])
    return rows, grads
