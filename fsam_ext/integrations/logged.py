"""What adapters log of an ascent, and under which names."""

from __future__ import annotations

from torch import Tensor

from ..optimizer import FriendlySAM

_NAMES = ("noise_norm", "grad_norm", "cosine", "effective_cosine", "found_inf")


def logged(optimizer: FriendlySAM) -> dict[str, Tensor]:
    """Of :meth:`fsam_ext.FriendlySAM.stats`, as "fsam/...": 0-d float tensors. Reading one waits for the device."""
    stats = optimizer.stats()
    return {f"fsam/{name}": stats[name].float() for name in _NAMES if name in stats}
