"""Failures seen in other implementations, each under a name that says it. None may come back here."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from fsam_ext import SAM, FriendlySAM, flatten_parameters

from .conformance import identical
from .test_optimizer import BASES, backward, batches, network, one_step, train

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_average_of_the_subtracted_gradient():
    """Averaging g - sigma m instead of g makes m half the mean gradient, and d half as well aligned with it."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(1000, dtype=torch.float64))
    mean = torch.ones(1000, dtype=torch.float64)
    optimizer = FriendlySAM([p], SGD, lr=0.0, lmbda=0.95)
    cosines = []
    for step in range(400):
        p.grad = mean + torch.randn(1000, dtype=torch.float64)
        before = p.detach().clone()
        optimizer.first_step()
        if step >= 200:
            cosines.append(torch.cosine_similarity((p.detach() - before), mean, dim=0))
        optimizer.second_step()
    average = optimizer.state[p]["fsam_ema"].mean()
    assert abs(average - 1.0) < 0.05
    assert abs(torch.stack(cosines).mean()) < 0.05


@pytest.mark.parametrize("base", ["sgd_momentum", "adamw", "rmsprop"])
def test_resume_loses_the_base_optimizers_state(base):
    base, kwargs = BASES[base]
    data = list(batches(10))
    through = network()
    train(through, FriendlySAM(through.parameters(), base, **kwargs), data)

    first = network()
    optimizer = FriendlySAM(first.parameters(), base, **kwargs)
    train(first, optimizer, data[:5])
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    second = network(seed=1)
    optimizer = FriendlySAM(second.parameters(), base, **kwargs)
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(second, optimizer, data[5:])
    assert all(map(identical, through.parameters(), second.parameters()))


def test_backup_in_the_checkpoint():
    model = network()
    optimizer = FriendlySAM(model.parameters(), AdamW, lr=0.01)
    train(model, optimizer, batches(2))
    names = {name for entry in optimizer.state_dict()["state"].values() for name in entry}
    assert names == {"fsam_ema", "exp_avg", "exp_avg_sq", "step"}


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("base", ["sgd_dampening", "adamw", "rmsprop"])
@pytest.mark.parametrize("at", [0, 3], ids=["first_step", "later_step"])
def test_one_nonfinite_gradient_poisons_the_average(base, value, at):
    """A step whose first gradient is not finite leaves everything as it was: the run goes on as if it had not been."""
    base, kwargs = BASES[base]
    data = list(batches(8))
    undisturbed, disturbed = network(), network()
    train(undisturbed, FriendlySAM(undisturbed.parameters(), base, **kwargs), data)
    optimizer = FriendlySAM(disturbed.parameters(), base, **kwargs)
    train(disturbed, optimizer, data[:at])
    for half in (optimizer.first_step, optimizer.second_step):
        optimizer.zero_grad()
        with torch.no_grad():
            for p in disturbed.parameters():
                p.grad = torch.ones_like(p)
        next(disturbed.parameters()).grad.view(-1)[1] = value
        half()
        assert optimizer.stats()["found_inf"]
    train(disturbed, optimizer, data[at:])
    assert all(map(identical, undisturbed.parameters(), disturbed.parameters()))
    assert not optimizer.stats()["found_inf"]


def test_gradient_in_pass_one_only_leaves_the_parameter_perturbed():
    a, b = parameter(1.0), parameter(1.0)
    optimizer = FriendlySAM([a, b], SGD, rho=0.1, lr=0.5)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.first_step(zero_grad=True)
    assert a.item() > 1 and b.item() > 1
    a.grad = torch.ones_like(a)
    optimizer.second_step()
    assert (a.item(), b.item()) == (0.5, 1.0)


def test_gradient_in_pass_two_only_raises():
    a, b = parameter(1.0), parameter(1.0)
    optimizer = FriendlySAM([a, b], SGD, rho=0.1, lr=0.5)
    a.grad = torch.ones_like(a)
    optimizer.first_step()
    assert b.item() == 1.0
    b.grad = torch.ones_like(b)
    optimizer.second_step()
    assert (a.item(), b.item()) == (0.5, 0.5)


@pytest.mark.parametrize("base", ["adamw", "rmsprop"])
def test_parameters_that_come_and_go(base):
    """Whatever gradients exist in a pass, weights and step counts are those of the base fed with the same gradients."""
    base, kwargs = BASES[base]
    mine = [parameter(1.0, 2.0), parameter(3.0), parameter(4.0, 5.0, 6.0)]
    plain = [parameter(*p.tolist()) for p in mine]
    optimizer, reference = FriendlySAM(mine, base, rho=0.0, **kwargs), base(plain, **kwargs)
    for step in range(12):
        for p in mine:
            p.grad = None
        for i in (step % 3, (step * 2) % 3):
            mine[i].grad = torch.full_like(mine[i], 0.5)
        optimizer.first_step(zero_grad=True)
        for q in plain:
            q.grad = None
        for i in ((step + 1) % 3, (step * 5) % 3):
            mine[i].grad = torch.full_like(mine[i], float(step))
            plain[i].grad = torch.full_like(mine[i], float(step))
        optimizer.second_step()
        reference.step()
        for p, q in zip(mine, plain, strict=True):
            assert torch.allclose(p, q, rtol=1e-14)


