"""Pass A: the sums over all participants that the norm and the statistics are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import ops
from ..state.keys import EMA, EMA_SCALE, uses_ema
from .layout import Participant
from .segments import Segment
from .sums import Sums


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
        self._sums = Sums(ops.STATISTICS)

    def measure(
        self,
        participants: Sequence[Participant],
        meshes: dict[Any, torch.device],
        scales: Mapping[torch.device, Tensor | None],
    ) -> None:
        """Runs pass A.

        Args:
            meshes: those that any parameter of an ascent lies on: distributed.py, NOTE [who takes part in the norm].
            scales: what gradients are divided by.
        """
        for (group, segment, grads), row in zip(participants, self._sums.rows(participants), strict=True):
            ops.noise_norm(
                segment.backend,
                segment.rows,
                grads,
                segment.offsets,
                *average(group, segment),
                scales.get(segment.flat.device),
                group["sigma"],
                group["lmbda"],
                group["adaptive"],
                group["ema"] == "updated",
                segment.partials,
                row,
            )
        self.totals = self._sums.total(participants, meshes)

    def on(self, device: torch.device) -> Tensor:
        """The sums on a device; zeros where no gradient took part in the ascent."""
        found = self.totals.get(device)
        if found is None:
            known = next(iter(self.totals.values()), torch.zeros(ops.STATISTICS, dtype=torch.float64, device="cpu"))
            found = self.totals[device] = known.to(device)
        return found
