"""What torch's own optimizers take in their stride: forks, fake tensors, swapped tensors, edited parameters."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from fsam_ext import SAM, FriendlySAM, flatten_parameters
from fsam_ext.step import held

FORK = """
import multiprocessing, sys, torch
from torch import nn
from fsam_ext import FriendlySAM

torch.set_num_threads(2)

def work():
    model = nn.ParameterList(nn.Parameter(torch.ones(20_000)) for _ in range(3))
    optimizer = FriendlySAM(model.parameters(), torch.optim.{base}, lr=0.1)
    for _ in range(2):
        for half in (optimizer.first_step, optimizer.second_step):
            for param in model:
                param.grad = torch.ones_like(param) if param.grad is None else param.grad.copy_(torch.ones(20_000))
            half()

torch.ones(10_000_000).add_(1)  # torch's threads are there
work()
child = multiprocessing.get_context("fork").Process(target=work)
child.start()
child.join(60)
sys.exit("hangs" if child.is_alive() and not child.kill() else child.exitcode)
"""


@pytest.mark.parametrize("base", ("SGD", "AdamW"))
def test_training_in_a_forked_child(base):
    """A child lacks its parent's threads; torch's optimizers need none for tensors of this size."""
    code = FORK.format(base=base)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("base", (torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam))
def test_fake_tensors(base):
    """Memory estimation and tracing: a step runs, and its state has the right shapes."""
    with FakeTensorMode():
        model, inputs = nn.Linear(4, 2), torch.ones(3, 4)
        optimizer = FriendlySAM(model.parameters(), base, lr=0.1)

        def closure():
            loss = model(inputs).sum()
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
            assert {t.shape for p in model.parameters() for k, t in optimizer.state[p].items() if t.dim()} == {
                (2, 4),
                (2,),
            }


@pytest.fixture
def swapping():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.parametrize("layers", (1, held.FEWEST))
def test_modules_that_convert_by_swapping_after_a_step(swapping, layers):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    optimizer = SAM(model.parameters(), lr=0.1, momentum=0.9)

    def step():
        for half in (optimizer.first_step, optimizer.second_step):
            model(torch.randn(2, 4, dtype=model[0].weight.dtype)).sum().backward()
            half(zero_grad=True)

    step()
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    step()
    model.double()
    step()
    assert {param.dtype for param in optimizer.param_groups[0]["params"]} == {torch.float64}
    torch.utils.swap_tensors(model[0].bias, Parameter(torch.zeros(4, dtype=torch.float64)))
    assert model[0].bias.eq(0).all()
    step()


def test_the_way_parameters_convert_may_change_between_steps():
    """What was held is let go as soon as the next step sees it."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(held.FEWEST)))
    optimizer = SAM(model.parameters(), lr=0.1)

    def step():
        for half in (optimizer.first_step, optimizer.second_step):
            model(torch.randn(2, 4)).sum().backward()
            half(zero_grad=True)

    step()
    try:
        torch.__future__.set_swap_module_params_on_conversion(True)
        step()
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_is_perturbed():
    param = Parameter(torch.ones(3))
    optimizer = FriendlySAM([param], rho=0.5, lr=0.1)
    seen = []

    def closure():
        seen.append(optimizer.is_perturbed)
        param.grad = torch.ones(3)
        return torch.zeros(())

    optimizer.step(closure)
    assert seen == [False, True] and not optimizer.is_perturbed
    param.grad = torch.ones(3)
    with optimizer.perturbed():
        assert optimizer.is_perturbed
        param.grad = torch.ones(3)
    assert not optimizer.is_perturbed
    optimizer.step()
    assert not optimizer.is_perturbed


@pytest.mark.parametrize("fewest", (1, sys.maxsize), ids=("held", "listed"))
@pytest.mark.parametrize("flatten", (False, True))
def test_parameters_tied_after_the_first_step_are_refused_before_anything_is_written(fewest, flatten, monkeypatch):
    monkeypatch.setattr(held, "FEWEST", fewest)
    model = nn.ParameterList(Parameter(torch.full((4,), float(i))) for i in range(3))
    if flatten:
        flatten_parameters(model, grads=True)
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1, momentum=0.9)

    def step():
        for half in (optimizer.first_step, optimizer.second_step):
            for param in model:
                param.grad = torch.ones_like(param)
            half()

    step()
    model[1].data = model[0].data
    before = [param.detach().clone() for param in model]
    momentum = [optimizer.state[param]["momentum_buffer"].clone() for param in model]
    for _ in range(2):
        with pytest.raises(ValueError, match="share memory"):
            step()
        assert not optimizer.is_perturbed
        assert all(map(torch.equal, before, model))
        assert all(torch.equal(optimizer.state[p]["momentum_buffer"], m) for p, m in zip(model, momentum))


def test_a_weight_written_while_others_are_perturbed_counts_for_its_master():
    """Its gradient comes in the second pass only."""
    first, later = (Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = SAM([first, later], lr=0.0, master_weights=True)
    for param in (first, later):
        param.grad = torch.ones_like(param)
    optimizer.first_step()
    for param in (first, later):
        param.grad = torch.ones_like(param)
    optimizer.second_step()
    optimizer.zero_grad()
    with torch.no_grad():
        later.fill_(3.0)
    first.grad = torch.ones_like(first)
    optimizer.first_step()
    for param in (first, later):
        param.grad = torch.ones_like(param)
    optimizer.second_step()
    assert first.eq(1).all() and later.eq(3).all() and optimizer.state[later]["fsam_master"].eq(3).all()
