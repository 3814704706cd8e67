"""CLEAN, PERTURBED, ASCENDED: what each call does where it is allowed, says where it is not, and undoes on failure."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fsam_ext import FriendlySAM

from .conformance import identical
from .test_optimizer import BASES, backward, batches, network


@pytest.fixture(params=["sgd_momentum", "adamw", "rmsprop"])
def setup(request):
    base, kwargs = BASES[request.param]
    model = network()
    optimizer = FriendlySAM(model.parameters(), base, rho=0.5, **kwargs)
    return model, optimizer


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(model, before):
    return all(map(identical, model.parameters(), before))


def ascend(model, optimizer):
    backward(model, next(batches(1)))
    optimizer.first_step(zero_grad=True)


def test_first_step_twice(setup):
    model, optimizer = setup
    before = weights(model)
    ascend(model, optimizer)
    perturbed = weights(model)
    backward(model, next(batches(1)))
    with pytest.raises(RuntimeError, match=r"first_step was called twice.*second_step\(\).*restore\(\)"):
        optimizer.first_step()
    assert same(model, perturbed)
    optimizer.restore()
    assert same(model, before)


def test_second_step_without_the_first(setup):
    with pytest.raises(RuntimeError, match=r"second_step was called without first_step"):
        setup[1].second_step()


def test_restore_undoes_an_ascent_and_is_safe_anywhere(setup):
    model, optimizer = setup
    before = weights(model)
    optimizer.restore()
    ascend(model, optimizer)
    assert not same(model, before)
    optimizer.restore()
    optimizer.restore()
    assert same(model, before)
    ascend(model, optimizer)  # and the next step starts anew
    optimizer.restore()


def test_a_raising_closure_restores_the_weights(setup):
    model, optimizer = setup
    batch = next(batches(1))
    for failing_call in (1, 2):
        before, calls = weights(model), 0

        def closure(failing_call=failing_call):
            nonlocal calls
            calls += 1
            if calls == failing_call:
                raise KeyboardInterrupt
            return backward(model, batch)

        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        assert same(model, before)
    optimizer.step(lambda: backward(model, batch))


def test_perturbed_restores_whatever_happens(setup):
    model, optimizer = setup
    before = weights(model)
    backward(model, next(batches(1)))
    with pytest.raises(ZeroDivisionError), optimizer.perturbed():
        assert not same(model, before)
        raise ZeroDivisionError
    assert same(model, before)
    with pytest.raises(RuntimeError, match="without first_step"):
        optimizer.step()


def test_perturbed_ends_before_the_base_update(setup):
    model, optimizer = setup
    before = weights(model)
    backward(model, next(batches(1)))
    with optimizer.perturbed():
        assert all(p.grad is None for p in model.parameters())
        backward(model, next(batches(1)))
    assert same(model, before)
    with pytest.raises(RuntimeError, match=r"first_step was called after `with perturbed\(\):`"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"step\(closure\) was called after"):
        optimizer.step(lambda: 0)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    assert not same(model, before)


def test_a_step_that_ends_inside_the_block(setup):
    model, optimizer = setup
    backward(model, next(batches(1)))
    with optimizer.perturbed():
        backward(model, next(batches(1)))
        optimizer.second_step()
    backward(model, next(batches(1)))
    optimizer.first_step()
    optimizer.restore()


def test_a_closure_after_first_step_is_run_once(setup):
    model, optimizer = setup
    twin, other = copy.deepcopy((model, optimizer))
    batch = next(batches(1))
    for m, o in ((model, optimizer), (twin, other)):
        backward(m, batch)
        o.first_step(zero_grad=True)
    calls = []

    def closure():
        calls.append(backward(model, batch))
        return calls[-1]

    assert optimizer.step(closure) is calls[0] and len(calls) == 1
    backward(twin, batch)
    other.second_step()
    assert all(map(identical, model.parameters(), twin.parameters()))


def test_gradients_are_enabled_inside_a_closure_and_left_as_they_were(setup):
    model, optimizer = setup
    with torch.no_grad():
        optimizer.step(lambda: backward(model, next(batches(1))))
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("what", ["state_dict", "load_state_dict", "deepcopy", "pickle", "add_param_group"])
def test_what_is_refused_while_perturbed(setup, what):
    model, optimizer = setup
    calls = {
        "state_dict": optimizer.state_dict,
        "load_state_dict": lambda: optimizer.load_state_dict({}),
        "deepcopy": lambda: copy.deepcopy(optimizer),
        "pickle": lambda: pickle.dumps(optimizer),
        "add_param_group": lambda: optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]}),
    }
    before = weights(model)
    ascend(model, optimizer)
    perturbed = weights(model)
    with pytest.raises(RuntimeError, match=r"restore\(\)"):
        calls[what]()
    assert same(model, perturbed)
    optimizer.restore()
    assert same(model, before)
    assert len(optimizer.param_groups) == 1
