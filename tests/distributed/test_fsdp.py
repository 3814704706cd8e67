"""fully_shard: kernels see shards, users see DTensors, and the run is that of one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ..conformance import identical
from .ranks import run
from .training import backward, batches, distance, make, network, shard, state_vector, train, train_alone

STEPS = 12


def sharded(mesh=None, **kwargs):
    model = network()
    mesh = mesh or init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def trained(base, options, fsdp):
    model = sharded(**fsdp)
    optimizer = make(model, base, **options)
    history = train(model, optimizer, batches(STEPS))
    return history, state_vector(optimizer, "ema"), {name: float(x) for name, x in optimizer.stats().items()}


@pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "keep"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop"])
def test_equals_one_process_with_the_whole_batch(base, world, reshard):
    results = run(world, trained, base, {}, {"reshard_after_forward": reshard})
    alone, optimizer = train_alone(batches(STEPS), base)
    for history, ema, stats in results:
        assert identical(history, results[0][0])
        assert distance(history, alone) < 1e-12
        assert distance(ema, state_vector(optimizer, "ema")) < 1e-12
        assert stats == pytest.approx({name: float(x) for name, x in optimizer.stats().items()}, rel=1e-10)
