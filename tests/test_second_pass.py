"""What loops and frameworks do around the second pass: idle closures, gradients that nobody used, wrappers."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fsam_ext import SAM, FriendlySAM, SecondPass, flatten_parameters
from fsam_ext.state.flatten import REGISTRY
from fsam_ext.step import closures

X, Y = torch.randn(32, 10), torch.randint(3, (32,))


def made(dropout=0.0, flattened=False, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3))
    if flattened:
        flatten_parameters(model, grads=True)
    return model, FriendlySAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, **options)


def backward(model, part=slice(None)):
    loss = cross_entropy(model(X[part]), Y[part])
    loss.backward()
    return loss


def weights(model):
    return torch.cat([param.detach().flatten() for param in model.parameters()])


@pytest.mark.parametrize("flattened", (False, True), ids=("apart", "flattened"))
def test_a_closure_that_does_nothing_finishes_with_the_gradient_that_is_there(flattened):
    """Lightning's manual optimization hands such a closure to every step()."""
    ours, optimizer = made(flattened=flattened)
    theirs, plain = made(flattened=flattened)
    for _ in range(3):
        for model, one in ((ours, optimizer), (theirs, plain)):
            one.zero_grad()
            backward(model)
            one.first_step(zero_grad=True)
            backward(model)
        optimizer.step(lambda: None)
        plain.second_step()
    assert torch.equal(weights(ours), weights(theirs))


def test_a_closure_that_does_nothing_makes_the_plain_step_of_a_schedule():
    ours, optimizer = made(start=100)
    theirs, plain = made(start=100)
    for _ in range(3):
        for model, one in ((ours, optimizer), (theirs, plain)):
            one.zero_grad()
            backward(model)
        optimizer.step(lambda: None)
        plain.step()
    assert torch.equal(weights(ours), weights(theirs))
    assert not torch.equal(weights(ours), weights(made()[0]))


def test_a_closure_that_does_nothing_cannot_make_both_passes():
    model, optimizer = made()
    before = weights(model)
    backward(model)
    kept = [param.grad for param in model.parameters()]
    with pytest.raises(RuntimeError, match="needs a closure that computes the loss and calls backward"):
        optimizer.step(lambda: None)
    assert torch.equal(weights(model), before)
    assert all(param.grad is grad for param, grad in zip(model.parameters(), kept))


