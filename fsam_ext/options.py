"""The options of F-SAM: what a constructor's arguments become, and the sentences for those that cannot be used."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .backends.ops import FORWARD
from .state.checkpoints import CURRENT_FORMAT
from .state.keys import FORMAT, LAYOUT, LOW_PRECISION, OWN_OPTIONS, STEP
from .state.shards import Describe, local
from .state.tensors import check_parameter, name_of
from .step.base_update import FusedBase, GenericBase, base_defaults, is_fused

PERTURB_EPS = 1e-12


def defaults(
    base_optimizer: type[Optimizer],
    base_kwargs: dict[str, Any],
    own: dict[str, Any],
    layout: tuple[Any, ...],
    capturable: bool,
) -> dict[str, Any]:
    """The options that every group starts from: the base's, those of F-SAM, and the number of the step.

    ``eps`` is taken out of ``base_kwargs`` where it is another name of ``perturb_eps``.

    Raises:
        TypeError, ValueError: as the base's constructor; or an option has two values or two owners.
    """
    base = base_defaults(base_optimizer, {k: v for k, v in base_kwargs.items() if k != "eps"})
    if "eps" in base_kwargs:
        if "eps" in base:
            base = base_defaults(base_optimizer, base_kwargs)
        elif own["perturb_eps"] != PERTURB_EPS:
            raise ValueError(
                f"eps is another name of perturb_eps for {base_optimizer.__name__}, and both were given; leave out eps"
            )
        else:
            own["perturb_eps"] = base_kwargs.pop("eps")
    taken = sorted(base.keys() & {*OWN_OPTIONS})
    if taken:
        raise ValueError(
            f"base_optimizer {base_optimizer.__name__} has an option named {taken[0]}, which would get F-SAM's value; "
            "give it another name in a subclass"
        )
    if "capturable" in base:
        base["capturable"] = capturable
    return {**base, **own, **dict(zip(LAYOUT, layout, strict=True)), STEP: 0, FORMAT: CURRENT_FORMAT}


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


def check_group(
    param_groups: list[dict[str, Any]], number: int, base: type[Optimizer], update: FusedBase | GenericBase | None
) -> None:
    """Raises TypeError or ValueError for a group that cannot join the others, which ``update`` is the base of."""
    group, describe = param_groups[number], partial(name_of, param_groups)
    check_options(group)
    for param in group["params"]:
        check_parameter(param, describe)
    fused = is_fused(base, group)
    if isinstance(update, FusedBase) and not fused:
        raise ValueError(
            f"group {number} asks {base.__name__} for amsgrad or differentiable, which the other groups do not; give "
            "the option to the constructor instead"
        )
    check_group_dtypes(group, fused, base.__name__, describe)


def check_loaded(groups: list[dict[str, Any]], own: dict[str, Any], base: type[Optimizer], fuses: bool) -> None:
    """Raises ValueError for options of a checkpoint that cannot be taken; ``own``: those for what it lacks."""
    for number, group in enumerate(groups):
        check_options({**own, **group})
        if fuses and not is_fused(base, group):
            raise ValueError(
                f"group {number} of the checkpoint is of {base.__name__} with amsgrad or differentiable, which this "
                "optimizer was made without; give the option to the constructor"
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
        if group["ema_dtype"] == torch.int8 and local(param) is not param:
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
