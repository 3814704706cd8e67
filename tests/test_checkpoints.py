"""state_dict and load_state_dict: complete, exact, and open to checkpoints of other implementations."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from fsam_ext import FriendlySAM

from .conformance import identical
from .official import OfficialFriendlySAM
from .test_optimizer import BASES, batches, network, train, worst

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("base", ["sgd_momentum", "adamw"])
def test_through_torch_save_with_weights_only_bit_for_bit(base, dtype):
    base, kwargs = BASES[base]
    params = [nn.Parameter(torch.randn(50).to(dtype)) for _ in range(3)]
    optimizer = FriendlySAM(params, base, **kwargs)

    def steps(params, optimizer):
        generator = torch.Generator().manual_seed(3)
        for _ in range(5):
            for half in (optimizer.first_step, optimizer.second_step):
                for p in params:
                    p.grad = torch.randn(50, generator=generator).to(dtype)
                half()

    steps(params, optimizer)
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = FriendlySAM(twins, base, **kwargs)
    other.load_state_dict(torch.load(stream, weights_only=True))
    for p, q in zip(params, twins, strict=True):  # float32 state of bfloat16 parameters is not rounded
        assert other.state[q].keys() == optimizer.state[p].keys()
        assert all(identical(other.state[q][name], value) for name, value in optimizer.state[p].items())
    steps(params, optimizer)
    steps(twins, other)
    assert all(map(identical, params, twins))


def test_a_loaded_optimizer_does_not_share_memory_with_the_saved_one():
    model = network()
    optimizer = FriendlySAM(model.parameters(), SGD, lr=0.05, momentum=0.9)
    train(model, optimizer, batches(3))
    twin = copy.deepcopy(model)
    other = FriendlySAM(twin.parameters(), SGD, lr=0.05, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    before = [value.clone() for entry in other.state.values() for value in entry.values()]
    train(model, optimizer, batches(3))
    assert all(map(identical, before, [value for entry in other.state.values() for value in entry.values()]))


def test_a_checkpoint_of_the_official_code():
    """Its state_dict holds the average as `momentum`, copies of weights and gradients, and nothing of the base."""
    data = list(batches(10))
    official, mine = network(), network()
    reference = OfficialFriendlySAM(official.parameters(), SGD, rho=0.2, lr=0.05, weight_decay=1e-2)
    train(official, reference, data[:5])
    params = list(official.parameters())
    group = {
        "rho": 0.2,
        "adaptive": False,
        **{k: v for k, v in reference.base.param_groups[0].items() if k != "params"},
    }
    saved = {
        "state": {
            i: {"first_grad": p.grad.clone(), "momentum": reference.momentum[p], "old_p": reference.saved[p]}
            for i, p in enumerate(params)
        },
        "param_groups": [{**group, "params": list(range(len(params)))}],
    }
    optimizer = FriendlySAM(mine.parameters(), SGD, rho=0.7, sigma=1.0, lmbda=0.9, lr=1.0)
    mine.load_state_dict(official.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["rho"] == 0.2 and optimizer.param_groups[0]["lmbda"] == 0.9
    assert all(set(entry) == {"ema"} for entry in optimizer.state.values())
    train(official, reference, data[5:])
    train(mine, optimizer, data[5:])
    assert worst(official, mine) < 1e-12


@pytest.mark.parametrize("base", ["sgd_momentum", "adamw", "adam_amsgrad"])
def test_a_checkpoint_of_the_plain_torch_optimizer(base):
    """The base's state goes on; the average starts anew."""
    base, kwargs = BASES[base]
    mine, plain = network(), network()
    torch_optimizer = base(plain.parameters(), **kwargs)
    for p in plain.parameters():
        p.grad = torch.ones_like(p)
    torch_optimizer.step()
    mine.load_state_dict(plain.state_dict())
    optimizer = FriendlySAM(mine.parameters(), base, rho=0.0, **kwargs)
    optimizer.load_state_dict(torch_optimizer.state_dict())
    for _ in range(3):
        for p, q in zip(mine.parameters(), plain.parameters(), strict=True):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.first_step()
        optimizer.second_step()
        torch_optimizer.step()
    assert worst(plain, mine) < 1e-14


def test_sgd_without_momentum_saved_with_none():
    """torch.optim.SGD saves momentum_buffer=None before its first step with momentum."""
    p = nn.Parameter(torch.ones(3))
    optimizer = FriendlySAM([p], SGD, lr=0.1, momentum=0.9, dampening=0.5)
    saved = optimizer.state_dict()
    saved["state"] = {0: {"momentum_buffer": None}}
    optimizer.load_state_dict(saved)
    p.grad = torch.ones(3)
    optimizer.first_step()
    optimizer.second_step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.ones(3))
