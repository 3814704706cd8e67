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
from .ops import FORWARD, compute_dtype

# The param-group keys that are not the base optimizer's. Those of LAYOUT say how state is kept: a checkpoint's state is
# converted to them.
LAYOUT = ("ema_dtype", "master_weights", "stochastic_rounding", "forward_dtype", "ema_source")
NAMES = ("rho", "sigma", "lmbda", "adaptive", "ema", "perturb_eps", *LAYOUT)
# The number of steps taken: what a schedule and stochastic rounding count by.
STEP = "fsam_step"
# The form of the checkpoint, of which a group is the only part that torch.distributed.checkpoint keeps whole.
FORMAT = "fsam_format"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW_PRECISION = (torch.bfloat16, torch.float16)


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
    for name in ("adaptive", "master_weights", "stochastic_rounding"):
        if group[name] not in (False, True):  # 0 and 1 are: the official script says adaptive=0
            raise ValueError(f"{name} must be True or False, not {group[name]!r}")
    if group["ema"] not in ("previous", "updated"):
        raise ValueError(f"ema must be 'previous' (the official code) or 'updated' (the paper), not {group['ema']!r}")
    if group["ema_dtype"] not in (None, torch.float32, torch.bfloat16, torch.int8):
        raise ValueError(
            "ema_dtype must be torch.float32, torch.bfloat16 or torch.int8, or None for the dtype of the arithmetic, "
            f"not {group['ema_dtype']!r}"
        )
    for dtype, most in ((torch.bfloat16, 0.99), (torch.int8, 0.999)):
        if group["ema_dtype"] == dtype and group["lmbda"] > most:
            raise ValueError(
                f"ema_dtype={dtype} cannot follow an average with lmbda={group['lmbda']}: its updates are smaller than "
                f"what eight bits tell apart; use lmbda <= {most}, or ema_dtype=torch.float32"
            )
    if group["forward_dtype"] not in FORWARD:
        raise ValueError(
            "forward_dtype must be torch.bfloat16 or torch.float16, or None where forward passes use the weights as "
            f"they are, not {group['forward_dtype']!r}"
        )
    if group["ema_source"] not in ("ascent", "descent"):
        raise ValueError(
            f"ema_source must be 'ascent' (the first gradient) or 'descent' (the second), not {group['ema_source']!r}"
        )
    if group["ema_source"] == "descent" and group["ema"] == "updated":
        raise ValueError(
            "ema='updated' uses the first gradient's average, which ema_source='descent' does not make; use "
            "ema='previous' with it"
        )
    if group["master_weights"] and group["stochastic_rounding"]:
        raise ValueError(
            "master_weights and stochastic_rounding are two answers to the same rounding; choose one of them"
        )


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


def check_group_dtypes(group: dict[str, Any], fused: bool, base: str, describe: Describe) -> None:
    """Raises for options that do not go with the dtypes of a group's parameters or with its base optimizer."""
    params = [param for param in group["params"] if param.requires_grad]
    for name in ("master_weights", "stochastic_rounding"):
        if not group[name]:
            continue
        if not fused:
            raise ValueError(f"{name} needs SGD, Adam or AdamW (without amsgrad) as the base optimizer, not {base}")
        if params and not any(param.dtype in LOW_PRECISION for param in params):
            raise TypeError(
                f"{name} is for bfloat16 and float16 parameters, but {describe(params[0])} and all others of its group "
                f"are {params[0].dtype}; leave the option out, or set it for the groups that need it"
            )
    for param in params:
        if group["ema_dtype"] == torch.int8 and distributed.local(param) is not param:
            raise TypeError(
                f"{describe(param)} is sharded, and the blocks of ema_dtype=torch.int8 do not follow its shards; use "
                "torch.bfloat16"
            )
        if param.dtype != torch.float64:
            continue
        for name, allowed in (("ema_dtype", (None, torch.float64)), ("forward_dtype", (None,))):
            if group[name] not in allowed:
                raise TypeError(
                    f"{describe(param)} is float64, which {name}={group[name]} does not go with; leave it out"
                )


def ema_dtype(group: dict[str, Any], dtype: torch.dtype) -> torch.dtype:
    """What stores the average of a group's parameters of ``dtype``."""
    return group["ema_dtype"] or compute_dtype(dtype)


def has_masters(group: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether a group's parameters of ``dtype`` have float32 masters."""
    return bool(group["master_weights"]) and dtype in LOW_PRECISION


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