def test_a_closure_that_does_nothing_has_no_second_gradient_to_take():
    """The first one is still there, which is no second one."""
    model, optimizer = made()
    before = weights(model)
    backward(model)
    optimizer.first_step()
    optimizer.step(lambda: None)
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("warm", (False, True), ids=("first step", "later step"))
def test_accumulated_gradients_are_not_thrown_away_in_silence(warm):
    model, optimizer = made()
    if warm:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # gradients of a step that is over are thrown away, as ever
            optimizer.step(lambda: backward(model))
            optimizer.step(lambda: backward(model))
    optimizer.zero_grad()
    backward(model, slice(0, 16))
    with pytest.warns(UserWarning, match=r"threw away gradients .* step\(closure, accumulate=batches\)"):
        optimizer.step(lambda: backward(model, slice(16, 32)))
    backward(model, slice(0, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        optimizer.step(lambda: backward(model, slice(16, 32)))


def test_gradients_of_a_step_that_was_given_up_are_thrown_away_without_a_word():
    model, optimizer = made()
    optimizer.step(lambda: backward(model))
    backward(model)
    optimizer.first_step(zero_grad=True)
    backward(model)
    optimizer.restore()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: backward(model))


@pytest.mark.parametrize("flattened", (False, True), ids=("apart", "flattened"))
def test_a_closure_costs_no_look_at_each_gradient(flattened, monkeypatch):
    """Whether there are gradients that nobody used is told by one parameter, once there was a step."""
    model, optimizer = made(flattened=flattened)
    optimizer.step(lambda: backward(model))
    looks = []
    monkeypatch.setattr(REGISTRY, "get", lambda param, get=REGISTRY.get: looks.append(param) or get(param))
    for clears in (False, True):
        if clears:
            optimizer.zero_grad()
            looks.clear()
        closures.SetAside(list(model.parameters()), optimizer._passes.backward_count, lambda: None)
        assert looks == []


def test_state_that_only_was_asked_for_is_no_step_of_a_schedule():
    """torch.distributed.checkpoint makes a step that changes nothing."""
    model, optimizer = made(start=1000)
    optimizer.param_groups[0]["lr"] = 0.0
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert optimizer.state
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del optimizer
        gc.collect()


class Wrapper:
    """Borrows the optimizer's class and passes on what it lacks, as the wrappers of Lightning and Accelerate do."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self._optimizer, name)

    def step(self, closure=None):
        return self._optimizer.step(closure)


def test_wrappers_that_borrow_the_class():
    ours, optimizer = made()
    theirs, plain = made()
    wrapped = Wrapper(optimizer)
    for _ in range(3):
        for model, one in ((ours, wrapped), (theirs, plain)):
            one.zero_grad()
            backward(model)
            one.first_step(zero_grad=True)
            assert one.is_perturbed
            with pytest.raises(RuntimeError, match="while the weights are perturbed"):
                one.state_dict()
            backward(model)
            one.second_step()
    assert torch.equal(weights(ours), weights(theirs))
    assert not optimizer.is_perturbed
    wrapped.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["fsam_step"] == 3 and "param_groups" not in vars(wrapped)
    optimizer.zero_grad()
    plain.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(cross_entropy(ours(X), Y)).backward()
    wrapped.first_step(zero_grad=True, grad_scaler=scaler)
    scaler.scale(cross_entropy(ours(X), Y)).backward()
    scaler.step(optimizer)
    backward(theirs)
    plain.first_step(zero_grad=True)
    backward(theirs)
    plain.second_step()
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-6)


def test_only_gradscalers_are_told_that_step_unscales():
    """Lightning refuses to clip gradients of optimizers that say so, in bfloat16 too, where nothing is scaled."""
    _, optimizer = made()
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)


def test_a_second_closure_that_says_none_gives_the_step_up():
    """Composer's closures return None where a gradient overflowed."""
    model, optimizer = made()
    before, calls = weights(model), []

    def closure():
        calls.append(None)
        loss = backward(model)
        if len(calls) < 2:
            return loss
        next(model.parameters()).grad.fill_(torch.inf)
        return None

    assert optimizer.step(closure) is not None
    assert torch.equal(weights(model), before) and not optimizer.is_perturbed
    calls.clear()
    optimizer.step(lambda: None if backward(model) is None else None)  # none of its calls says anything
    assert not torch.equal(weights(model), before)


def test_the_second_pass_may_draw_the_same_dropout_masks():
    masks = []
    model, optimizer = made(dropout=0.5)
    model[2].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    optimizer.step(lambda: backward(model), replay_rng=True)
    assert torch.equal(*masks)
    after = torch.rand(1)
    masks.clear()
    torch.manual_seed(0)
    optimizer.step(lambda: backward(model))
    assert not torch.equal(*masks)
    assert after != torch.rand(1)


@pytest.mark.parametrize("how", ("closure", "perturbed"))
def test_a_second_pass_through_the_first_graph_says_what_to_do(how):
    model, optimizer = made()
    loss = cross_entropy(model(X), Y)
    before = weights(model)
    with pytest.raises(RuntimeError, match="needs a forward pass of its own"):
        if how == "closure":
            optimizer.step(loss.backward)
        else:
            loss.backward()
            with optimizer.perturbed():
                loss.backward()
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("zero_grad", (True, False))
def test_a_step_without_a_second_gradient_is_refused(zero_grad):
    model, optimizer = made()
    for _ in range(2):  # the second time backward passes are counted
        before = weights(model)
        optimizer.zero_grad()
        backward(model)
        optimizer.first_step(zero_grad=zero_grad)
        if zero_grad or _ == 1:
            with pytest.raises(RuntimeError, match="without a second gradient"):
                optimizer.second_step()
            optimizer.restore()
            assert torch.equal(weights(model), before)
        backward(model)
        optimizer.restore()
        optimizer.step(lambda: backward(model))


def test_a_schedule_that_never_ascended_says_so_at_its_end():
    model, optimizer = made(start=1000)
    optimizer.step(lambda: backward(model))
    with pytest.warns(UserWarning, match="1 steps were made and none had an ascent"):
        del optimizer
        gc.collect()
    model = nn.Linear(2, 2)
    optimizer = SAM(model.parameters(), start=0)
    optimizer.step(lambda: model(torch.ones(1, 2)).sum().backward())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del optimizer
        gc.collect()


# ---- SecondPass ------------------------------------------------------------------------------------------------------


def parts():
    return [slice(i, i + 8) for i in (0, 8, 16, 24)]


def with_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    return model, FriendlySAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, every=2)


