"""What differs between ranks, and what frameworks do to an optimizer: right, or a sentence that says what to do."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fsam_ext import SAM, FriendlySAM

from ..conformance import every_pair, identical
from .ranks import run
from .test_fsdp import sharded, tensor_parallel_model
from .training import (
    BASES,
    SGD,
    backward,
    batches,
    distance,
    make,
    network,
    shard,
    state_vector,
    train,
    train_alone,
    vector,
)

STEPS = 6


def state_of(optimizer):
    return {
        name: state_vector(optimizer, name) for name in sorted(optimizer.state[optimizer.param_groups[0]["params"][0]])
    }


# ---- Ranks that differ -----------------------------------------------------------------------------------------------


def inf_on_one_rank(base, kind, value, which):
    if kind == "fsdp":
        model, data_mesh = sharded(), None
    else:
        model, data_mesh = tensor_parallel_model(shards=True)
    optimizer = make(model, base)
    part = lambda batch: shard(batch, data_mesh)  # noqa: E731
    train(model, optimizer, batches(2), part)
    weights, state = vector(model.parameters()), state_of(optimizer)
    (batch,) = batches(1)
    backward(model, part(batch))
    if dist.get_rank() == 0:
        grads = [p.grad.to_local() for p in model.parameters() if p.grad.to_local().numel() > 0]
        grads[which].view(-1)[0] = value
    optimizer.first_step(zero_grad=True)
    unperturbed = identical(vector(model.parameters()), weights)
    backward(model, part(batch))
    optimizer.second_step(zero_grad=True)
    after = state_of(optimizer)
    return {
        "found": bool(optimizer.stats()["found_inf"]),
        "unperturbed": unperturbed,
        "weights": identical(vector(model.parameters()), weights),
        "state": all(identical(state[name], after[name]) for name in state),
    }


@every_pair(
    base=["sgd", "adamw", "rmsprop"],
    kind__which=[("fsdp", 0), ("mixed", 0), ("mixed", -1)],
    value=[math.inf, math.nan],
)
def test_one_rank_s_inf_skips_on_all(base, kind, which, value):
    """Also (-1) that of a parameter on a small mesh, which not every rank sums."""
    for outcome in run(4, inf_on_one_rank, base, kind, value, which):
        assert all(outcome.values()), outcome


def rank_without_gradients():
    model = sharded()
    optimizer = make(model)
    before = vector(model.parameters())
    norms = []
    for batch in batches(3):
        backward(model, shard(batch))
        if dist.get_rank() == 1:
            for p in model.parameters():
                p.grad = None
        squares = sum(
            (p.grad.to_local().square().sum() for p in model.parameters() if p.grad is not None), torch.zeros(())
        )
        optimizer.first_step(zero_grad=True)
        dist.all_reduce(squares := squares.double())
        norms.append((float(optimizer.stats()["grad_norm"]), float(squares.sqrt())))
        backward(model, shard(batch))
        if dist.get_rank() == 1:
            optimizer.zero_grad()
        optimizer.second_step(zero_grad=True)
    after = vector(model.parameters())
    return norms, bool(after.isfinite().all()), not identical(before, after)


def test_a_rank_without_gradients_takes_part():
    for norms, finite, moved in run(2, rank_without_gradients):
        assert finite and moved
        for found, expected in norms:
            assert found == pytest.approx(expected, rel=1e-12) and expected > 0


def gradient_in_one_pass_only(base, first):
    model = sharded()
    optimizer = make(model, base)
    train(model, optimizer, batches(2))
    p = model[2].weight
    before = p.to_local().clone()
    (batch,) = batches(1)
    backward(model, shard(batch))
    if dist.get_rank() == 0 and not first:
        p.grad = None
    optimizer.first_step(zero_grad=True)
    perturbed = p.to_local().clone()
    backward(model, shard(batch))
    if dist.get_rank() == 0 and first:
        p.grad = None
    optimizer.second_step()
    return identical(perturbed, before), identical(p.to_local(), before)


@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop"])
def test_a_gradient_in_the_first_pass_only(base):
    """Perturbed and restored, and not updated for lack of a second gradient."""
    (perturbed, restored), (_, other) = run(2, gradient_in_one_pass_only, base, True)
    assert (perturbed, restored, other) == (False, True, False)


@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop"])
def test_a_gradient_in_the_second_pass_only(base):
    (same, updated), _ = run(2, gradient_in_one_pass_only, base, False)
    assert same and not updated


# ---- What frameworks do ----------------------------------------------------------------------------------------------


# Since then torch marks what fully_shard replaces; before, nobody can tell (docs/scaling.md).
MARKS_REPLACED = torch.__version__ >= (2, 13)


def refused_where_that_can_be_told(optimizer):
    if MARKS_REPLACED:
        with pytest.raises(RuntimeError, match="was replaced in the model by fully_shard.*make the optimizer after"):
            optimizer.first_step()


def built_before():
    model = network()
    optimizer = make(model)
    fully_shard(model)
    (batch,) = batches(1)
    backward(model, shard(batch))
    refused_where_that_can_be_told(optimizer)
    # As Accelerate does: the same groups with the new parameters.
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.zero_grad()
    return train(model, optimizer, batches(STEPS))


def trained_before():
    """Stepped as a plain model first: that the lists have not changed does not hide that they are of no use now."""
    model = network()
    optimizer = make(model)
    train(model, optimizer, batches(1))
    fully_shard(model[0])
    (batch,) = batches(1)
    backward(model, shard(batch))
    refused_where_that_can_be_told(optimizer)


def test_built_before_fully_shard():
    alone, _ = train_alone(batches(STEPS))
    for history in run(2, built_before):
        assert distance(history, alone) < 1e-12
    run(2, trained_before)


def rewritten_by_accelerate():
    """Accelerate puts placeholders into the groups while it shards, and the new parameters in their places after."""
    model = network()
    optimizer = make(model)
    addresses = {p.data_ptr(): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.empty(1, dtype=p.dtype)
            group["params"][i].data_ptr = p.data_ptr
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    new = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[addresses[p.data_ptr()]] for p in group["params"]]
    return train(model, optimizer, batches(STEPS))


def test_group_params_rewritten_as_accelerate_does():
    alone, _ = train_alone(batches(STEPS))
    for history in run(2, rewritten_by_accelerate):
        assert distance(history, alone) < 1e-12


def grown():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = network()
    for layer in (model[0], model[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh["replicate"])
    cls, kwargs = BASES["sgd"]
    first, *rest = [layer for layer in model if isinstance(layer, nn.Linear)]
    optimizer = FriendlySAM(first.parameters(), cls, rho=0.2, **kwargs)
    part = lambda batch: shard(batch, mesh["replicate"])  # noqa: E731
    history = [train(model, optimizer, batches(3), part)]
    for layer in rest:
        optimizer.add_param_group({"params": layer.parameters(), "rho": 0.1})
        for p in model.parameters():
            p.grad = None
        history.append(train(model, optimizer, batches(3), part))
    return torch.cat(history)


def test_add_param_group_on_another_mesh():
    model = network()
    cls, kwargs = BASES["sgd"]
    first, *rest = [layer for layer in model if isinstance(layer, nn.Linear)]
    optimizer = FriendlySAM(first.parameters(), cls, rho=0.2, **kwargs)
    history = [train(model, optimizer, batches(3), lambda batch: batch)]
    for layer in rest:
        optimizer.add_param_group({"params": layer.parameters(), "rho": 0.1})
        for p in model.parameters():
            p.grad = None
        history.append(train(model, optimizer, batches(3), lambda batch: batch))
    for mine in run(4, grown):
        assert distance(mine, torch.cat(history)) < 1e-12


def kept_after_backward(base):
    model = sharded()
    model.set_reshard_after_backward(False)
    optimizer = make(model, base)
    history = []
    for batch in batches(STEPS):
        backward(model, shard(batch))
        assert not isinstance(model[0].weight, DTensor)  # a gathered copy
        optimizer.first_step(zero_grad=True)
        backward(model, shard(batch))
        optimizer.second_step(zero_grad=True)
        history.append(vector(p for g in optimizer.param_groups for p in g["params"]))
    return torch.stack(history)


@pytest.mark.parametrize("base", ["sgd", "rmsprop"])
def test_set_reshard_after_backward_false(base):
    """Without fresh copies the second pass would see the weights of the first."""
    alone, _ = train_alone(batches(STEPS), base)
    for history in run(2, kept_after_backward, base):
        assert distance(history, alone) < 1e-12


def looked_at_between():
    model = sharded(reshard_after_forward=False)
    optimizer = make(model)
    seen = []
    for x, y in batches(3):
        backward(model, shard((x, y)))
        with torch.no_grad():
            seen.append(model(x))
        optimizer.first_step(zero_grad=True)
        with torch.no_grad():
            seen.append(model(x))
        optimizer.restore()
        with torch.no_grad():
            seen.append(model(x))
    return torch.stack(seen)


def test_forwards_without_a_backward_see_the_present_weights():
    for seen in run(2, looked_at_between):
        for before, perturbed, restored in seen.unflatten(0, (3, 3)):
            assert identical(before, restored)
            assert not torch.allclose(before, perturbed, rtol=1e-6)


# ---- What is refused -------------------------------------------------------------------------------------------------


def refusals():
    (batch,) = batches(1)
    for use_orig_params in (False, True):
        old = FullyShardedDataParallel(network(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        with pytest.raises(TypeError, match="belongs to FullyShardedDataParallel.*fully_shard instead"):
            make(old)
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(ValueError, match="parameter 0 of group 0.*Partial.*redistribute it"):
        FriendlySAM([nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))], SGD, lr=0.1)
    if dist.get_rank() == 1:
        alone = DeviceMesh("cpu", [0], _init_backend=False)
        with pytest.raises(ValueError, match="which this rank is not part of"):
            FriendlySAM([nn.Parameter(DTensor.from_local(torch.ones(3), alone, [Replicate()]))], SGD, lr=0.1)
    gap = torch.ones(6, 2)[:, :1]
    with pytest.raises(ValueError, match="strides \\(2, 1\\) with gaps"):
        FriendlySAM([nn.Parameter(DTensor.from_local(gap, mesh, [Shard(0)]))], SGD, lr=0.1)
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    optimizer = FriendlySAM([p], SGD, lr=0.1)
    before = p.to_local().clone()
    for other in (DeviceMesh("cpu", [1, 0]),):
        p.grad = distribute_tensor(torch.ones(4), other, [Shard(0)])
        with pytest.raises(RuntimeError, match="the gradient of parameter 0 of group 0.*lies on"):
            optimizer.first_step()
    plain = nn.Parameter(torch.ones(4))
    optimizer.add_param_group({"params": [plain]})
    p.grad = None
    plain.grad = torch.ones(4)
    with torch.no_grad():
        optimizer.first_step()
    optimizer.restore()
    assert identical(p.to_local(), before)


def test_refusals():
    run(2, refusals)


def wrapped_by_zero_redundancy():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for cls in (SAM, FriendlySAM):
        model = network()
        with pytest.raises(TypeError, match="ZeroRedundancyOptimizer gives each rank a share .* use .*fully_shard"):
            ZeroRedundancyOptimizer(model.parameters(), cls, base_optimizer=torch.optim.SGD, rho=0.5, lr=0.1)
        cls(model.parameters(), torch.optim.SGD, lr=0.1)  # beside it there is nothing to refuse


def test_zero_redundancy_optimizer_is_refused():
    """Each rank would measure the norm of its own share: another algorithm, without a word."""
    run(2, wrapped_by_zero_redundancy)
