"""Keeps the running statistics of normalisation layers out of the second pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


def _puts_back(layer: nn.Module) -> bool:
    """Whether a layer's buffers change in a forward pass and have no switch, so that they are put back afterwards."""
    if isinstance(layer, _BatchNorm | _InstanceNorm):
        return False
    if isinstance(layer, torch.jit.ScriptModule | _SpectralNorm):
        return True
    if any(isinstance(hook, SpectralNorm) for hook in layer._forward_pre_hooks.values()):
        return True
    return not _STATISTICS.isdisjoint(name for name, _ in layer.named_buffers(recurse=False))


def _changing(layers: Iterable[nn.Module]) -> list[Tensor]:
    return [buffer for layer in layers if _puts_back(layer) for buffer in layer.buffers(recurse=False)]


@contextmanager
def freeze_stats(model: nn.Module) -> Iterator[None]:
    """Within the block, normalisation layers do not update their running statistics.

    The perturbed forward pass would feed each batch a second time, at weights that are never used. The layers still
    normalise with the statistics of the batch, so gradients are the same with and without the block. For BatchNorm it
    switches ``track_running_stats`` and nothing else: setting ``momentum`` to 0 would still count the batch, and breaks
    layers whose ``momentum`` is None. InstanceNorm ignores that switch while it trains, so its statistics are taken
    away for the time of the block. Where there is no switch (scripted and traced modules, spectral norm, normalisation
    layers of other packages), the buffers get their values back when the block ends.

    Args:
        model: every layer in it with running statistics is frozen, those in eval mode excepted.

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
    kept = [(buffer, buffer.clone()) for buffer in _changing(layer for layer in model.modules() if layer.training)]
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
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
