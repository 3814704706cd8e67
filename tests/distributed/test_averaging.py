"""Local steps and torch's model averagers: what a rank's weights become is the ranks' average, masters included."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from ..conformance import identical
from ..test_masters import Run
from .ranks import run
from .training import SGD, AdamW, vector


def trained(dtype, base, flatten, every):
    """The weights after each average: of four steps, two follow one, and Run compares each with plain PyTorch."""
    torch.manual_seed(dist.get_rank())
    own = Run(dtype, base, flatten, every=every)
    averager = PeriodicModelAverager(period=2)
    averages = []
    for number in range(4):
        own.step()
        if number % 2 == 0:
            own.write(lambda model: averager.average_parameters(model.parameters()))
            averages.append(vector(own.params))
        else:
            averager.average_parameters(own.model.parameters())
    return averages


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("flatten", [None, True], ids=["one by one", "flat"])
@pytest.mark.parametrize("base", [SGD, AdamW])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_average_of_the_ranks_is_trained_on(dtype, base, flatten, every):
    first, second = run(2, trained, dtype, base, flatten, every)
    assert len(first) == 2 and all(map(identical, first, second))
