"""What the steps between two ascents reuse of the second gradient.

csrc/formulas.h, NOTE [reuse of the second gradient]. An ascending step makes v, whose elements are state; a step
between two ascents reads it. Of v's norm the first group keeps the square, because a checkpoint has to have it to the
bit, and whatever makes v useless sets it to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import ops
from ..state.keys import REUSE, REUSE_SQ, uses_ema, uses_reuse
from ..state.shards import local
from .layout import Participant
from .norm import Norm, average
from .segments import Guards, Segment
from .sums import Sums

Meshes = dict[Any, torch.device]


class Reused(NamedTuple):
    """What the update of a step between two ascents adds to a gradient, as the ops take it."""

    buffer: Tensor
    norms_sq: Tensor
    reuse: float
    eps: float


def _rows_of(segment: Segment, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    """What the ops of reuse take first."""
    return segment.backend, segment.rows, grads, segment.offsets


class Reuse:
    """The norms and products that reuse needs; they stay on the devices."""

    def __init__(self) -> None:
        self._products = Sums(2)  # <g2, g1>, <g1, g1>
        self._totals: dict[torch.device, Tensor] = {}
        self._kept = Sums(1)  # |v|^2
        self._grads = Sums(1)  # |g|^2
        self._statistics = Sums(ops.STATISTICS)
        self._norms_sq: dict[torch.device, Tensor] = {}  # |g|^2, |v|^2
        self._stored: Any = None

    def norms_sq(self, device: torch.device, groups: list[dict[str, Any]]) -> Tensor:
        """[|g|^2, |v|^2], of which the first group has the second."""
        stored = groups[0].get(REUSE_SQ, 0.0)
        if device not in self._norms_sq or stored is not self._stored:
            self._norms_sq.setdefault(device, torch.zeros(2, dtype=torch.float64, device=device))
            for pair in self._norms_sq.values():
                pair[1:].copy_(stored) if isinstance(stored, Tensor) else pair[1:].fill_(stored)
            self._stored = groups[0][REUSE_SQ] = next(iter(self._norms_sq.values()))[1:]
        return self._norms_sq[device]

    def plan(
        self,
        groups: list[dict[str, Any]],
        state: Any,
        participants: Sequence[Participant],
        meshes: Meshes,
        guards: Mapping[torch.device, Guards],
        ascended: Sequence[Segment] | None,
        norm: Norm,
        journal: Tensor,
    ) -> tuple[list[Callable[[], None]], Callable[[], None] | None, Callable[[], None]]:
        """(ops before an update, what to call between them and it, what to call after it, twice if need be).

        Args:
            ascended: the segments of the ascent, or None for a step between two.
            norm: of the ascent.
        """
        members = [one for one in participants if one.segment.flat.kind.reuse_dtype is not None]
        if ascended is None:
            run, settle = self._feed(members, groups, meshes, guards, journal)
            return run, settle, settle
        self._measure(members, ascended, state, meshes, guards)
        run = self._project(members, guards, journal)
        return run, None, partial(self._made, members, groups, meshes, norm)

    # ---- An ascending step -----------------------------------------------------------------------------------------

    def kept(self, member: Participant, groups: list[dict[str, Any]]) -> Tensor | None:
        """Where pass B keeps a segment's first gradient."""
        flat = member.segment.flat
        if flat.kind.reuse_dtype is None:
            return None
        self.norms_sq(flat.device, groups)
        return flat.buffer(REUSE)

    def dropped(self, norm: Norm) -> None:
        """An ascent is given up: where it was finite, the first gradient is in the place of v."""
        for device, pair in self._norms_sq.items():
            pair[1:].copy_(torch.where(norm.on(device)[:1].isfinite(), 0.0, pair[1:]))

    def _measure(
        self,
        members: Sequence[Participant],
        ascended: Sequence[Segment],
        state: Any,
        meshes: Meshes,
        guards: Mapping[torch.device, Guards],
    ) -> None:
        """The products of both gradients, before anything is written.

        A gradient that a parameter has in one of the two passes only counts as zero in the other.
        """
        first = {param: None for one in ascended if one.flat.kind.reuse_dtype is not None for param in one.params}
        second = {param: None for one in members for param in one.segment.params}
        for param in first.keys() ^ second.keys():
            kept = state.get(param, {}).get(REUSE)  # a group may keep nothing any more
            if kept is not None:
                local(kept).zero_()
        for (_, segment, grads), row in zip(members, self._products.rows(members), strict=True):
            scale = guards[segment.flat.device].grad_scale
            ops.dots(*_rows_of(segment, grads), segment.flat.buffer(REUSE), scale, segment.partials, row)
        self._totals = self._products.total(members, meshes)

    def _project(
        self,
        members: Sequence[Participant],
        guards: Mapping[torch.device, Guards],
        journal: Tensor,
    ) -> list[Callable[[], None]]:
        """The ops that make v of what pass B kept."""
        made = []
        for (_, segment, grads), row in zip(members, self._kept.rows(members), strict=True):
            device = segment.flat.device
            where = (*_rows_of(segment, grads), segment.flat.buffer(REUSE))
            rest = (self._totals[device], *guards[device], segment.partials, row, journal)
            made.append(partial(ops.project, *where, *rest))
        return made

    def _made(self, members: Sequence[Participant], groups: list[dict[str, Any]], meshes: Meshes, norm: Norm) -> None:
        """After :meth:`_project`: |v|^2, over all parameters and ranks.

        After an ascent that was not finite v is what it was. NaN after another one says that there is none.
        """
        totals = self._kept.total(members, meshes)
        if not totals:
            return
        for device in totals:
            self.norms_sq(device, groups)
        for device, pair in self._norms_sq.items():
            total = totals[device] if device in totals else next(iter(totals.values())).to(device)
            pair[1:].copy_(torch.where(norm.on(device)[:1].isfinite(), total.nan_to_num(0.0, torch.inf), pair[1:]))

    # ---- A step between two ascents --------------------------------------------------------------------------------

    def _feed(
        self,
        members: Sequence[Participant],
        groups: list[dict[str, Any]],
        meshes: Meshes,
        guards: Mapping[torch.device, Guards],
        journal: Tensor,
    ) -> tuple[list[Callable[[], None]], Callable[[], None]]:
        """(the ops that let averages see the gradients and sum |g|^2, what is to be called before :class:`Reused`).

        Without an average the sum is taken at once.
        """
        rows = self._grads.rows(members)
        alone = len(members) == 1 and not meshes
        if alone:
            rows = [self.norms_sq(members[0].segment.flat.device, groups)[:1]]
        feeding = []
        for (group, segment, grads), row, scratch in zip(members, rows, self._statistics.rows(members), strict=True):
            where, guard = _rows_of(segment, grads), guards[segment.flat.device]
            if uses_ema(group):
                what = (*average(group, segment), *guard, group["lmbda"], journal, segment.partials, row)
                feeding.append(partial(ops.update_ema, *where, *what))
            else:
                what = (None, None, guard.grad_scale, 0.0, 0.0, False, False, segment.partials, scratch)
                ops.noise_norm(*where, *what)
                row.copy_(scratch[1:2])
        done = [alone]

        def settle() -> None:
            if not done[0]:
                for device, total in self._grads.total(members, meshes).items():
                    self.norms_sq(device, groups)[:1].copy_(total)
            done[0] = True

        return feeding, settle

    def reused(self, member: Participant, groups: list[dict[str, Any]]) -> Reused | None:
        """What a member's update adds to its gradient."""
        group, segment, _ = member
        if not uses_reuse(group):
            return None
        pair = self.norms_sq(segment.flat.device, groups)
        return Reused(segment.flat.buffer(REUSE), pair, group["reuse"], group["perturb_eps"])