def test_the_second_pass_replays_what_the_first_saw():
    """Against the two passes written by hand: micro-batches, dropout, statistics, and where random numbers go on."""
    (ours, optimizer), (theirs, plain) = with_statistics(), with_statistics()
    for step in range(4):
        torch.manual_seed(step)
        second = SecondPass(optimizer, ours)
        optimizer.zero_grad()
        for part in parts():
            second.keep(part)
            (backward_of(ours, part) / 4).backward()
        losses = second.run(lambda part: (backward_of(ours, part) / 4).backward() or part)
        assert losses == (parts() if step % 2 == 0 else [])
        optimizer.step()
        drawn = torch.rand(1)
        torch.manual_seed(step)
        plain.zero_grad()
        for part in parts():
            (backward_of(theirs, part) / 4).backward()
        after = torch.get_rng_state()
        if plain.ascends:
            statistics = [buffer.clone() for buffer in theirs.buffers()]
            plain.first_step(zero_grad=True)
            torch.manual_seed(step)
            for part in parts():
                (backward_of(theirs, part) / 4).backward()
            for buffer, value in zip(theirs.buffers(), statistics):
                buffer.copy_(value)
        plain.step()
        torch.set_rng_state(after)
        assert torch.equal(drawn, torch.rand(1))
        assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def backward_of(model, part):
    return cross_entropy(model(X[part]), Y[part])


def test_an_exception_in_the_second_pass_restores_the_weights():
    model, optimizer = made()
    before = weights(model)
    second = SecondPass(optimizer, model)
    second.keep(0)
    backward(model)
    with pytest.raises(KeyboardInterrupt):
        second.run(lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert torch.equal(weights(model), before) and not optimizer.is_perturbed and len(second) == 0


def test_what_cannot_be_replayed_is_refused():
    model, optimizer = made()
    with pytest.raises(TypeError, match="a batch of type generator is used up by the first pass"):
        SecondPass(optimizer, model).keep(i for i in range(3))
    with pytest.raises(TypeError, match="a batch of type list_iterator is used up by the first pass"):
        SecondPass(optimizer, model).keep({"x": X, "more": [iter([1])]})
    with pytest.raises(TypeError, match="optimizer must be a fsam_ext.FriendlySAM or SAM, not SGD"):
        SecondPass(torch.optim.SGD(model.parameters()))
    with pytest.raises(RuntimeError, match=r"call keep\(batch\) before each forward pass"):
        SecondPass(optimizer).run(backward)


def test_a_first_pass_may_take_its_batch_apart():
    model, optimizer = made()
    second, batch = SecondPass(optimizer, model), UserDict(x=X, rest={"y": [Y]})
    second.keep((batch, 0))
    cross_entropy(model(batch.pop("x")), batch["rest"].pop("y")[0]).backward()
    (kept,) = second.run(lambda kept: cross_entropy(model(kept[0]["x"]), Y).backward() or kept[0])
    assert kept["x"] is X and kept is not batch


def test_no_framework_is_imported():
    code = (
        "import sys, fsam_ext; print([name for name in sys.modules if 'integrations' in name and 'fsam_ext' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
