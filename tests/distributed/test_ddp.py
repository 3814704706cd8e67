"""DistributedDataParallel: gradients are the same on all ranks, and so has everything else to be, bit for bit."""

from __future__ import annotations

import pytest
from torch.nn.parallel import DistributedDataParallel

from ..conformance import identical
from .ranks import run
from .training import batches, distance, make, network, state_vector, train, train_alone

STEPS = 12


def trained(base, options, ddp):
    model = DistributedDataParallel(network(), **ddp)
    optimizer = make(model, base, **options)
    history = train(model, optimizer, batches(STEPS))
    return history, state_vector(optimizer, "ema")


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
        assert distance(ema, state_vector(optimizer, "ema")) < 1e-12
