"""DistributedDataParallel: gradients are the same on all ranks, and so has everything else to be, bit for bit.

And m-sharpness, where the first pass is each rank's own.
"""

from __future__ import annotations

import io
import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..conformance import identical
from .ranks import run
from .test_fsdp import sharded
from .training import (
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

STEPS = 12


def trained(base, options, ddp):
    model = DistributedDataParallel(network(), **ddp)
    optimizer = make(model, base, **options)
    history = train(model, optimizer, batches(STEPS))
    return history, state_vector(optimizer, "fsam_ema")


@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize(
    "ddp", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}, {"find_unused_parameters": True}], ids=str
)
def test_equals_one_process_with_the_whole_batch(base, ddp):
    results = run(2, trained, base, {}, ddp)
    alone, optimizer = train_alone(batches(STEPS), base)
    for history, ema in results:
        assert identical(history, results[0][0])
        assert identical(ema, results[0][1])
        assert distance(history, alone) < 1e-12
        assert distance(ema, state_vector(optimizer, "fsam_ema")) < 1e-12


# ---- m-sharpness -----------------------------------------------------------------------------------------------------


class Collectives:
    """Counts collectives by the profiler: DDP's own are started where no dispatch mode sees them."""

    def __init__(self):
        self.count = 0

    def __enter__(self):
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._profile.__enter__()
        return self

    def __exit__(self, *exception):
        self._profile.__exit__(*exception)
        self.count += sum("allreduce" in event.name for event in self._profile.events())


def local_ascents(base, options, inf_at=None, resume_at=None):
    """First passes inside no_sync. Returns weights after each step, the last average, and what each pass sent."""
    model = DistributedDataParallel(network())
    optimizer = make(model, base, ascent_sync=False, **options)
    history, sent = [], []
    for step, batch in enumerate(batches(STEPS)):
        if step == resume_at:  # one checkpoint for each rank
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            saved.seek(0)
            optimizer = make(model, base, ascent_sync=False, **options)
            optimizer.load_state_dict(torch.load(saved, weights_only=True))
        with model.no_sync(), Collectives() as first:
            backward(model, shard(batch))
        if step == inf_at and dist.get_rank() == 1:
            model.module[0].weight.grad[0, 0] = math.inf
        with first:
            optimizer.first_step(zero_grad=True)
        with Collectives() as second:
            backward(model, shard(batch))
        with Collectives() as third:
            optimizer.second_step(zero_grad=True)
        history.append(vector(model.parameters()))
        sent.append((first.count, second.count, third.count))
    return torch.stack(history), state_vector(optimizer, "fsam_ema"), sent


def simulated(base, options, ranks=2):
    """The same in one process: a model for each rank, whose second gradients are averaged by hand."""
    models = [network() for _ in range(ranks)]
    optimizers = [make(model, base, **options) for model in models]
    history = []
    for batch in batches(STEPS):
        parts = list(zip(*(part.chunk(ranks) for part in batch)))
        for model, optimizer, part in zip(models, optimizers, parts):
            backward(model, part)
            optimizer.first_step(zero_grad=True)
            backward(model, part)
        for params in zip(*(model.parameters() for model in models)):
            mean = sum(p.grad for p in params) / ranks
            for p in params:
                p.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.second_step(zero_grad=True)
        history.append(vector(models[0].parameters()))
    return torch.stack(history), [state_vector(optimizer, "fsam_ema") for optimizer in optimizers]


@pytest.mark.parametrize("source", ["ascent", "descent"])
@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop"])
def test_local_ascents(base, source):
    options = {"ema_source": source}
    results = run(2, local_ascents, base, options)
    expected, averages = simulated(base, options)
    for (history, ema, sent), average in zip(results, averages):
        assert identical(history, results[0][0])
        assert distance(history, expected) < 1e-12
        assert distance(ema, average) < 1e-12
        assert all(first == third == 0 and second > 0 for first, second, third in sent)
    # Of each rank's own gradients, or of those that all have.
    assert identical(results[0][1], results[1][1]) == (source == "descent")


@pytest.mark.parametrize("source", ["ascent", "descent"])
@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop"])
def test_an_inf_in_a_local_ascent_does_not_part_the_ranks(base, source):
    results = run(2, local_ascents, base, {"ema_source": source}, 3)
    for history, ema, _ in results:
        assert identical(history, results[0][0])
        assert history.isfinite().all() and ema.isfinite().all()
        assert not torch.equal(history[3], history[2])  # the update was made


@pytest.mark.parametrize("source", ["ascent", "descent"])
def test_a_checkpoint_for_each_rank_resumes_bit_for_bit(source):
    through = run(2, local_ascents, "adamw", {"ema_source": source})
    resumed = run(2, local_ascents, "adamw", {"ema_source": source}, None, 5)
    for (history, ema, _), (again, average, _) in zip(through, resumed):
        assert identical(history, again) and identical(ema, average)


def local_ascent_of_shards():
    model = sharded()
    optimizer = make(model, ascent_sync=False)
    (batch,) = batches(1)
    backward(model, shard(batch))
    with pytest.raises(RuntimeError, match="ascent_sync=False needs gradients of this rank alone"):
        optimizer.first_step()
    optimizer.ascent_sync = True
    optimizer.first_step()  # nothing had changed


def test_local_ascents_of_sharded_parameters_are_refused():
    run(2, local_ascent_of_shards)
