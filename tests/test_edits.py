"""What users change between steps: parameters cast, reshaped or frozen, state removed, options edited.

A step is made with what is there now, or refused by name.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from fsam_ext import SAM, FriendlySAM, flatten_parameters
from fsam_ext.state.checkpoints import to_torch
from fsam_ext.state.flatten import check_disjoint
from fsam_ext.step import held

from .conformance import identical
from .test_optimizer import backward, batches, network

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


@pytest.fixture(params=["held", "listed"], autouse=True)
def look(request, monkeypatch):
    """Both ways to look at parameters have to see all of it."""
    monkeypatch.setattr(held, "FEWEST", 1 if request.param == "held" else sys.maxsize)


def step(optimizer, *gradients: float | torch.Tensor) -> None:
    """Both passes with these gradients, one a parameter (the same for all where there is one)."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for half in (optimizer.first_step, optimizer.second_step):
        for i, param in enumerate(params):
            gradient = gradients[i % len(gradients)]
            param.grad = None if gradient is None else torch.zeros_like(param) + gradient
        half()


# ---- Parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", (1, 2))
def test_tied_by_data(groups):
    a = Parameter(torch.ones(3, 4))
    b = Parameter(a.data)
    optimizer = SAM([a, b] if groups == 1 else [{"params": [a]}, {"params": [b]}], rho=0.5, lr=0.0)
    for _ in range(2):
        a.grad = b.grad = torch.ones(3, 4)
        with pytest.raises(ValueError, match="share memory"):
            optimizer.first_step()
        assert a.eq(1).all()


def test_tied_by_data_is_not_untied_by_flatten_parameters():
    model = nn.Module()
    model.a = Parameter(torch.ones(3))
    model.b = Parameter(model.a.data)
    with pytest.raises(ValueError, match="parameter 'a' and parameter 'b' share memory"):
        flatten_parameters(model)
    assert model.a.data_ptr() == model.b.data_ptr()


def test_wrappers_without_memory_share_none():
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    check_disjoint([Wrapper(torch.ones(3)), Wrapper(torch.ones(3))], str)


@pytest.mark.parametrize("block", (False, True))
@pytest.mark.parametrize("flatten", (False, True))
@pytest.mark.parametrize("masters", (False, True))
@pytest.mark.parametrize(
    "change",
    (
        lambda p: p.data.to(memory_format=torch.channels_last),
        lambda p: p.data.flatten().clone(),
        lambda p: p.data.clone(),
        lambda p: p.data.double(),
    ),
    ids=("order", "shape", "address", "dtype"),
)
def test_what_is_changed_while_perturbed_is_restored_all_the_same(change, masters, flatten, block):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(3, 3)).to(torch.bfloat16 if masters else torch.float32)
    before = [param.detach().clone() for param in model.parameters()]
    if flatten:
        flatten_parameters(model, grads=True)
    optimizer = SAM(model.parameters(), rho=1.0, lr=0.0, master_weights=masters)
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.first_step()
        assert not identical(before[0], model[0].weight.detach())
        weight = model[0].weight
        weight.grad = None
        weight.data = change(weight)
        weight.grad = torch.randn_like(weight)
        if block:  # as `with perturbed():` does at its end
            optimizer.restore()
        elif masters and weight.dim() == 1:  # its state is for another shape
            perturbed = weight.detach().clone()
            with pytest.raises(RuntimeError, match="state 'fsam_master' of parameter 0"):
                optimizer.second_step()
            assert identical(weight.detach(), perturbed)
            optimizer.restore()
        else:
            optimizer.second_step()
        assert identical(before[0].flatten().to(weight.dtype), weight.detach().flatten())
        for old, param in zip(before[1:], [*model.parameters()][1:], strict=True):
            assert identical(old, param.detach())
        if masters and weight.dim() == 1:
            break


