"""fully_shard: kernels see shards, users see DTensors, and the run is that of one process with the whole batch."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fsam_ext import FriendlySAM
from fsam_ext.step import distributed

from ..conformance import every_pair, identical
from .ranks import run
from .training import (
    SGD,
    batches,
    distance,
    make,
    network,
    shard,
    state_vector,
    train,
    train_alone,
    vector,
    whole,
    wide_network,
)

STEPS = 12


def sharded(mesh=None, dtype=torch.float64, **kwargs):
    model = network(dtype)
    mesh = mesh or init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def trained(base, options, fsdp):
    model = sharded(**fsdp)
    optimizer = make(model, base, **options)
    history = train(model, optimizer, batches(STEPS))
    return history, state_vector(optimizer, "fsam_ema"), {name: float(x) for name, x in optimizer.stats().items()}


@every_pair(base=["sgd", "adamw", "rmsprop"], world=[2, 4], reshard=[True, False])
def test_equals_one_process_with_the_whole_batch(base, world, reshard):
    results = run(world, trained, base, {}, {"reshard_after_forward": reshard})
    alone, optimizer = train_alone(batches(STEPS), base)
    for history, ema, stats in results:
        assert identical(history, results[0][0])
        assert distance(history, alone) < 1e-12
        assert distance(ema, state_vector(optimizer, "fsam_ema")) < 1e-12
        assert stats == pytest.approx({name: float(x) for name, x in optimizer.stats().items()}, rel=1e-10)


def hybrid(base):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = sharded(mesh)
    optimizer = make(model, base)
    history = train(model, optimizer, batches(STEPS))
    return history, state_vector(optimizer, "fsam_ema"), float(optimizer.stats()["noise_norm"])


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_hybrid_sharding(base):
    alone, optimizer = train_alone(batches(STEPS), base)
    for history, ema, norm in run(4, hybrid, base):
        assert distance(history, alone) < 1e-12
        assert distance(ema, state_vector(optimizer, "fsam_ema")) < 1e-12
        assert norm == pytest.approx(float(optimizer.stats()["noise_norm"]), rel=1e-10)


def tensor_parallel_model(shards):
    """Column and row parallel layers, a norm with replicated DTensors, and a plain layer; fully sharded or not.

    Also returns the mesh of the data.
    """
    mesh = init_device_mesh("cpu", (2, 2) if shards else (1, 2), mesh_dim_names=("data", "tensor"))
    model = wide_network()
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    distribute_module(model[3], mesh["tensor"])
    model[3].register_forward_pre_hook(lambda m, args: DTensor.from_local(args[0], mesh["tensor"], [Replicate()]))
    model[3].register_forward_hook(lambda m, args, out: out.to_local())
    if shards:
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    return model, mesh["data"]


def tensor_parallel(base, options, shards):
    model, data_mesh = tensor_parallel_model(shards)
    optimizer = make(model, base, **options)
    history = train(model, optimizer, batches(STEPS), part=lambda batch: shard(batch, data_mesh))
    lies_on = {str(distributed.sharding(p) and distributed.sharding(p).mesh.ndim) for p in model.parameters()}
    return history, state_vector(optimizer, "fsam_ema"), float(optimizer.stats()["noise_norm"]), lies_on


@every_pair(shards=[True, False], base=["sgd", "adamw"], options=[{}, {"adaptive": True, "sigma": 0.9}])
def test_mixed_meshes_and_replicated_parameters(shards, base, options):
    results = run(4 if shards else 2, tensor_parallel, base, options, shards)
    alone, optimizer = train_alone(batches(STEPS), base, wide_network(), **options)
    for history, ema, norm, lies_on in results:
        assert lies_on == ({"1", "2"} if shards else {"None", "1"})
        assert identical(history, results[0][0])
        assert distance(history, alone) < 1e-12
        assert distance(ema, state_vector(optimizer, "fsam_ema")) < 1e-12
        assert norm == pytest.approx(float(optimizer.stats()["noise_norm"]), rel=1e-10)


def bytes_of_state(base):
    sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
    bench = importlib.import_module("scaling")
    model = nn.Sequential(*(nn.Linear(37, 37) for _ in range(bench.LAYERS)))
    for layer in model:
        fully_shard(layer)
    optimizer = make(model, base, **({"momentum": 0.9} if base == "sgd" else {}))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.first_step()
    optimizer.second_step()
    buffers = [buffer for flat in optimizer._passes.layout.flats.values() for buffer in map(flat.buffer, flat.names)]
    return sum(buffer.nbytes for buffer in buffers), bench.predicted_bytes(37, 4, bench.BASES[base])


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_state_of_the_rank_that_holds_most_is_what_the_page_says(base):
    """docs/scaling.md; the other ranks hold no more."""
    held = run(4, bytes_of_state, base)
    assert held[0][0] == held[0][1]
    assert all(nbytes <= held[0][0] for nbytes, _ in held)


def partial_gradients():
    """Sequence parallelism: replicated weights meet sharded activations; each rank has an addend of their gradient."""
    mesh = init_device_mesh("cpu", (2,))
    values = torch.ones(6).double(), torch.zeros(6).double()
    scale, shift = (nn.Parameter(distribute_tensor(value, mesh, [Replicate()])) for value in values)
    optimizer = FriendlySAM([scale, shift], SGD, rho=0.2, lr=0.05, momentum=0.9)
    history = []
    for x, y in batches(STEPS):
        for half in (optimizer.first_step, optimizer.second_step):
            out = DTensor.from_local(shard((x, y))[0], mesh, [Shard(0)]) * scale + shift
            (out.full_tensor().sum(1, keepdim=True) - y).square().mean().backward()
            assert scale.grad.placements[0].is_partial()
            half(zero_grad=True)
        history.append(vector([scale, shift]))
    return torch.stack(history)


def test_partial_gradients_are_summed():
    scale, shift = (nn.Parameter(v.double()) for v in (torch.ones(6), torch.zeros(6)))
    optimizer = FriendlySAM([scale, shift], SGD, rho=0.2, lr=0.05, momentum=0.9)
    history = []
    for x, y in batches(STEPS):
        for half in (optimizer.first_step, optimizer.second_step):
            ((x * scale + shift).sum(1, keepdim=True) - y).square().mean().backward()
            half(zero_grad=True)
        history.append(vector([scale, shift]))
    for mine in run(2, partial_gradients):
        assert distance(mine, torch.stack(history)) < 1e-12


def loads_between():
    """A plain checkpoint into a sharded optimizer, and a sharded one into a plain one, by load_state_dict itself."""
    plain = network()
    alone = make(plain, "adamw")
    train(plain, alone, batches(4), part=lambda batch: batch)
    model = sharded()
    for p, q in zip(model.parameters(), plain.parameters()):
        p.data.copy_(distribute_tensor(q.data, p.device_mesh, p.placements))
    optimizer = make(model, "adamw")
    optimizer.load_state_dict(alone.state_dict())
    for p, q in zip(model.parameters(), plain.parameters()):
        for name in ("fsam_ema", "exp_avg", "exp_avg_sq"):
            assert isinstance(optimizer.state[p][name], DTensor)
            assert identical(whole(optimizer.state[p][name]), alone.state[q][name])
    copy = network()
    copy.load_state_dict(plain.state_dict())
    back = make(copy, "adamw")
    back.load_state_dict(optimizer.state_dict())
    data = batches(4, first=4)
    expected = train(plain, alone, data, part=lambda batch: batch)
    return expected, train(copy, back, data, part=lambda batch: batch), train(model, optimizer, data)


def test_load_state_dict_takes_sharded_and_whole_state():
    for expected, back, mine in run(2, loads_between):
        assert identical(back, expected)
        assert distance(mine, expected) < 1e-12
