"""TwoPass on two ranks: DistributedDataParallel, a local first pass, FSDP 2."""

from __future__ import annotations

import os

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from ..distributed.ranks import run
from .reference import batches, distance, loss_of, network, train, train_with_local_first_passes

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from fsam_ext.integrations.accelerate import TwoPass

from .test_accelerate import loader, made, reset


class Counting(DistributedDataParallel):
    """Counts the backward passes in which ranks exchange gradients."""

    exchanges = 0

    def forward(self, *args, **kwargs):
        type(self).exchanges += self.require_backward_grad_sync and torch.is_grad_enabled()
        return super().forward(*args, **kwargs)


def begin_on_a_rank():
    rank = torch.distributed.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
    reset()


def on_a_rank(accumulate, options):
    begin_on_a_rank()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = network()
    optimizer = made(model, **options)
    prepared, optimizer, data = accelerator.prepare(model, optimizer, loader())
    assert accelerator.num_processes == 2 and type(prepared) is DistributedDataParallel
    prepared.__class__ = Counting
    Counting.exchanges = 0
    step = TwoPass(accelerator, prepared, optimizer, loss_of, clip=0.5)
    seen = []
    for batch in data:
        seen.append(batch)
        step(batch)
    return model.state_dict(), Counting.exchanges, seen


def local_by_hand(accumulate, seen, options):
    """The same with DistributedDataParallel and no_sync."""
    model = DistributedDataParallel(network())
    train_with_local_first_passes(model, made(model, **options), seen, accumulate, clip=0.5)
    return model.module.state_dict()


def both(accumulate, options):
    ours, exchanges, seen = on_a_rank(accumulate, options)
    return ours, exchanges, local_by_hand(accumulate, seen, options)


@pytest.mark.parametrize("accumulate", (1, 2))
def test_two_processes_equal_one(accumulate, record):
    """Each takes every second batch, so a step of both is one of twice as many micro-batches."""
    reference = network()
    train(reference, made(reference), batches(), accumulate=2 * accumulate, clip=0.5)
    for state, exchanges, _ in run(2, on_a_rank, accumulate, {}):
        assert exchanges == 2 * 4 / accumulate  # the last micro-batch of either pass
        record("accelerate", f"2 processes, accumulate {accumulate}", distance(state, reference.state_dict()), 1e-7)


@pytest.mark.parametrize("accumulate", (1, 2))
def test_a_local_first_pass(accumulate, record):
    options = {"ascent_sync": False, "ema_source": "descent"}
    for ours, exchanges, theirs in run(2, both, accumulate, options):
        assert exchanges == 4 / accumulate  # second passes only
        record("accelerate", f"2 processes, local first pass, accumulate {accumulate}", distance(ours, theirs), 1e-7)
    reference = network()
    train(reference, made(reference), batches(), accumulate=2 * accumulate, clip=0.5)
    assert distance(ours, reference.state_dict()) > 1e-4


def sharded_on_a_rank(accumulate, base):
    """Accelerate shards on accelerators only: here it is told to do it on the CPU."""
    begin_on_a_rank()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    accelerator.state.fsdp_plugin = plugin
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    model = network()
    model, optimizer, data = accelerator.prepare(model, made(model, base), loader())
    assert accelerator.is_fsdp2 and all(isinstance(param, DTensor) for param in model.parameters())
    step = TwoPass(accelerator, model, optimizer, loss_of, clip=0.5)
    for batch in data:
        step(batch)
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("base", (SGD, AdamW))
@pytest.mark.parametrize("accumulate", (1, 2))
def test_fsdp_2(accumulate, base, record):
    reference = network()
    train(reference, made(reference, base), batches(), accumulate=2 * accumulate, clip=0.5)
    for state in run(2, sharded_on_a_rank, accumulate, base):
        case = f"FSDP 2, {base.__name__}, accumulate {accumulate}"
        record("accelerate", case, distance(state, reference.state_dict()), 1e-7)