def test_what_is_resized_while_perturbed_is_named_and_all_others_are_restored():
    params = [Parameter(torch.full((8,), float(i))) for i in range(3)]
    optimizer = SAM(params, rho=1.0, lr=1.0)
    for param in params:
        param.grad = torch.ones(8)
    optimizer.first_step()
    params[1].grad = None
    params[1].data = torch.cat([params[1].data, torch.zeros(8)])
    params[1].grad = torch.ones(16)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0.*\(16,\).* was resized while it was perturbed"):
        optimizer.second_step()
    assert params[0].eq(0).all() and params[2].eq(2).all()
    optimizer.restore()
    params[1].data, params[1].grad = torch.ones(8), torch.ones(8)
    step(optimizer, 1.0)
    assert params[0].eq(-1).all() and params[1].eq(0).all() and params[2].eq(1).all()


def test_more_memory_at_the_same_address():
    memory = torch.zeros(64)
    a, b = Parameter(memory[:32]), Parameter(torch.full((32,), 5.0))
    optimizer = SAM([a, b], rho=0.0, lr=1.0)
    step(optimizer, 0.0)
    a.grad, a.data = None, memory
    step(optimizer, 0.0)
    assert a.eq(0).all() and b.eq(5).all()


def twins(flatten: bool):
    """Two models of the same weights, with our optimizer and torch's, which have to agree at rho = 0."""
    models = [nn.Linear(3, 3, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    if flatten:
        flatten_parameters(models[0], grads=True)
    ours = SAM(models[0].parameters(), rho=0.0, lr=1.0, momentum=0.5)
    torchs = torch.optim.SGD(models[1].parameters(), lr=1.0, momentum=0.5)
    return models, ours, torchs


@pytest.mark.parametrize("flatten", (False, True))
def test_a_gradient_transposed_in_place_of_the_old_one(flatten):
    models, ours, torchs = twins(flatten)
    for _ in range(3):
        gradient = torch.randn(3, 3)
        ours.zero_grad()
        models[0].weight.grad = gradient if models[0].weight.grad is None else models[0].weight.grad.add_(gradient)
        ours.first_step()
        models[0].weight.grad = models[0].weight.grad.t()  # the same memory
        models[1].weight.grad = gradient.t()
        ours.second_step()
        torchs.step()
        assert identical(models[0].weight.detach(), models[1].weight.detach())


@pytest.mark.parametrize("flatten", (False, True))
def test_a_weight_transposed_over_its_own_memory(flatten):
    models, ours, torchs = twins(flatten)
    for turn in range(4):
        gradient = torch.randn(3, 3)
        for model in models if turn == 2 else ():
            model.weight.data = model.weight.data.t()
        for half in (ours.first_step, ours.second_step):
            ours.zero_grad()
            (models[0].weight * gradient).sum().backward()
            half()
        torchs.zero_grad()
        (models[1].weight * gradient).sum().backward()
        torchs.step()
        assert identical(models[0].weight.detach(), models[1].weight.detach())


@pytest.mark.parametrize("change", ("replaced", "reordered"))
def test_state_does_not_grow_with_what_is_gone(change):
    """As where points of a scene are added and dropped: state moves on to a new parameter, again and again."""
    kept = Parameter(torch.zeros(2))
    group = {"params": [kept, Parameter(torch.randn(4, 3, 3, 3))]}
    optimizer = FriendlySAM([group], rho=0.1, lr=0.1, momentum=0.9)
    group = optimizer.param_groups[0]
    for turn in range(20):
        for half in (optimizer.first_step, optimizer.second_step):
            for param in group["params"]:
                param.grad = torch.ones_like(param)
            half()
        (flat,) = optimizer._passes.layout.flats.values()
        assert flat.numel <= 2 * 160 and len(flat.offset) <= 3
        expected = optimizer.state[kept]["momentum_buffer"][0]
        old = group["params"][1]
        assert optimizer.state[old]["momentum_buffer"].eq(expected).all()
        if change == "replaced":
            new = group["params"][1] = Parameter(old.detach().clone())
            optimizer.state[new] = optimizer.state.pop(old)
        else:
            order = torch.channels_last if turn % 2 else torch.contiguous_format
            old.data = old.data.contiguous(memory_format=order)


@pytest.mark.parametrize("shape", ((), (1,), (3,)))
@pytest.mark.parametrize("edit", ("replaced", "exchanged", "removed"))
def test_a_parameter_like_the_one_before_is_another_one(shape, edit):
    """Lists of parameters are compared as objects: equal values do not make equal tensors."""
    params = [Parameter(torch.ones(shape)) for _ in range(3)]
    optimizer = FriendlySAM(params, rho=0.0, lr=1.0, momentum=0.5)
    step(optimizer, 1.0, 2.0, 4.0)
    listed = optimizer.param_groups[0]["params"]
    if edit == "replaced":
        other = listed[1] = Parameter(params[1].detach().clone())
        step(optimizer, 1.0, 2.0, 4.0)
        assert params[1].eq(-1).all() and other.eq(-3).all()
        assert optimizer.state[other]["momentum_buffer"].eq(2).all()
    elif edit == "exchanged":
        listed.reverse()
        step(optimizer, 4.0, 2.0, 1.0)
        assert params[0].eq(-1.5).all() and params[2].eq(-9).all()
    else:
        del listed[1]
        step(optimizer, 1.0, 4.0)
        assert params[1].eq(-1).all() and params[2].eq(-9).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("base, kwargs", [(SGD, {"momentum": 0.5}), (AdamW, {"weight_decay": 0.0})])
def test_a_cast_between_steps_keeps_weights_and_state(dtype, base, kwargs):
    model = nn.Linear(8, 4, bias=False)
    optimizer = SAM(model.parameters(), base, rho=0.0, lr=0.25, **kwargs)
    step(optimizer, 1.0)
    step(optimizer, 1.0)
    before = model.weight.detach().clone()
    model.to(dtype)
    twin = nn.Linear(8, 4, bias=False)
    plain = base(twin.parameters(), lr=0.25, **kwargs)
    twin.weight.grad = torch.ones(4, 8)
    plain.step()
    plain.step()
    model.weight.grad = torch.ones(4, 8, dtype=dtype)
    optimizer.first_step()
    optimizer.restore()
    assert torch.equal(model.weight, before.to(dtype))
    moved = twin.weight.detach().clone()
    plain.step()
    step(optimizer, 1.0)
    change = twin.weight.detach() - moved
    torch.testing.assert_close(model.weight.detach().float() - before, change, atol=0.02, rtol=0)


def test_another_order_of_the_dimensions():
    ours = nn.Conv2d(3, 4, 3, bias=False)
    theirs = copy.deepcopy(ours)
    optimizer = SAM(ours.parameters(), SGD, rho=0.0, lr=0.1, momentum=0.9)
    plain = SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for i in range(5):
        if i == 2:
            ours.to(memory_format=torch.channels_last)
        gradient = torch.randn(4, 3, 3, 3)
        theirs.weight.grad = gradient
        step(optimizer, gradient)
        plain.step()
        torch.testing.assert_close(ours.weight, theirs.weight)


def test_a_transposed_view_at_the_same_address():
    param, twin = Parameter(torch.randn(4, 4)), Parameter(torch.empty(4, 4))
    twin.data = param.data.clone()
    optimizer, plain = SAM([param], SGD, rho=0.0, lr=0.1, momentum=0.9), SGD([twin], lr=0.1, momentum=0.9)
    for i in range(4):
        if i == 2:  # values keep their places in the matrix, not in memory
            param.data = param.data.t().contiguous().t()
        gradient = torch.randn(4, 4)
        twin.grad = gradient
        step(optimizer, gradient)
        plain.step()
    torch.testing.assert_close(param, twin)


@pytest.mark.parametrize("size", (16, 64))
def test_a_parameter_of_another_size_is_refused_until_its_state_goes(size):
    a, b = Parameter(torch.zeros(32)), Parameter(torch.full((32,), 5.0))
    optimizer = FriendlySAM([a, b], SGD, rho=0.1, lr=0.0)
    step(optimizer, 1.0)
    a.data = torch.zeros(size)
    a.grad, b.grad = torch.ones(size), torch.ones(32)
    with pytest.raises(RuntimeError, match=r"'fsam_ema' of parameter 0 of group 0 .* has shape \(32,\)"):
        optimizer.first_step()
    assert not a.any() and bool((b == 5).all())
    del optimizer.state[a]
    for _ in range(2):
        step(optimizer, 1.0)
        assert not a.any() and bool((b == 5).all())
    fresh = FriendlySAM([a, b], SGD, rho=0.1, lr=0.0)
    fresh.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("start", (0, 3))
def test_parameters_over_the_same_memory_are_refused(start):
    a = Parameter(torch.zeros(4))
    b = Parameter(a.data[start:])
    optimizer = FriendlySAM([b, a], SGD, rho=1.0, lr=0.0)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.first_step()
    assert not a.any()


def test_frozen_parameters_stay_and_cost_no_new_segments(monkeypatch):
    params = [Parameter(torch.zeros(4)) for _ in range(5)]
    optimizer = FriendlySAM(params, SGD, lr=0.1, momentum=0.9)
    step(optimizer, 1.0)
    params[2].requires_grad_(False)
    frozen = params[2].detach().clone()
    step(optimizer, 1.0, 1.0, None, 1.0, 1.0)
    made = []
    monkeypatch.setattr(optimizer._passes.layout, "renew", lambda *args: made.append(args))
    for _ in range(3):
        step(optimizer, 1.0, 1.0, None, 1.0, 1.0)
    assert not made
    assert torch.equal(params[2], frozen) and not torch.equal(params[1], frozen)


@pytest.mark.parametrize("drop_gradients", (False, True))
def test_a_frozen_layer_of_a_flattened_model_stays(drop_gradients):
    ours, theirs = network(), network()
    flatten_parameters(ours, grads=True)
    models = [(m, FriendlySAM(m.parameters(), SGD, lr=0.05, momentum=0.9, weight_decay=0.1)) for m in (ours, theirs)]
    for i, batch in enumerate(batches(6)):
        for model, optimizer in models:
            if i == 3:
                model[4].requires_grad_(False)
                if drop_gradients:
                    model[4].weight.grad = model[4].bias.grad = None
            optimizer.step(lambda model=model, batch=batch: backward(model, batch))
        if i == 3:
            frozen = ours[4].weight.detach().clone()
    assert torch.equal(ours[4].weight, frozen)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


# ---- Gradients -----------------------------------------------------------------------------------------------------


def test_a_gradient_whose_sign_is_yet_to_be_changed():
    ours, theirs = Parameter(torch.ones(1)), Parameter(torch.ones(1))
    optimizer, plain = SAM([ours], SGD, rho=0.0, lr=1.0), SGD([theirs], lr=1.0)
    for lazy in (False, True, True):
        for half in (optimizer.first_step, optimizer.second_step):
            ours.grad = torch._neg_view(torch.ones(1)) if lazy else torch.ones(1)
            half()
        theirs.grad = -torch.ones(1) if lazy else torch.ones(1)
        plain.step()
        assert torch.equal(ours, theirs)


def test_a_gradient_of_zeros_without_memory():
    param = Parameter(torch.ones(4))
    optimizer = SAM([param], SGD, rho=0.0, lr=1.0, momentum=0.5)
    step(optimizer, 1.0)
    for half in (optimizer.first_step, optimizer.second_step):
        param.grad = torch._efficientzerotensor((4,))
        half()
    assert torch.equal(param, torch.full((4,), -0.5))


# ---- State ---------------------------------------------------------------------------------------------------------


STATE_EDITS = {
    "all cleared": lambda one, param: one.state.clear(),
    "all replaced": lambda one, param: setattr(one, "state", defaultdict(dict)),
    "popped": lambda one, param: one.state.pop(param),
    "popped and touched": lambda one, param: (one.state.pop(param), one.state[param]),
    "entry cleared": lambda one, param: one.state[param].clear(),
    "entry replaced": lambda one, param: one.state.update({param: {}}),
    "exchanged for another's": lambda one, param: one.state.update({"shared": one.state.pop(param)}),
    "a number beside the entries": lambda one, param: one.state.update({"calls": 3}),
    "tensor removed": lambda one, param: one.state[param].pop("momentum_buffer"),
    "tensor replaced": lambda one, param: one.state[param].update(momentum_buffer=torch.full((4,), -2.0)),
}


@pytest.mark.parametrize("edit", STATE_EDITS)
def test_edited_state_is_what_counts(edit):
    ours, theirs = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    optimizer, plain = SAM([ours], SGD, rho=0.0, lr=1.0, momentum=0.9), SGD([theirs], lr=1.0, momentum=0.9)
    for i in range(4):
        if i == 2:
            STATE_EDITS[edit](optimizer, ours)
            STATE_EDITS[edit](plain, theirs)
        theirs.grad = torch.ones(4)
        step(optimizer, 1.0)
        plain.step()
    torch.testing.assert_close(ours, theirs)
    saved = optimizer.state_dict()["state"]
    torch.testing.assert_close(saved[0]["momentum_buffer"], plain.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize("before", (None, torch.bfloat16, torch.int8))
@pytest.mark.parametrize("after", (None, torch.bfloat16, torch.int8))
def test_another_storage_of_the_average_takes_it_over(before, after):
    param = Parameter(torch.zeros(256))
    optimizer = FriendlySAM([param], SGD, lr=0.0, ema_dtype=before)
    step(optimizer, 0.125)
    optimizer.param_groups[0]["ema_dtype"] = after
    step(optimizer, 0.25)
    assert float(optimizer.stats()["ema_norm"]) == pytest.approx(0.125 * 16, rel=0.01)


@pytest.mark.parametrize("name", ("fsam_ema", "momentum_buffer"))
def test_state_that_parameters_swap_is_not_mixed_up(name):
    """Each lies where the other's is to be copied from."""
    params = [Parameter(torch.ones(4)), Parameter(torch.ones(4)), Parameter(torch.ones(4))]
    optimizer = FriendlySAM(params, lr=0.0, momentum=0.9)
    step(optimizer, 1.0, 2.0, 3.0)
    one, two, three = (optimizer.state[param] for param in params)
    values = [entry[name].clone() for entry in (one, two, three)]
    one[name], two[name], three[name] = two[name], three[name], one[name]
    optimizer.zero_grad()
    for param in params:  # gradients of zero: the average shrinks by lmbda, momentum by itself
        param.grad = torch.zeros(4)
    optimizer.first_step()
    optimizer.second_step()
    for entry, value in zip((one, two, three), [*values[1:], values[0]], strict=True):
        torch.testing.assert_close(entry[name], 0.9 * value)


def test_an_option_name_that_both_have_is_the_bases_with_a_prefix():
    """NOTE [options of one name]: Adadelta has a rho of its own."""
    ours, theirs = [Parameter(torch.ones(3))], [Parameter(torch.ones(3))]
    optimizer = SAM([{"params": ours, "base_rho": 0.7}], torch.optim.Adadelta, rho=0.0, lr=1.0, base_rho=0.5)
    plain = torch.optim.Adadelta(theirs, lr=1.0, rho=0.7)
    for i in range(4):
        for half in (optimizer.first_step, optimizer.second_step):
            ours[0].grad = torch.full((3,), float(i + 1))
            half()
        theirs[0].grad = torch.full((3,), float(i + 1))
        plain.step()
        if i == 1:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = SAM(ours, torch.optim.Adadelta, rho=0.3, lr=1.0)
            optimizer.load_state_dict(saved)
    assert torch.equal(ours[0], theirs[0])
    (group,) = optimizer.param_groups
    assert (group["rho"], group["base_rho"]) == (0.0, 0.7)
    optimizer.add_param_group({"params": [Parameter(torch.ones(1))], "base_rho": 0.2})
    assert (optimizer.param_groups[1]["rho"], optimizer.param_groups[1]["base_rho"]) == (0.3, 0.2)


def test_a_checkpoint_of_amsgrad_is_not_taken_for_plain_adam():
    params = [Parameter(torch.ones(3))]
    theirs = Adam(params, lr=0.1, amsgrad=True)
    params[0].grad = torch.ones(3)
    theirs.step()
    with pytest.raises(ValueError, match="checkpoint cannot be taken: group 0 asks Adam for amsgrad"):
        FriendlySAM(params, Adam, lr=0.1).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lmbda": 0.5}, "SAM has no average, which lmbda"),
        ({"sigma": 0.5}, "SAM has no average, which sigma"),
        ({"ema_dtype": torch.int8}, "SAM has no average, which ema_dtype"),
    ],
)
def test_sam_refuses_options_of_the_average(options, message):
    with pytest.raises(TypeError, match=message):
        SAM([Parameter(torch.ones(1))], SGD, lr=0.1, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"adaptive": "no"}, "adaptive must be True or False, not 'no'"),
        ({"master_weights": 2}, "master_weights must be True or False, not 2"),
        ({"eps": 1e-8, "perturb_eps": 1e-6}, "eps is another name of perturb_eps for SGD"),
        ({"ema_dtype": torch.bfloat16, "lmbda": 0.995}, "use lmbda <= 0.99,"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FriendlySAM([Parameter(torch.ones(1))], SGD, lr=0.1, **options)


def test_a_gradient_whose_memory_was_given_back_is_refused():
    w = Parameter(torch.ones(4))
    optimizer = SAM([w], rho=0.1, lr=1.0)
    step(optimizer, 1.0)
    w.grad = torch.ones(4)
    w.grad.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"grads\[0\] has no memory of its own"):
        optimizer.first_step()
    assert w.eq(0).all()
    step(optimizer, 1.0)
    assert w.eq(-1).all()


