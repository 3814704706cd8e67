"""Friendly Sharpness-Aware Minimization as a fused PyTorch optimizer: change one import."""

from ._version import __version__
from .batch_norm import freeze_stats
from .flatten import FlatParameters, flatten_parameters
from .optimizer import SAM, FriendlySAM

__all__ = [
    "SAM",
    "FlatParameters",
    "FriendlySAM",
    "__version__",
    "flatten_parameters",
    "freeze_stats",
]
