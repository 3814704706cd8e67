"""The options of F-SAM, and the sentences for options, parameters and gradients that cannot be used."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .distributed import Describe
from .flatten import is_dense

# The param-group keys that are not the base optimizer's.
NAMES = ("rho", "sigma", "lmbda", "adaptive", "ema", "perturb_eps")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def uses_ema(group: dict[str, Any]) -> bool:
    """Whether a group keeps an average: SAM (sigma = 0) does not."""
    return group["sigma"] != 0


def check_options(group: dict[str, Any]) -> None:
    """Raises ValueError for an option of F-SAM that cannot be used."""

    def number(name: str, holds: Callable[[float], bool], wanted: str) -> None:
        value = group[name]
        if name == "rho" and isinstance(value, Tensor):
            if value.numel() != 1 or not value.is_floating_point():
                raise ValueError(
                    f"rho must be a number or a floating-point tensor of one element, not one of shape "
                    f"{tuple(value.shape)} and {value.dtype}"
                )
            return
        if not isinstance(value, Real) or not math.isfinite(value) or not holds(value):
            raise ValueError(f"{name} must be {wanted}, not {value!r}")

    number("rho", lambda v: v >= 0, "a finite number of at least 0")
    number("sigma", lambda v: True, "a finite number (0 is SAM, 1 is the paper's choice)")
    number("lmbda", lambda v: 0 <= v < 1, "a number in [0, 1)")
    number("perturb_eps", lambda v: v >= 0, "a finite number of at least 0")
    if group["ema"] not in ("previous", "updated"):
        raise ValueError(f"ema must be 'previous' (the official code) or 'updated' (the paper), not {group['ema']!r}")


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
    distributed.check_parameter(param, describe)
    part = distributed.local(param)
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
    distributed.check_gradient(param, grad, describe)
