"""The names of options and state that are F-SAM's and not the base's, and what follows from a group's options."""

from __future__ import annotations

from typing import Any

import torch

from ..backends.ops import compute_dtype

# The param-group keys that are not the base optimizer's. Those of LAYOUT say how state is kept: a checkpoint's state is
# converted to them.
LAYOUT = (
    *("ema_dtype", "master_weights", "stochastic_rounding", "forward_dtype", "ema_source"),
    *("reuse_dtype", "perturb"),
)
NAMES = ("rho", "sigma", "lmbda", "adaptive", "ema", "perturb_eps", "reuse", *LAYOUT)
# The number of steps taken: what a schedule and stochastic rounding count by.
STEP = "fsam_step"
# The form of the checkpoint, of which a group is the only part that torch.distributed.checkpoint keeps whole.
FORMAT = "fsam_format"
# The squared norm of what is reused, over all parameters: in the first group, where there is reuse. 0: there is none.
REUSE_SQ = "fsam_reuse_sq"
OWN_OPTIONS = (*NAMES, STEP, FORMAT, REUSE_SQ)
# What precedes an option of the base that has a name of ours: step/base_options.py, NOTE [options of one name].
PREFIX = "base_"

# State that F-SAM adds to a base optimizer's.
EMA, EMA_SCALE, MASTER, REUSE = "fsam_ema", "fsam_ema_scale", "fsam_master", "fsam_reuse"
OWN_STATE = (EMA, EMA_SCALE, MASTER, REUSE)
# State that has its parameter's shape.
SHAPED = (EMA, MASTER, REUSE, "momentum_buffer", "exp_avg", "exp_avg_sq")
# What it was called in checkpoints of formats 0 and 1.
FORMER_NAMES = {"ema": EMA, "ema_scale": EMA_SCALE, "master": MASTER}

LOW_PRECISION = (torch.bfloat16, torch.float16)


def with_prefix(names: Any) -> dict[str, str]:
    """The base's options that go by another name in our groups: theirs -> ours."""
    return {name: PREFIX + name for name in OWN_OPTIONS if PREFIX + name in names}


def their_group(group: dict[str, Any]) -> dict[str, Any]:
    """One group without our options, each option of the base by its own name."""
    renamed = with_prefix(group)
    kept = {name: value for name, value in group.items() if name not in OWN_OPTIONS and name not in renamed.values()}
    return kept | {name: group[ours] for name, ours in renamed.items()}


def our_group(group: dict[str, Any]) -> dict[str, Any]:
    """A group of the base, each option by its name in ours."""
    return {PREFIX + name if name in OWN_OPTIONS else name: value for name, value in group.items()}


def uses_ema(group: dict[str, Any]) -> bool:
    """Whether a group keeps an average: SAM (sigma = 0) does not."""
    return group["sigma"] != 0 and bool(group["perturb"])


def uses_reuse(group: dict[str, Any]) -> bool:
    """Whether a group keeps what is reused in the steps between two ascents."""
    return group["reuse"] != 0 and bool(group["perturb"])


def reuse_dtype(group: dict[str, Any], dtype: torch.dtype) -> torch.dtype | None:
    """What stores the reused part of gradients of a group's parameters of ``dtype``, or None where nothing is."""
    return (group["reuse_dtype"] or compute_dtype(dtype)) if uses_reuse(group) else None


def ema_dtype(group: dict[str, Any], dtype: torch.dtype) -> torch.dtype:
    """What stores the average of a group's parameters of ``dtype``."""
    return group["ema_dtype"] or compute_dtype(dtype)


def has_masters(group: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether a group's parameters of ``dtype`` have float32 masters."""
    return bool(group["master_weights"]) and dtype in LOW_PRECISION


def draws(group: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether a group's parameters of ``dtype`` are rounded at random."""
    return bool(group["stochastic_rounding"]) and dtype in LOW_PRECISION
