"""Accumulated gradients: the large batch to rounding, the same micro-batches twice, a warning where they are not."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from fsam_ext import FriendlySAM

from .test_optimizer import backward, batches, worst

SGD = torch.optim.SGD


def network():
    """Without BatchNorm, whose statistics belong to a micro-batch."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(50, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def micro(batch, count=4):
    return list(zip(batch[0].chunk(count), batch[1].chunk(count), strict=True))


def test_accumulated_micro_batches_equal_the_large_batch():
    large, small, loop = network(), network(), network()
    make = lambda model: FriendlySAM(model.parameters(), SGD, rho=0.2, lr=0.05, momentum=0.9)  # noqa: E731
    optimizers = [make(model) for model in (large, small, loop)]
    for batch in batches(30):
        whole = optimizers[0].step(partial(backward, large, batch))

        def closure(part):
            loss = (small(part[0]) - part[1]).square().mean() / 4
            loss.backward()
            return loss

        parts = optimizers[1].step(closure, accumulate=iter(micro(batch)))  # an iterator is kept for the second pass
        assert torch.allclose(whole, parts, rtol=1e-12)
        for half in (optimizers[2].first_step, optimizers[2].second_step):
            for x, y in micro(batch):
                ((loop(x) - y).square().mean() / 4).backward()
            half(zero_grad=True)
    assert worst(large, small) < 1e-12
    assert worst(large, loop) < 1e-12


def test_each_pass_goes_through_the_same_micro_batches_in_order():
    model = network()
    optimizer = FriendlySAM(model.parameters(), SGD, lr=0.05, every=2)
    seen = []

    def closure(part):
        seen.append(part[0])
        loss = (model(part[0]) - part[1]).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        (batch,) = batches(1)
        optimizer.step(closure, accumulate=micro(batch, 2))
    first, second = micro(batch, 2)
    assert len(seen) == 4 + 2  # the second step has no ascent
    assert all(a is b for a, b in zip(seen[:2], seen[2:4], strict=True))


def test_another_number_of_micro_batches_in_the_second_pass_is_noticed_once():
    model = network()
    optimizer = FriendlySAM(model.parameters(), SGD, lr=0.01)

    def step(first, second):
        for count, half in ((first, optimizer.first_step), (second, optimizer.second_step)):
            for batch in batches(count):
                backward(model, batch)
            half(zero_grad=True)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(3, 3)
        step(1, 1)  # another number in another step is no mistake
        optimizer.restore()
        step(2, 2)
    with pytest.warns(UserWarning, match="first pass made 3 backward passes and the second 2"):
        step(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(3, 2)


def test_a_given_up_step_and_a_load_do_not_count():
    model = network()
    optimizer = FriendlySAM(model.parameters(), SGD, lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for batch in batches(3):
                backward(model, batch)
            optimizer.first_step(zero_grad=True)
            backward(model, next(batches(1)))
            optimizer.restore()
            optimizer.zero_grad()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for half in (optimizer.first_step, optimizer.second_step):
                backward(model, next(batches(1)))
                half(zero_grad=True)


def test_gradients_that_were_thrown_away_do_not_count():
    model = network()
    optimizer = FriendlySAM(model.parameters(), SGD, lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            backward(model, next(batches(1)))
            optimizer.zero_grad()
            for half in (optimizer.first_step, optimizer.second_step):
                backward(model, next(batches(1)))
                half(zero_grad=True)


def test_bad_accumulation():
    model = network()
    optimizer = FriendlySAM(model.parameters(), SGD, lr=0.01)
    with pytest.raises(ValueError, match="accumulate has no micro-batches"):
        optimizer.step(lambda part: None, accumulate=[])
    with pytest.raises(TypeError, match="needs a closure"):
        optimizer.step(accumulate=[1])


def test_a_closure_that_raises_in_the_middle_of_the_second_pass():
    model = network()
    optimizer = FriendlySAM(model.parameters(), SGD, lr=0.01)
    before = copy.deepcopy(model)
    (batch,) = batches(1)
    calls = []

    def closure(part):
        calls.append(part)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return backward(model, part)

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure, accumulate=micro(batch))
    assert worst(before, model) == 0
