"""Random numbers that are drawn twice: both passes of a step may see the same dropout masks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class RandomState:
    """The state of the random numbers on the CPU and on the devices of some tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
        self._devices = {device: torch.cuda.get_rng_state(device) for device in devices}

    def replay(self) -> None:
        """Has the same numbers drawn again, dropout masks among them."""
        torch.set_rng_state(self._cpu)
        for device, state in self._devices.items():
            torch.cuda.set_rng_state(state, device)
