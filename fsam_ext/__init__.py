"""Friendly Sharpness-Aware Minimization as a fused PyTorch optimizer: change one import."""

from ._version import __version__
from .batch_norm import freeze_stats
from .optimizer import FriendlySAM
from .sam import SAM
from .second_pass import SecondPass
from .state.flatten import FlatParameters, flatten_parameters
from .step.distributed import clip_grad_norm_

__all__ = [
    "SAM",
    "FlatParameters",
    "FriendlySAM",
    "SecondPass",
    "__version__",
    "clip_grad_norm_",
    "flatten_parameters",
    "freeze_stats",
]
