"""No peer of the benchmark waits for the device within a step: that would flatter whoever does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.peers import BASES, BaseOnly, Compiled, Foreach, Official, Plain, Provider, PytorchOptimizer, SamByHand
from bench.providers import PACKAGE, all_providers, missing_providers

from .host_waits import HostWaits

CPU = torch.device("cpu")
PEERS = [Official, SamByHand, Foreach, BaseOnly, Plain]
if PACKAGE not in missing_providers(CPU):
    PEERS.append(PytorchOptimizer)


def parameters(device: str) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones(shape, device=device)) for shape in ((3, 4), (5,), (2, 2, 2))]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def waits_of(kind: type[Provider], base: str) -> list[str]:
    """Of three steps on a GPU that is not there, the first one included."""
    with FakeTensorMode(), HostWaits("cuda") as waits:
        provider = kind(parameters("cuda"), BASES[base])
        for _ in range(3):
            provider.ascend()
            provider.descend()
    return waits.found


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", PEERS, ids=lambda kind: kind.name)
def test_a_peers_step_does_not_wait_for_the_device(kind, base):
    assert waits_of(kind, base) == []


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["fsam_ext", "fsam_ext flat", "fsam_ext int8", "sam", "fsam_ext reference"])
def test_our_own_step_reads_nothing_back_once_its_state_is_made(name, base):
    """Kernels need memory, so these are real tensors: of a CPU, taken for a device's."""
    params = parameters("cpu")
    provider = all_providers(CPU)[name](params, BASES[base])
    provider.ascend()
    provider.descend()
    with HostWaits("cpu") as waits:
        for _ in range(3):
            provider.ascend()
            provider.descend()
    assert waits.found == []


@pytest.mark.parametrize("base", BASES)
def test_what_the_compiled_peer_compiles_does_not_wait_for_the_device(base, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert waits_of(Compiled, base) == []


class LerpOfATensor(Foreach):
    """As the peer once was: a weight on the device."""

    def _ascent(self, params, grads, average, saved):
        torch._foreach_lerp_(average, grads, torch.full((), 0.1, device=average[0].device))


class NormOnTheHost(Official):
    def descend(self):
        torch.stack([p.grad.norm() for p in self.params]).cpu()


class BranchOnAValue(Official):
    def descend(self):
        if torch.stack([p.grad.norm() for p in self.params]).isfinite().all():
            self.base.step()


@pytest.mark.parametrize("kind", [LerpOfATensor, NormOnTheHost, BranchOnAValue])
def test_a_step_that_waits_is_found_in_each_step(kind):
    assert len(waits_of(kind, "sgd")) == 3
