"""Which parameters and gradients can be used, and the sentences for those that cannot."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin

from . import shards
from .keys import LOW_PRECISION
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


def is_uninitialized(param: Tensor) -> bool:
    """Whether this is a parameter of a lazy module, which gets its shape in the first forward pass."""
    return isinstance(param, UninitializedTensorMixin)


def check_parameter(param: Tensor, describe: Describe) -> None:
    """Raises ValueError or TypeError for a parameter that no backend can perturb."""
    if is_uninitialized(param):
        return
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
    if grad.dtype != param.dtype and getattr(param, "grad_dtype", param.dtype) in (None, grad.dtype):
        raise RuntimeError(
            f"the gradient of {describe(param)} is {grad.dtype}, which its grad_dtype allows, and the parameter "
            f"{param.dtype}; F-SAM reads gradients in their parameter's dtype: do not set grad_dtype, or keep the "
            f"parameter in {grad.dtype}"
        )
    if grad.shape != param.shape or grad.dtype != param.dtype:
        raise RuntimeError(
            f"the gradient of {describe(param)} has shape {tuple(grad.shape)} and {grad.dtype}, the parameter "
            f"{tuple(param.shape)} and {param.dtype}; clear the gradients after changing a parameter"
        )
    shards.check_gradient(param, grad, describe)


def check_gradients(groups: list[dict[str, Any]]) -> None:
    """Raises RuntimeError for any gradient that does not fit its parameter."""
    describe = partial(name_of, groups)
    for group in groups:
        for param in group["params"]:
            if param.grad is not None:
                check_gradient(param, describe)


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


def check_kept(group: dict[str, Any], fused: bool, describe: Describe) -> None:
    """Raises for options that do not go with the dtypes of a group's parameters, or with a base that is not fused."""
    params = [param for param in group["params"] if param.requires_grad and not is_uninitialized(param)]
    for name in ("reuse", "master_weights", "stochastic_rounding"):
        if not group[name]:
            continue
        if not fused:
            raise ValueError(
                f"{name} needs SGD, Adam or AdamW (without amsgrad) as the base optimizer, which this is not; set it "
                f"to {0 if name == 'reuse' else False}"
            )
        if name != "reuse" and params and not any(param.dtype in LOW_PRECISION for param in params):
            raise TypeError(
                f"{name} is for bfloat16 and float16 parameters, but {describe(params[0])} and all others of its group "
                f"are {params[0].dtype}; leave the option out, or set it for the groups that need it"
            )
    for param in params:
        if group["ema_dtype"] == torch.int8 and shards.local(param) is not param:
            raise TypeError(
                f"{describe(param)} is sharded, and the blocks of ema_dtype=torch.int8 do not follow its shards; use "
                "torch.bfloat16"
            )
        if param.dtype != torch.float64:
            continue
        for name, allowed in (
            ("ema_dtype", (None, torch.float64)),
            ("reuse_dtype", (None,)),
            ("forward_dtype", (None,)),
        ):
            if group[name] not in allowed:
                raise TypeError(
                    f"{describe(param)} is float64, which {name}={group[name]} does not go with; leave it out"
                )
