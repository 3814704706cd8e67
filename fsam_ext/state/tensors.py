"""Which parameters and gradients can be used, and the sentences for those that cannot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import shards
from .shards import Describe

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def name_of(param_groups: list[dict[str, Any]], param: Tensor) -> str:
    """A parameter's name, or its place and shape, for messages."""
    for g, group in enumerate(param_groups):
        for i, other in enumerate(group["params"]):
            if other is param:
                if "param_names" in group:
                    return f"parameter '{group['param_names'][i]}'"
                return f"parameter {i} of group {g} (shape {tuple(param.shape)})"
    return f"a parameter of shape {tuple(param.shape)}"


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlap, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def check_parameter(param: Tensor, describe: Describe) -> None:
    """Raises ValueError or TypeError for a parameter that no backend can perturb."""
    if param.is_meta:
        raise ValueError(f"{describe(param)} is on the meta device; materialise the model before making the optimizer")
    if not param.requires_grad:
        return
    if param.dtype not in DTYPES:
        raise TypeError(
            f"{describe(param)} has dtype {param.dtype}; F-SAM perturbs float64, float32, bfloat16 and float16"
        )
    shards.check_parameter(param, describe)
    part = shards.local(param)
    if not is_dense(part):
        raise ValueError(
            f"{describe(param)} has strides {tuple(part.stride())} with gaps or overlaps in memory; "
            "make it contiguous first"
        )


def check_gradient(param: Tensor, describe: Describe) -> None:
    """Raises RuntimeError for a gradient that does not fit its parameter."""
    grad = param.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise RuntimeError(f"the gradient of {describe(param)} is sparse; use sparse=False in the layer that makes it")
    if grad.shape != param.shape or grad.dtype != param.dtype:
        raise RuntimeError(
            f"the gradient of {describe(param)} has shape {tuple(grad.shape)} and {grad.dtype}, the parameter "
            f"{tuple(param.shape)} and {param.dtype}; clear the gradients after changing a parameter"
        )
    shards.check_gradient(param, grad, describe)


def check_disjoint(params: Sequence[Tensor], describe: Describe) -> None:
    """Raises ValueError for two parameters over the same memory: the second backup would be of perturbed weights."""
    ranges = sorted(
        (begin, begin + part.numel() * part.element_size(), i)
        for i, part in enumerate(map(shards.local, params))
        if part.numel() > 0 and (begin := shards.address(part))
    )
    for (_, end, first), (begin, _, second) in pairwise(ranges):
        if begin < end:
            raise ValueError(
                f"{describe(params[first])} and {describe(params[second])} share memory, so neither could be restored; "
                "tie weights by using one Parameter in both places"
            )
