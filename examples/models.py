"""The nets of the demo, by name, each with what suits its size."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import NamedTuple

from data import CLASSES
from torch import nn


def mlp(pixels: int) -> nn.Module:
    return nn.Sequential(nn.Linear(pixels, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, CLASSES))


def cnn(pixels: int) -> nn.Module:
    """Two convolutions and a hidden layer, all with BatchNorm, for square images of one channel."""
    side = isqrt(pixels)
    quarter = (side + 3) // 4  # each convolution of stride 2 halves the side, rounded up

    def convolution(inputs: int, outputs: int) -> list[nn.Module]:
        kernel = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        return [kernel, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        *convolution(1, 8),
        *convolution(8, 16),
        nn.Flatten(),
        nn.Linear(16 * quarter**2, 128, bias=False),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, CLASSES),
    )


class Architecture(NamedTuple):
    build: Callable[[int], nn.Module]  # called with the number of pixels
    epochs: int


ARCHITECTURES = {
    "mlp": Architecture(mlp, epochs=30),
    "cnn": Architecture(cnn, epochs=15),
}
