"""Copies of weights that autocast and parametrizations keep for a while: they are of no use once the weights moved."""

from __future__ import annotations

import torch
from torch.nn.utils import parametrize


def forget_casts() -> None:
    """Has the next forward pass see the weights as they are.

    A block of autocast keeps the 16-bit copy of a weight until it ends, and ``parametrize.cached()`` what it computed
    from one: both passes of a step in one such block would see the weights of the first.
    """
    torch.clear_autocast_cache()
    if parametrize._cache_enabled:
        parametrize._cache.clear()
