"""All that the suite asks of a GPU beyond running tensors. Tests put stubs in the place of ``torch.cuda``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch


def serves(device: torch.device) -> bool:
    """Whether work on the device is queued, and events, graphs and a cache to flush are to be had."""
    return device.type == "cuda"


def free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


def cache_bytes(device: torch.device) -> int:
    """Of the L2."""
    return torch.cuda.get_device_properties(device).L2_cache_size


@cache
def flusher(device: torch.device, nbytes: int) -> torch.Tensor:
    """Memory that fills the L2 and drives everything else out when it is written: one for all clocks."""
    return torch.empty(2 * nbytes, dtype=torch.uint8, device=device)


def capture(call: Callable[[], None]) -> Callable[[], None]:
    """The replay of what a call queues, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
