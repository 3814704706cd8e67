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


class OtherNorm(nn.Module):
    """A normalisation layer of another package: no subclass of torch's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(6))

    def forward(self, x):
        if self.training:
            self.running_mean.lerp_(x.detach().mean(0), 0.1)
        return x - x.mean(0)


def normalised():
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))


WITHOUT_A_SWITCH = {
    "scripted": lambda: torch.jit.script(normalised()),
    "traced": lambda: torch.jit.trace(normalised(), torch.randn(4, 6), check_trace=False),
    "compiled": lambda: torch.compile(normalised(), backend="eager"),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 40)),
    "spectral norm, the older one": lambda: nn.utils.spectral_norm(nn.Linear(6, 40)),
    "of another package": lambda: nn.Sequential(nn.Linear(6, 6), OtherNorm()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WITHOUT_A_SWITCH)
def test_layers_without_a_switch_get_their_buffers_back(name):
    model = WITHOUT_A_SWITCH[name]()
    model(torch.randn(8, 6))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with freeze_stats(model):
        model(torch.randn(8, 6) + 1).sum().backward()
    assert before and all(identical(buffer, before[name]) for name, buffer in model.named_buffers())
    model(torch.randn(8, 6) + 1)
    assert not all(identical(buffer, before[name]) for name, buffer in model.named_buffers())
