"""The random numbers of stochastic rounding follow from a seed and the number of the step, kept on each device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.capture import capturing

_VERSION = Tensor._version.__get__


class Rounding:
    """[seed, number of the step], int64, on each device that asks for it.

    A graph has to count by itself, so :meth:`advance` adds on the device. An interrupt may have that done twice or not
    at all: after one, the tensor's own version counter tells how often it was, and a wrong number is set anew.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._numbers: dict[torch.device, Tensor] = {}
        self._noted: dict[torch.device, tuple[int, int]] = {}  # (number of the step, version)
        self._doubtful = False

    def on(self, device: torch.device, step: int) -> Tensor:
        """The numbers of a step on a device."""
        numbers = self._numbers.get(device)
        if numbers is None:
            numbers = torch.tensor([self.seed, step], dtype=torch.int64, device="cpu").to(device)
            self._noted[device] = step, _VERSION(numbers)
            self._numbers[device] = numbers
        if self._doubtful and not capturing(device):
            self._check(step)
        return numbers

    def _check(self, step: int) -> None:
        for device, numbers in self._numbers.items():
            noted, version = self._noted[device]
            if noted + _VERSION(numbers) - version != step:
                numbers[1].fill_(step)
                self._noted[device] = step, _VERSION(numbers)
        self._doubtful = False

    def interrupted(self) -> None:
        """An exception may have come at any line."""
        self._doubtful = True

    def advance(self) -> None:
        """The step is over."""
        for numbers in self._numbers.values():
            numbers[1].add_(1)
