"""Sums over all participants of a pass, on all ranks, that stay on the devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .layout import Participant


class Sums:
    """Room for the sums of each segment, and what they come to.

    Args:
        size: how many sums an op gives at once; float64.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._known: dict[torch.device, tuple[Tensor, list[Tensor]]] = {}

    def rows(self, participants: Sequence[Participant]) -> list[Tensor]:
        """Where the sums of each go: the same in each step, for a CUDA graph and for the allocator."""
        if len(participants) == 1:  # as nearly always
            return self._of(participants[0].segment.flat.device, 1)
        by_device = {device: iter(self._of(device, len(own))) for device, own in _by_device(participants).items()}
        return [next(by_device[one.segment.flat.device]) for one in participants]

    def _of(self, device: torch.device, count: int) -> list[Tensor]:
        block, rows = self._known.get(device, (None, []))
        if block is None or len(rows) != count:
            block = torch.empty(count, self._size, dtype=torch.float64, device=device)
            rows = list(block)
            self._known[device] = block, rows
        return rows

    def total(self, participants: Sequence[Participant], meshes: dict[Any, torch.device]) -> dict[torch.device, Tensor]:
        """The sums over all of :meth:`rows`, on each device; of one row it is that row itself.

        Args:
            meshes: those that any parameter of an ascent lies on: distributed.py, NOTE [who takes part in the norm].
        """
        if len(participants) == 1 and not meshes:
            device = participants[0].segment.flat.device
            return {device: self._known[device][1][0]}
        devices = _by_device(participants)
        if meshes:
            rows = [row.clone() for row in self.rows(participants)]  # what is given is overwritten
            parts = [(one.segment.flat.kind.sharding, row) for one, row in zip(participants, rows, strict=True)]
            total = distributed.total(meshes, parts, self._size)
            return {device: total.to(device) for device in (*devices, total.device)}
        totals = {}
        for device in devices:
            block, rows = self._known[device]
            totals[device] = rows[0] if len(rows) == 1 else block.sum(0)
        if len(totals) > 1:
            first, *others = totals
            total = sum((totals[d].to(first) for d in others), totals[first])
            totals = {device: total.to(device) for device in totals}
        return totals


def _by_device(participants: Sequence[Participant]) -> dict[torch.device, list[Participant]]:
    devices: dict[torch.device, list[Participant]] = {}
    for participant in participants:
        devices.setdefault(participant.segment.flat.device, []).append(participant)
    return devices
