"""state_dict and load_state_dict: complete, exact, and open to checkpoints of other implementations."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn

from fsam_ext import FriendlySAM
from fsam_ext.state.checkpoints import CURRENT_FORMAT
from fsam_ext.state.keys import FORMER_NAMES

from . import previous_formats
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
    assert all(set(entry) == {"fsam_ema"} for entry in optimizer.state.values())
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


@pytest.mark.parametrize("base, other", [(AdamW, torch.optim.Adam), (torch.optim.Adam, AdamW)])
def test_a_checkpoint_of_adam_in_a_run_with_adamw_has_the_decay_that_torchs_has(base, other):
    """AdamW.__setstate__ sets it, whatever the checkpoint says."""
    source = nn.Parameter(torch.ones(3))
    donor = other([source], lr=0.1, weight_decay=0.5)
    source.grad = torch.ones(3)
    donor.step()
    ours, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer, plain = FriendlySAM([ours], base, rho=0.0, lr=0.1), base([theirs], lr=0.1)
    for one in (optimizer, plain):
        one.load_state_dict(copy.deepcopy(donor.state_dict()))
    for _ in range(5):
        for half in (optimizer.first_step, optimizer.second_step):
            ours.grad = torch.full((3,), 0.5)
            half()
        theirs.grad = torch.full((3,), 0.5)
        plain.step()
    names = ("decoupled_weight_decay", "weight_decay", "lr")
    assert [optimizer.param_groups[0][n] for n in names] == [plain.param_groups[0][n] for n in names]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ema_dtype", (None, torch.bfloat16, torch.int8))
def test_an_average_outlives_steps_with_sigma_0_and_a_checkpoint_among_them(ema_dtype):
    def run(resume):
        generator = torch.Generator().manual_seed(0)
        param = nn.Parameter(torch.zeros(300))
        optimizer = FriendlySAM([param], SGD, lr=0.1, ema_dtype=ema_dtype)
        seen = []
        for sigma in (1.0, 1.0, 0.0, 0.0, 1.0, 1.0):
            optimizer.param_groups[0]["sigma"] = sigma
            for half in (optimizer.first_step, optimizer.second_step):
                param.grad = torch.randn(300, generator=generator)
                half()
                seen.append(param.detach().clone())
            if resume:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = FriendlySAM([param], SGD, lr=0.1, ema_dtype=ema_dtype)
                optimizer.load_state_dict(saved)
        return [*seen, *(value for _, value in sorted(optimizer.state[param].items()))]

    uninterrupted, resumed = run(False), run(True)
    assert len(uninterrupted) == len(resumed) > 12 and all(map(identical, uninterrupted, resumed))


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


# ---- Formats, and what is no checkpoint ------------------------------------------------------------------------------

FILES = sorted((Path(__file__).parent / "checkpoints").glob("format*.pt"))


def test_every_earlier_format_has_a_file():
    assert [file.stem for file in FILES] == [f"format{number}" for number in range(CURRENT_FORMAT)]


@pytest.mark.parametrize("name", previous_formats.CASES)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_earlier_format_goes_on_where_it_was(file, name):
    saved = torch.load(file, weights_only=True)[name]
    params, optimizer = previous_formats.make(name)
    with torch.no_grad():
        torch._foreach_copy_(params, saved["weights"])
    optimizer.load_state_dict(saved["optimizer"])
    for i, p in enumerate(params):
        state = saved["optimizer"]["state"][i]
        assert optimizer.state[p].keys() == {FORMER_NAMES.get(key, key) for key in state}
        assert all(identical(optimizer.state[p][FORMER_NAMES.get(key, key)], value) for key, value in state.items())
    previous_formats.train(params, optimizer, previous_formats.BEFORE, previous_formats.AFTER)
    assert all(map(identical, params, saved["later"]))  # on every machine: no fused multiply-add
    assert optimizer.state_dict()["param_groups"][0]["fsam_format"] == CURRENT_FORMAT


def trained(base=AdamW):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    optimizer = FriendlySAM(params, base, lr=0.1)
    for half in (optimizer.first_step, optimizer.second_step):
        for p in params:
            p.grad = torch.ones_like(p)
        half()
    return params, optimizer


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda saved: [saved], "an optimizer's state_dict has 'state' and 'param_groups'; this is <class 'list'>"),
        (lambda saved: {"model": {}, "optimizer": saved}, "this is a dict with 'model', 'optimizer'"),
        (lambda saved: {"state": saved["state"]}, "this is a dict with 'state'"),
        (lambda saved: saved["param_groups"][0].update(fsam_format=99), "format 99, and this release .* up to 2"),
        (lambda saved: saved["state"][1].pop("exp_avg_sq"), "'exp_avg_sq' of parameter 1 .* missing .*'exp_avg'"),
        (lambda saved: saved["state"][1].update(exp_avg=torch.ones(4)), r"'exp_avg' of parameter 1 .*shape \(4,\)"),
        (
            lambda saved: saved["state"][0].update(fsam_ema=1.0),
            "'fsam_ema' of parameter 0 .* is float in the check",
        ),
        (lambda saved: saved["param_groups"][0].update(lmbda=2.0), r"lmbda must be a number in \[0, 1\), not 2.0"),
        (lambda saved: saved["param_groups"][0]["params"].pop(), "doesn't match the size"),
    ],
)
def test_what_cannot_be_loaded_changes_nothing_and_says_why(damage, message):
    params, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    damaged = damage(saved)
    if not isinstance(damaged, (list, dict)) or "exp_avg" in damaged:
        damaged = saved
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(damaged)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, entry in before["state"].items():
        assert all(identical(after["state"][key][name], value) for name, value in entry.items())


def test_plain_sgd_and_adamw_go_on_from_an_exported_state():
    from fsam_ext.state.checkpoints import to_torch

    for name, base in (("sgd", SGD), ("adamw", AdamW)):
        params, optimizer = previous_formats.make(name)
        previous_formats.train(params, optimizer, 0, 5)
        kwargs = previous_formats.CASES[name][2]
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        plain = base(twins, lr=1.0)
        plain.load_state_dict(copy.deepcopy(to_torch(optimizer.state_dict())))
        assert plain.param_groups[0]["lr"] == kwargs["lr"] and "rho" not in plain.param_groups[0]
        for group in optimizer.param_groups:
            group["rho"] = 0.0
        for _ in range(3):
            for half in (optimizer.first_step, optimizer.second_step):
                for p, q in zip(params, twins, strict=True):
                    p.grad, q.grad = p.detach().sin(), q.detach().sin()
                half()
            plain.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-14)