def test_moments_that_are_nan_are_still_state():
    w = Parameter(torch.ones(4))
    optimizer = SAM([w], Adam, rho=0.1, lr=1.0)
    w.grad = torch.ones(4)
    optimizer.first_step()
    w.grad = torch.full((4,), float("nan"))
    optimizer.second_step()
    exported = to_torch(optimizer.state_dict())
    assert exported["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    plain = Adam([w])
    plain.load_state_dict(exported)
    plain.step()


def test_momentum_that_has_seen_nothing_is_not_given_to_plain_torch():
    param = Parameter(torch.ones(3))
    optimizer = FriendlySAM([param], SGD, lr=0.1, momentum=0.9)
    step(optimizer, torch.inf)
    plain = SGD([param], lr=0.1, momentum=0.9)
    plain.load_state_dict(to_torch(optimizer.state_dict()))
    param.grad = torch.ones(3)
    plain.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.9))


# ---- A base that is not fused, and its state -----------------------------------------------------------------------


class MakesStateAtOnce(torch.optim.Optimizer):
    """Counts its steps in state that its constructor makes, and never looks whether it is there."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["count"] = torch.zeros(())

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["count"] += 1
                param.sub_(group["lr"] * param.grad)


@pytest.mark.parametrize("sigma", (0.0, 1.0))
def test_a_base_may_make_its_state_in_its_constructor(sigma):
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2))]
    optimizer = FriendlySAM(params, MakesStateAtOnce, lr=0.1, sigma=sigma)
    for count in (1, 2):
        step(optimizer, 1.0)
        assert [float(optimizer.state[param]["count"]) for param in params] == [count, count]
        assert all(("fsam_ema" in optimizer.state[param]) == (sigma > 0) for param in params)
    torch.testing.assert_close(params[0].detach(), torch.full((3,), 0.8))
    resumed = FriendlySAM(params, MakesStateAtOnce, lr=0.1, sigma=sigma)
    resumed.load_state_dict(optimizer.state_dict())
    step(resumed, 1.0)
    assert [float(resumed.state[param]["count"]) for param in params] == [3, 3]


# ---- A base that is not fused, in a CUDA graph ---------------------------------------------------------------------


def test_a_captured_step_of_another_base_is_undone_on_the_device(monkeypatch):
    params, twins = ([Parameter(torch.ones(3)), Parameter(torch.ones(2))] for _ in range(2))
    optimizer = FriendlySAM(params, torch.optim.RMSprop, lr=0.1, momentum=0.9)
    plain = FriendlySAM(twins, torch.optim.RMSprop, lr=0.1, momentum=0.9)
    step(optimizer, 1.0)
    step(plain, 1.0)
    monkeypatch.setattr("fsam_ext.step.passes.capturing", lambda device: True)
    for gradient in (torch.inf, 2.0, torch.nan, 0.5):
        step(optimizer, gradient)
        if gradient in (2.0, 0.5):
            step(plain, gradient)
        assert all(map(torch.equal, params, twins))
        for mine, other in zip(params, twins, strict=True):
            for name, value in plain.state[other].items():
                assert torch.equal(optimizer.state[mine][name], value)


def test_the_first_step_of_another_base_is_not_captured(monkeypatch):
    optimizer = FriendlySAM([Parameter(torch.ones(3))], torch.optim.RMSprop, lr=0.1)
    monkeypatch.setattr("fsam_ext.step.passes.capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="RMSprop made its state within a CUDA graph"):
        step(optimizer, 1.0)


# ---- Steps that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", (SGD, torch.optim.RMSprop))
def test_a_closure_step_that_fails_at_its_end_is_given_up(base, monkeypatch):
    model, calls = network(), []
    optimizer = FriendlySAM(model.parameters(), base, lr=0.01)
    batch = next(iter(batches(1)))

    def closure(spoil=False):
        calls.append(1)
        loss = backward(model, batch)
        if spoil and len(calls) == 2:
            model[4].weight.grad = model[4].weight.grad.to_sparse()
        return loss

    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step(lambda: closure(spoil=True))
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.state_dict()
    calls.clear()
    optimizer.step(closure)
    assert len(calls) == 2


def test_weights_written_after_the_perturbed_block_reach_the_masters():
    param = Parameter(torch.full((4,), 2.0, dtype=torch.bfloat16))
    optimizer = SAM([param], SGD, rho=0.0, lr=0.125, master_weights=True)
    step(optimizer, 1.0)
    param.grad = torch.ones_like(param)
    with optimizer.perturbed():
        param.grad = torch.ones_like(param)
    with torch.no_grad():
        param.clamp_(-1, 1)
    optimizer.step()
    assert torch.equal(param, torch.full_like(param, 0.875))


# ---- Coming from other code ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", (FriendlySAM, SAM))
@pytest.mark.parametrize("base, more", [(SGD, {"momentum": 0.9, "nesterov": False}), (AdamW, {})])
def test_the_lines_of_the_official_script(make, base, more):
    """github.com/nblt/F-SAM, train.py: a number for ``adaptive``, the scheduler on ``base_optimizer``."""
    model = network()
    options = {} if make is SAM else {"sigma": 1, "lmbda": 0.95}
    optimizer = make(model.parameters(), base, rho=0.1, adaptive=0, lr=0.1, weight_decay=1e-4, **options, **more)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer.base_optimizer, milestones=[2], gamma=0.2, last_epoch=-1)
    for batch in batches(3):
        backward(model, batch)
        optimizer.first_step(zero_grad=True)
        backward(model, batch)
        optimizer.second_step(zero_grad=True)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02)


def test_the_default_device_does_not_matter():
    param = Parameter(torch.ones(4))
    with torch.device("meta"):
        optimizer = FriendlySAM([param], SGD, lr=1.0)
        with torch.device("cpu"):
            gradient = torch.ones(4)
        for half in (optimizer.first_step, optimizer.second_step):
            param.grad = gradient.clone()
            half()
    assert torch.equal(param, torch.zeros(4))
