"""flatten_parameters: the same numbers from one row, whatever happens to gradients and parameters in between."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fsam_ext import SAM, FriendlySAM, flatten_parameters

from .conformance import identical
from .test_optimizer import BASES, backward, batches, network, one_step, worst


def rows(optimizer) -> int:
    return sum(
        len(segment.offsets)
        for number in range(len(optimizer.param_groups))
        for segment in optimizer._passes.layout.segments_of(number)
    )


def test_values_shapes_strides_and_gradients_stay():
    model = network(torch.float32).to(memory_format=torch.channels_last)
    backward(model, next(batches(1, torch.float32)))
    before = [(p.detach().clone(), p.grad.clone(), p.stride()) for p in model.parameters()]
    (flat,) = flatten_parameters(model, grads=True)
    for p, (value, grad, stride) in zip(model.parameters(), before, strict=True):
        assert identical(p, value) and identical(p.grad, grad) and p.stride() == stride
        assert p.untyped_storage().data_ptr() == flat.data.untyped_storage().data_ptr()
        assert p.data_ptr() % 128 == flat.data.data_ptr() % 128
        assert isinstance(p, nn.Parameter) and p.requires_grad


def test_one_buffer_for_each_dtype_and_frozen_parameters_stay():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double(), nn.Linear(3, 3).requires_grad_(False))
    address = model[2].weight.data_ptr()
    flats = flatten_parameters(model)
    assert {flat.data.dtype for flat in flats} == {torch.float32, torch.float64}
    assert model[2].weight.data_ptr() == address


@pytest.mark.parametrize("base", ["sgd_momentum", "adamw", "rmsprop"])
def test_a_step_sees_one_row(base):
    base, kwargs = BASES[base]
    models = [network() for _ in range(2)]
    flatten_parameters(models[1], grads=True)
    for model in models:
        optimizer = FriendlySAM(model.parameters(), base, rho=0.2, **kwargs)
        for batch in batches(10):
            one_step(model, optimizer, batch, "two_steps")
        assert rows(optimizer) == (1 if model is models[1] else len(list(model.parameters())))
    assert worst(*models) < 1e-12


def test_groups_cut_the_row():
    model = network()
    flatten_parameters(model, grads=True)
    params = list(model.parameters())
    optimizer = FriendlySAM([{"params": params[:2]}, {"params": params[2:], "rho": 0.3}], torch.optim.SGD, lr=0.1)
    one_step(model, optimizer, next(batches(1)), "two_steps")
    assert rows(optimizer) == 2


def test_flattened_after_the_optimizer_has_started():
    models = [network() for _ in range(2)]
    optimizers = [FriendlySAM(model.parameters(), torch.optim.AdamW, lr=0.01) for model in models]
    for step, batch in enumerate(batches(6)):
        if step == 3:
            flatten_parameters(models[1], grads=True)
        for model, optimizer in zip(models, optimizers, strict=True):
            one_step(model, optimizer, batch, "two_steps")
    assert rows(optimizers[1]) == 1
    assert worst(*models) < 1e-12


@pytest.mark.parametrize("disturb", ["model.zero_grad", "grad_replaced", "grad_missing", "data_replaced", "converted"])
def test_what_leaves_the_flat_buffer_is_found(disturb):
    """Correct whatever is moved; the row comes back where the gradients do."""
    models = [network() for _ in range(2)]
    flatten_parameters(models[1], grads=True)
    optimizers = [FriendlySAM(model.parameters(), torch.optim.AdamW, rho=0.2, lr=0.01) for model in models]
    for step, batch in enumerate(batches(9)):
        for model, optimizer in zip(models, optimizers, strict=True):
            if step == 3 and disturb == "data_replaced":
                model[4].weight.data = model[4].weight.data.clone()
            if step == 3 and disturb == "converted":
                model.float().double()
            for half in (optimizer.first_step, optimizer.second_step):
                model.zero_grad() if disturb == "model.zero_grad" and step in (3, 4) else optimizer.zero_grad()
                backward(model, batch)
                if step in (3, 4) and disturb == "grad_replaced":
                    model[4].weight.grad = model[4].weight.grad * 2
                if step in (3, 4) and disturb == "grad_missing":
                    model[4].weight.grad = None
                half()
    assert worst(*models) < 1e-12
    if disturb in ("model.zero_grad", "grad_replaced"):
        assert rows(optimizers[1]) == 1


def test_steps_that_differ_are_not_merged():
    """One row has one step count: parameters that missed an update must stay rows of their own."""
    models = [network() for _ in range(2)]
    optimizers = [FriendlySAM(model.parameters(), torch.optim.Adam, lr=0.01) for model in models]
    for step, batch in enumerate(batches(6)):
        if step == 3:
            flatten_parameters(models[1], grads=True)
        for model, optimizer in zip(models, optimizers, strict=True):
            for half in (optimizer.first_step, optimizer.second_step):
                optimizer.zero_grad()
                backward(model, batch)
                if step == 1:
                    model[4].weight.grad = None
                half()
    assert rows(optimizers[1]) > 1
    assert worst(*models) < 1e-12


def test_zero_grad_keeps_the_views_and_clears_the_rest():
    model = network()
    (flat,) = flatten_parameters(model, grads=True)
    stranger = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SAM([*model.parameters(), stranger], torch.optim.SGD)
    backward(model, next(batches(1)))
    stranger.grad = torch.ones_like(stranger)
    optimizer.zero_grad()
    assert stranger.grad is None
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert not flat.grad.any()
    stranger.grad = torch.ones_like(stranger)
    optimizer.zero_grad(set_to_none=False)
    assert stranger.grad is not None and not stranger.grad.any()


def test_padding_stays_zero():
    model = network()
    (flat,) = flatten_parameters(model, grads=True)
    optimizer = FriendlySAM(model.parameters(), torch.optim.AdamW, adaptive=True, lr=0.01)
    for batch in batches(5):
        one_step(model, optimizer, batch, "two_steps")
    used = torch.zeros(flat.data.numel(), dtype=torch.bool)
    for p in model.parameters():
        used[flat.offset[p] : flat.offset[p] + p.numel()] = True
    assert not flat.data[~used].any() and not flat.grad[~used].any()


def test_copies_of_a_flattened_model_train_on():
    model = network()
    flatten_parameters(model, grads=True)
    optimizer = FriendlySAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    one_step(model, optimizer, next(batches(1)), "two_steps")
    twin, other = copy.deepcopy((model, optimizer))
    for batch in batches(3):
        one_step(model, optimizer, batch, "two_steps")
        one_step(twin, other, batch, "two_steps")
    assert worst(model, twin) < 1e-12
