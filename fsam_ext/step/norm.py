"""Pass A: the sums over all participants, on all ranks, that the norm and the statistics are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import ops
from ..state.keys import EMA, EMA_SCALE, uses_ema
from . import distributed
from .layout import Participant
from .segments import Segment


def average(group: dict[str, Any], segment: Segment) -> tuple[Tensor | None, Tensor | None]:
    """The flat average of a segment, and its scales where it is quantized."""
    flat = segment.flat
    if not uses_ema(group):
        return None, None
    return flat.buffer(EMA), flat.buffer(EMA_SCALE) if flat.quantized else None


class Norm:
    """The sums of pass A, which stay on the devices.

    Attributes:
        totals: device -> [sum |d|^2, sum |g|^2, sum g m, sum |m|^2, number of non-finite g] over all participants.
    """

    def __init__(self) -> None:
        self.totals: dict[torch.device, Tensor] = {}
        self._stats: dict[torch.device, tuple[Tensor, list[Tensor]]] = {}

    def measure(
        self,
        participants: Sequence[Participant],
        meshes: dict[Any, torch.device],
        scales: Mapping[torch.device, Tensor | None],
        call: Callable[..., None],
    ) -> None:
        """Runs pass A.

        Args:
            meshes: those that any parameter lies on: distributed.py, NOTE [who takes part in the norm].
            scales: what gradients are divided by.
            call: runs an op on a segment.
        """
        sums = []
        totals: dict[torch.device, Tensor] = {}
        devices: dict[torch.device, list[Participant]] = {}
        for participant in participants:
            devices.setdefault(participant.segment.flat.device, []).append(participant)
        for device, members in devices.items():
            stats, rows = self._rows(device, len(members))
            for member, row in zip(members, rows, strict=True):
                call(member.segment, *self._pass_a(member, scales.get(device), row))
            if meshes:
                sums += [(one.segment.flat.kind.sharding, row) for one, row in zip(members, rows)]
            else:
                totals[device] = rows[0] if len(rows) == 1 else stats.sum(0)
        if meshes:
            total = distributed.total(meshes, sums, ops.STATISTICS)
            totals = {device: total.to(device) for device in (*devices, total.device)}
        elif len(totals) > 1:
            first, *others = totals
            total = sum((totals[d].to(first) for d in others), totals[first])
            totals = {device: total.to(device) for device in totals}
        self.totals = totals

    def _rows(self, device: torch.device, count: int) -> tuple[Tensor, list[Tensor]]:
        """Room for the sums of ``count`` segments: the same in each step, for a CUDA graph and for the allocator."""
        if device not in self._stats or len(self._stats[device][1]) != count:
            stats = torch.empty(count, ops.STATISTICS, dtype=torch.float64, device=device)
            self._stats[device] = stats, list(stats)
        return self._stats[device]

    @staticmethod
    def _pass_a(member: Participant, grad_scale: Tensor | None, row: Tensor) -> tuple[Any, ...]:
        group, segment, grads = member
        return (
            ops.noise_norm,
            segment.backend,
            segment.rows,
            grads,
            segment.offsets,
            *average(group, segment),
            grad_scale,
            group["sigma"],
            group["lmbda"],
            group["adaptive"],
            group["ema"] == "updated",
            segment.partials,
            row,
        )

    def on(self, device: torch.device) -> Tensor:
        """The sums on a device; zeros where no gradient took part in the ascent."""
        if device not in self.totals:
            known = next(iter(self.totals.values()), torch.zeros(ops.STATISTICS, dtype=torch.float64, device="cpu"))
            self.totals[device] = known.to(device)
        return self.totals[device]
