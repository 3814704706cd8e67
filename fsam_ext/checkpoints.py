"""What a checkpoint of this package, of the official F-SAM code or of a plain torch optimizer holds, in our names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .distributed import local
from .options import LAYOUT, ema_dtype, has_masters, uses_ema
from .quantization import dequantize, quantize

# What the official code keeps for each parameter. The perturbed and the saved copies are of no use later.
OFFICIAL_STATE = {"momentum": "ema", "old_p": None, "first_grad": None, "e_w": None}

# State that has its parameter's shape.
SHAPED = ("ema", "master", "momentum_buffer", "exp_avg", "exp_avg_sq")


def translate(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A checkpoint with state in our names, and with the present options for those that it lacks."""
    saved_groups = state_dict["param_groups"]
    groups = [
        {
            **{name: value for name, value in mine.items() if name not in ("params", "param_names")},
            **{name: value for name, value in saved.items() if name not in LAYOUT},
        }
        for mine, saved in zip(param_groups, saved_groups)
    ]
    state = {
        key: {
            OFFICIAL_STATE.get(name, name): value
            for name, value in entry.items()
            if OFFICIAL_STATE.get(name, name) is not None
        }
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state, "param_groups": groups + saved_groups[len(groups) :]}


def entries(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> list[tuple[Tensor, str, Tensor]]:
    """(parameter, name, value) of every tensor in the state, by position as torch does it."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    params = [param for group in param_groups for param in group["params"]]
    return [
        (param, name, value)
        for key, param in zip(keys, params)
        for name, value in state_dict["state"].get(key, {}).items()
        if isinstance(value, Tensor)
    ]


def asks_for_state(state: dict[Tensor, dict[str, Any]], param_groups: list[dict[str, Any]]) -> bool:
    """Whether a step() without an ascent wants nothing but state.

    NOTE [how torch.distributed.checkpoint asks for state]
    To have something to load into, it fills every gradient of an optimizer without any state with zeros, sets every lr
    to 0 (a tensor on the CPU where it was a tensor), and calls step(). All of that together cannot be a training step
    that lacks its ascent: it would change no weight. So only this is let through, and made to change nothing at all:
    the average is still one that has seen no gradient.
    """
    if state:
        return False
    for group in param_groups:
        lr = group.get("lr", 0.0)
        if isinstance(lr, Tensor) and lr.device.type != "cpu" or float(lr) != 0.0:
            return False
    grads = [param.grad for group in param_groups for param in group["params"] if param.requires_grad]
    return all(grad is not None and not local(grad).any() for grad in grads)


def convert(entry: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
    """Brings one parameter's loaded state into the form that its group keeps it in, in place."""
    if not has_masters(group, param.dtype):
        entry.pop("master", None)
    if not uses_ema(group):
        entry.pop("ema", None)
    ema, scale = entry.get("ema"), entry.pop("ema_scale", None)
    if ema is None:
        return
    wanted = ema_dtype(group, param.dtype)
    if ema.dtype == torch.int8 and (wanted != torch.int8 or ema.stride() != param.stride()):
        ema = dequantize(ema, scale)
    if wanted == torch.int8 and ema.dtype != torch.int8:
        ema, scale = quantize(torch.empty_like(param, dtype=torch.float32).copy_(ema))
    entry["ema"] = ema.to(wanted)
    if ema.dtype == torch.int8:
        entry["ema_scale"] = scale
