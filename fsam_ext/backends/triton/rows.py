"""What a call's rows look like: sizes, strides and offsets, checked, cut into chunks and cached."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from .. import ops


@dataclass(frozen=True, eq=False)
class Rows:
    """What a call's tensors look like, but not where they are. Equal rows are one cached object."""

    numels: tuple[int, ...]
    offsets: tuple[int, ...]
    first_chunks: tuple[int, ...]
    chunks: int
    extent: int  # elements that a flat buffer needs
    in_blocks: bool  # each row starts a block of an int8 average
    reordered: tuple[int, ...]  # rows whose gradient lies in memory in another order


def _is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements fill one block of memory without gaps or overlap, in any order."""
    expected = 1
    for step, length in sorted((st, n) for st, n in zip(stride, size) if n != 1):
        if step != expected:
            return False
        expected *= length
    return True


# NOTE [what is checked in each call]
# A row costs a few hundred nanoseconds a call: sizes, strides and addresses are read each time,
# because a gradient may be another tensor at the address of the last one. What follows from sizes
# and strides is cached under them, and the table on the device under the addresses.
@functools.lru_cache(maxsize=1024)
def rows_of(sizes: tuple, strides: tuple, grad_sizes: tuple, grad_strides: tuple, offsets: tuple[int, ...]) -> Rows:
    """Checks the shapes and the memory of the rows, and cuts them into chunks."""
    reordered = []
    for i, (size, stride) in enumerate(zip(sizes, strides)):
        if grad_sizes and grad_sizes[i] != size:
            raise RuntimeError(f"fsam_ext: grads[{i}] has another shape than its parameter")
        if 0 in size:
            continue
        if not _is_dense(size, stride):
            raise RuntimeError(
                f"fsam_ext: params[{i}] has gaps or overlaps in memory; only dense strides are "
                "supported: call .contiguous() on it"
            )
        # A stride along a dimension of size 1 means nothing.
        if grad_sizes and any(a != b and n != 1 for a, b, n in zip(stride, grad_strides[i], size)):
            reordered.append(i)
    if any(offset < 0 for offset in offsets):
        raise RuntimeError("fsam_ext: offsets must not be negative")
    numels = tuple(torch.Size(size).numel() for size in sizes)
    chunks = [-(-numel // ops.CHUNK) for numel in numels]
    return Rows(
        numels,
        offsets,
        tuple(accumulate(chunks[:-1], initial=0)),
        sum(chunks),
        max(offset + numel for offset, numel in zip(offsets, numels)),
        not any(offset % ops.QUANTIZED for offset in offsets),
        tuple(reordered),
    )
