"""torch.compile around the optimizer; test_ops.py has it around the ops."""

from __future__ import annotations

import pytest
import torch

from fsam_ext import FriendlySAM

from .conformance import identical


@pytest.mark.parametrize("api", ("two_steps", "perturbed"))
def test_a_compiled_training_step_has_the_numbers_of_an_eager_one(api):
    """fsam_ext/optimizer.py, NOTE [steps are not compiled]: both from the first step and once state exists."""

    def step(model, optimizer, x):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        if api == "two_steps":
            optimizer.first_step(zero_grad=True)
            model(x).square().sum().backward()
            optimizer.second_step()
        else:
            with optimizer.perturbed():
                model(x).square().sum().backward()
            optimizer.step()

    models = [torch.nn.Linear(4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [FriendlySAM(model.parameters(), lr=0.1, momentum=0.9, rho=0.1) for model in models]
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager")
    for _ in range(3):
        x = torch.randn(5, 4)
        compiled(models[0], optimizers[0], x)
        step(models[1], optimizers[1], x)
    assert all(map(identical, models[0].parameters(), models[1].parameters()))


def test_a_compiled_model_stays_compiled_in_a_closure():
    model = torch.nn.Linear(4, 3)
    optimizer = FriendlySAM(model.parameters(), lr=0.1)
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)

    def closure():
        loss = compiled(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert len(graphs) == 1