def test_no_gradient_at_all_raises():
    p = parameter(1.0)
    optimizer = FriendlySAM([p], SGD, lr=0.5)
    optimizer.first_step()
    optimizer.second_step()
    assert p.item() == 1.0


def test_parameters_get_a_new_address_in_each_step():
    model = network()
    optimizer = FriendlySAM(model.parameters(), SGD, lr=0.1)
    addresses = [p.data_ptr() for p in model.parameters()]
    for batch in batches(3):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.first_step(zero_grad=True)
        assert [p.data_ptr() for p in model.parameters()] == addresses
        backward(model, batch)
        optimizer.second_step()
        assert [p.data_ptr() for p in model.parameters()] == addresses


def test_restore_by_subtraction_drifts():
    """Perturbing and restoring a thousand times must not move a bit."""
    p = nn.Parameter(torch.randn(1000).to(torch.bfloat16))
    before = p.detach().clone()
    optimizer = FriendlySAM([p], SGD, rho=1.0, lr=0.0)
    for _ in range(1000):
        p.grad = torch.randn(1000).to(torch.bfloat16)
        optimizer.first_step()
        optimizer.second_step()
    assert identical(p, before)


def test_zero_noise_gives_nan():
    p = parameter(1.0, 2.0)
    optimizer = SAM([p], SGD, rho=0.1, lr=0.5, perturb_eps=0.0)
    p.grad = torch.zeros_like(p)
    optimizer.first_step()
    assert p.tolist() == [1.0, 2.0]
    assert optimizer.stats()["noise_norm"] == 0
    optimizer.second_step()
    assert p.tolist() == [1.0, 2.0]


def test_complex_parameters_are_squared_without_conjugation():
    with pytest.raises(TypeError, match="parameter 0 of group 0 .*complex64.*float32"):
        FriendlySAM([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], SGD, adaptive=True)


def test_step_without_a_first_step_trains_the_plain_base():
    model = network()
    optimizer = FriendlySAM(model.parameters(), SGD, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, next(batches(1)))
    with pytest.raises(RuntimeError, match="first_step"):
        optimizer.step()
    assert all(map(identical, before, model.parameters()))


def test_closure_is_evaluated_once_and_its_loss_lost():
    model = network()
    optimizer = FriendlySAM(model.parameters(), SGD, rho=0.5, lr=0.1)
    batch = next(batches(1))
    losses = []

    def closure():
        losses.append(backward(model, batch).detach())
        return losses[-1]

    clean = (model(batch[0]) - batch[1]).square().mean()
    loss = optimizer.step(closure)
    assert len(losses) == 2
    assert torch.allclose(loss, clean.detach()) and losses[1] > losses[0]


def test_gradients_before_a_closure_count_twice():
    """A closure that does not clear gradients must not add to what is there."""
    models = [network(), network()]
    batch = next(batches(1))
    for model, stale in zip(models, (False, True), strict=True):
        optimizer = FriendlySAM(model.parameters(), SGD, lr=0.1)
        if stale:
            backward(model, batch)
        optimizer.step(lambda model=model: backward(model, batch))
    assert all(map(identical, *(list(model.parameters()) for model in models)))


def test_a_graph_from_before_the_perturbation_is_used_after_it():
    """autograd must notice that weights it saved have moved."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    optimizer = FriendlySAM(model.parameters(), SGD, lr=0.1)
    loss = model(torch.randn(4, 3)).sum()
    loss.backward(retain_graph=True)
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_skipped_step_is_counted_by_adam():
    """Bias correction must not run ahead of the moments."""
    p = parameter(1.0)
    optimizer = FriendlySAM([p], AdamW, lr=0.1)
    for value in (1.0, torch.inf, 1.0):
        p.grad = torch.full_like(p, value)
        optimizer.first_step()
        optimizer.second_step()
    assert optimizer.state[p]["step"] == 2


def test_an_old_gradient_is_kept_alive_between_the_passes():
    model = network()
    optimizer = FriendlySAM(model.parameters(), SGD, lr=0.1)
    one_step(model, optimizer, next(batches(1)), "two_steps")
    backward(model, next(batches(1)))
    grads = [weakref.ref(p.grad) for p in model.parameters()]
    optimizer.first_step(zero_grad=True)
    assert all(grad() is None for grad in grads)


@pytest.mark.parametrize("flattened", (False, True))
@pytest.mark.parametrize("base", ("sgd_momentum", "adamw", "rmsprop"))
def test_an_optimizer_that_is_dropped_keeps_weights_alive(base, flattened):
    model = network()
    if flattened:
        flatten_parameters(model, grads=True)
    optimizer = FriendlySAM(model.parameters(), BASES[base][0], **BASES[base][1])
    for batch in batches(2):
        one_step(model, optimizer, batch, "two_steps")
    kept = [weakref.ref(param) for param in model.parameters()]
    del model, optimizer
    gc.collect()
    assert kept and all(param() is None for param in kept)


def test_an_optimizer_that_is_dropped_leaves_hooks_on_a_model_that_stays():
    model = network()
    for _ in range(3):
        optimizer = FriendlySAM(model.parameters(), lr=0.1)
        for batch in batches(2):
            one_step(model, optimizer, batch, "two_steps")
    hooks = [len(param._post_accumulate_grad_hooks or ()) for param in model.parameters()]
    assert sum(hooks) == 1
    del optimizer
    gc.collect()
    assert sum(len(param._post_accumulate_grad_hooks or ()) for param in model.parameters()) == 0
