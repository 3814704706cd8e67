"""Keeps the running statistics of normalisation layers out of the second pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


@contextmanager
def freeze_stats(model: nn.Module) -> Iterator[None]:
    """Within the block, normalisation layers do not update their running statistics.

    The perturbed forward pass would feed each batch a second time, at weights that are never used. The layers still
    normalise with the statistics of the batch, so gradients are the same with and without the block. For BatchNorm it
    switches ``track_running_stats`` and nothing else: setting ``momentum`` to 0 would still count the batch, and breaks
    layers whose ``momentum`` is None. InstanceNorm ignores that switch while it trains, so its statistics are taken
    away for the time of the block.

    Args:
        model: every BatchNorm, SyncBatchNorm and InstanceNorm layer in it is frozen, those in eval mode excepted.

    Example::

        with optimizer.perturbed(), freeze_stats(model):
            loss(model(inputs), targets).backward()
    """
    tracking = [
        layer
        for layer in model.modules()
        if isinstance(layer, _BatchNorm | _InstanceNorm) and layer.training and layer.track_running_stats
    ]
    statistics = [
        (layer, layer.running_mean, layer.running_var) for layer in tracking if isinstance(layer, _InstanceNorm)
    ]
    try:
        for layer in tracking:
            layer.track_running_stats = False
        for layer, _, _ in statistics:
            layer.running_mean = layer.running_var = None
        yield
    finally:
        for layer in tracking:
            layer.track_running_stats = True
        for layer, mean, variance in statistics:
            layer.running_mean, layer.running_var = mean, variance
