"""Tensors in ``state`` own their memory, though it is part of a flat buffer.

NOTE [state owns its memory]
Tools take state for plain tensors: they move it to the CPU for a while, save one parameter's alone, put other tensors
in its place. So nothing here keeps a flat buffer alive but the tensors in ``state`` that lie in it. Each has a storage
of its own over its part of the buffer (DLPack makes it, and holds the buffer until the storage goes): a file has its
own bytes, and when the last of them is let go, or given other memory (``tensor.data = ...``), the buffer is freed. A
FlatState knows its buffers by weak references.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.dlpack import from_dlpack, to_dlpack
from torch.utils.weak import TensorWeakRef


def owning_part(
    flat: Tensor, begin: int, numel: int, shape: Sequence[int], stride: Sequence[int]
) -> tuple[Tensor, TensorWeakRef | None]:
    """(a tensor of its own over elements of a flat buffer, what dies with its storage).

    The buffer lives as long as that storage does. A fake tensor has no storage to own: its part is a view.
    """
    if isinstance(flat, FakeTensor):
        return flat.as_strided(shape, stride, begin), None
    with torch.inference_mode(False):  # a view made there does not keep what it is a view of
        part = flat[begin : begin + numel]
        storage = from_dlpack(to_dlpack(part)).untyped_storage()
        return torch.empty(0, dtype=flat.dtype, device=flat.device).set_(storage, 0, shape, stride), TensorWeakRef(part)
