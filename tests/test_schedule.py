"""Ascents in some steps only: which ones, what the others do, and that a resumed run keeps counting."""

from __future__ import annotations

import copy

import pytest
import torch

from fsam_ext import SAM, FriendlySAM
from fsam_ext.schedule import Schedule

from .conformance import identical
from .test_optimizer import BASES, backward, batches, network, worst

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, range(12)),
        ({"every": 3}, [0, 3, 6, 9]),
        ({"start": 5}, range(5, 12)),
        ({"end": 5}, range(5)),
        ({"every": 3, "start": 2, "end": 9}, [2, 5, 8]),
        ({"start": lambda step: step >= 7}, range(7, 12)),
        ({"every": 2, "end": lambda step: step > 4}, [0, 2, 4]),
        ({"start": 20}, []),
    ],
)
def test_which_steps_ascend(options, expected):
    schedule = Schedule(**options)
    assert [step for step in range(12) if schedule.ascends(step)] == list(expected)


def closure_of(model, batch, calls):
    def closure():
        calls.append(1)
        return backward(model, batch)

    return closure


@pytest.mark.parametrize("base", ["sgd_momentum", "adamw", "adam_amsgrad"])
def test_steps_without_an_ascent_are_those_of_the_base_optimizer(base):
    base, kwargs = BASES[base]
    mine, plain = network(), network()
    optimizer = FriendlySAM(mine.parameters(), base, rho=0.2, start=1000, **kwargs)
    reference = base(plain.parameters(), **kwargs)
    calls = []
    for batch in batches(20):
        optimizer.step(closure_of(mine, batch, calls))
        reference.zero_grad()
        backward(plain, batch)
        reference.step()
    assert len(calls) == 20
    assert worst(plain, mine) < 1e-13


def test_the_average_sees_every_gradient():
    model = network()
    optimizer = FriendlySAM(model.parameters(), SGD, rho=0.1, lmbda=0.8, lr=0.01, every=3)
    expected = {}
    for batch in batches(9):
        optimizer.zero_grad()
        backward(model, batch)
        for p in model.parameters():
            expected[p] = 0.8 * expected[p] + 0.2 * p.grad if p in expected else p.grad.clone()
        if optimizer.ascends:
            optimizer.first_step(zero_grad=True)
            backward(model, batch)
            optimizer.second_step()
        else:
            optimizer.step()
    for p, average in expected.items():
        assert torch.allclose(optimizer.state[p]["fsam_ema"], average, rtol=1e-12)


def test_a_non_finite_gradient_of_a_plain_step_leaves_the_average_alone():
    p = torch.nn.Parameter(torch.randn(10))
    optimizer = FriendlySAM([p], SGD, lr=0.0, every=2)
    for half in (optimizer.first_step, optimizer.second_step):
        p.grad = torch.ones(10)
        half()
    p.grad = torch.full((10,), 3.0)
    p.grad[4] = torch.inf
    optimizer.step()
    expected = torch.full((10,), 0.9 * 1 + 0.1 * 3.0)
    expected[4] = 1.0
    assert torch.allclose(optimizer.state[p]["fsam_ema"], expected)


@pytest.mark.parametrize("options", [{"every": 3}, {"start": 4}, {"every": 2, "start": 3, "end": 8}])
def test_a_resumed_run_keeps_the_schedule(options):
    data = list(batches(10))
    whole, first = network(), network()
    make = lambda model: FriendlySAM(model.parameters(), AdamW, rho=0.2, lr=0.01, **options)  # noqa: E731

    def train(model, optimizer, data):
        calls = []
        for batch in data:
            optimizer.step(closure_of(model, batch, calls))
        return len(calls)

    calls = train(whole, make(whole), data)
    optimizer = make(first)
    interrupted = train(first, optimizer, data[:5])
    second = copy.deepcopy(first)
    resumed = make(second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert interrupted + train(second, resumed, data[5:]) == calls
    assert all(map(identical, whole.parameters(), second.parameters()))


def test_a_skipped_step_counts_and_a_given_up_one_does_not():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SAM([p], SGD, lr=0.1, every=2)
    p.grad = torch.full((3,), torch.nan)
    optimizer.first_step()
    optimizer.restore()
    assert optimizer.ascends
    optimizer.first_step()
    optimizer.second_step()
    assert not optimizer.ascends


def test_first_step_in_a_step_without_an_ascent_is_refused():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SAM([p], SGD, lr=0.1, every=2, start=1)
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="every=2, start=1; this is step 0"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="without an ascent"), optimizer.perturbed():
        pass
    optimizer.step()
    optimizer.first_step()


def test_a_group_added_later_keeps_step():
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = SAM([p], SGD, lr=0.1, every=2)
    p.grad = torch.ones(3)
    optimizer.first_step()
    optimizer.second_step()
    optimizer.add_param_group({"params": [q]})
    assert not optimizer.ascends
    assert len({group["fsam_step"] for group in optimizer.param_groups}) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"every": 0}, "every must be a whole number of at least 1"),
        ({"every": 1.5}, "every must be a whole number"),
        ({"every": True}, "every must be a whole number"),
        ({"start": -1}, "start must be a number of steps of at least 0, not -1"),
        ({"end": "late"}, "end must be a number of steps or a function"),
    ],
)
def test_bad_schedules(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        FriendlySAM([torch.nn.Parameter(torch.ones(3))], SGD, lr=0.1, **options)
