"""freeze_stats: the second pass leaves running statistics alone and changes no gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fsam_ext import freeze_stats

from .conformance import identical


def layers():
    return [
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, momentum=None),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.InstanceNorm1d(4, track_running_stats=True),
        nn.InstanceNorm1d(4),
        nn.SyncBatchNorm(4),
    ]


@pytest.mark.parametrize("index", range(5))
def test_statistics_are_kept_exactly_and_gradients_are_the_same(index):
    layer = layers()[index].double()
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    layer(torch.randn_like(x))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    grads = []
    for frozen in (True, False):
        y = x.clone().requires_grad_()
        if frozen:
            with freeze_stats(layer):
                layer(y).square().sum().backward()
            assert layer.state_dict().keys() == before.keys()
            assert all(identical(value, before[name]) for name, value in layer.state_dict().items())
        else:
            layer(y).square().sum().backward()
        grads.append(y.grad)
    assert identical(*grads)
    moved = any(not identical(value, before[name]) for name, value in layer.state_dict().items() if "run" in name)
    assert moved == bool(before.keys() & {"running_mean"})  # the second, unfrozen pass shows that the test can fail


def test_restored_after_an_exception_and_eval_mode_is_left_alone():
    model = nn.Sequential(*layers())
    model[0].eval()
    flags = [layer.track_running_stats for layer in model]
    buffers = [id(buffer) for buffer in model.buffers()]
    with pytest.raises(ZeroDivisionError), freeze_stats(model):
        assert model[0].track_running_stats and not model[1].track_running_stats
        raise ZeroDivisionError
    assert [layer.track_running_stats for layer in model] == flags
    assert [id(buffer) for buffer in model.buffers()] == buffers
