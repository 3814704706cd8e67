"""Friendly Sharpness-Aware Minimization as a fused PyTorch optimizer: change one import."""

from ._version import __version__
from .batch_norm import freeze_stats
from .distributed import clip_grad_norm_
from .flatten import FlatParameters, flatten_parameters
from .optimizer import SAM, FriendlySAM

__all__ = [
    "SAM",
    "FlatParameters",
    "FriendlySAM",
    "__version__",
    "clip_grad_norm_",
    "flatten_parameters",
    "freeze_stats",
]
