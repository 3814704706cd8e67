"""Where the rows are: tables of addresses on the device, and the arguments by which a kernel finds them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import chain

import torch
import triton
from torch import Tensor

from ..capture import capturing as is_capturing
from .rows import Rows


# NOTE [tables under graph capture]
# A graph replays its copies: one from the host would read memory that has long been freed. So
# under capture the numbers travel as arguments of kernels, which the graph keeps, and the table lives
# in the graph's own memory pool; it is not cached, because it holds nothing before the first replay.
def to_device(values: Sequence[int], device: torch.device, capturing: bool) -> Tensor:
    """The int64 values on the device, without a synchronisation."""
    signed = [value - (value >> 63 << 64) for value in values]  # Intel's addresses have the top bit
    if capturing:
        numbers = torch.zeros(len(signed), dtype=torch.int64, device=device)
        torch._foreach_add_(numbers.unbind(), signed)
        return numbers
    # The pinned buffer's allocator keeps it until the copy is done.
    host = torch.tensor(signed, dtype=torch.int64, pin_memory=device.type != "cpu")
    return host.to(device, non_blocking=True)


@functools.lru_cache(maxsize=256)
def rows_of_chunks(rows: Rows, device: torch.device, stream: int, capturing: bool = False) -> Tensor:
    """The row of each chunk, int32."""
    first = to_device(rows.first_chunks, device, capturing)
    chunks = torch.arange(rows.chunks, device=device)
    return torch.searchsorted(first, chunks, right=True, out_int32=True) - 1


@functools.lru_cache(maxsize=1024)
def table(
    rows: Rows,
    addresses: tuple[int, ...],
    grad_addresses: tuple[int, ...],
    device: torch.device,
    stream: int,
    capturing: bool = False,
) -> Tensor:
    """One entry a row: address, gradient's address, numel, offset, first chunk.

    Cached for each stream: it is written in the order of the stream that reads it.
    """
    columns = (addresses, grad_addresses, rows.numels, rows.offsets, rows.first_chunks)
    return to_device(list(chain.from_iterable(zip(*columns))), device, capturing)


def tables(
    rows: Rows,
    params: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The table, and the row of each chunk: made anew only where something has moved."""
    addresses = tuple(map(Tensor.data_ptr, params))
    grad_addresses = addresses if grads is None else tuple(map(Tensor.data_ptr, grads))
    if device.type == "cpu":
        stream, capturing = 0, False
    else:
        stream = triton.runtime.driver.active.get_current_stream(device.index)
        capturing = is_capturing(device)
    if capturing:
        return (
            table.__wrapped__(rows, addresses, grad_addresses, device, stream, True),
            rows_of_chunks.__wrapped__(rows, device, stream, True),
        )
    return (
        table(rows, addresses, grad_addresses, device, stream),
        rows_of_chunks(rows, device, stream),
    )
