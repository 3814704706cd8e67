"""What a checkpoint of this package, of other SAM implementations or of a plain torch optimizer holds, in our names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .keys import FORMAT, LAYOUT, OWN_OPTIONS, OWN_STATE, SHAPED, ema_dtype, has_masters, uses_ema
from .quantization import dequantize, quantize
from .shards import Describe, local, placed_like

# 0: before groups had this number; dtypes among the options. 1: the number, and dtypes as words.
CURRENT_FORMAT = 1

# What github.com/nblt/F-SAM and github.com/davda54/sam keep for each parameter, and what we call it. The perturbed and
# the saved copies are of no use later.
OTHERS_STATE = {"momentum": "ema", "old_p": None, "first_grad": None, "e_w": None}


def is_optimizer_state(thing: Any) -> bool:
    """Whether something has the form of an optimizer's state_dict."""
    return (
        isinstance(thing, dict)
        and isinstance(thing.get("state"), dict)
        and isinstance(thing.get("param_groups"), list)
        and all(isinstance(part, dict) for part in (*thing["state"].values(), *thing["param_groups"]))
        and all("params" in group for group in thing["param_groups"])
    )


def check_form(state_dict: Any) -> None:
    """Raises ValueError for what is no state_dict of an optimizer, or one that a later release wrote."""
    if not is_optimizer_state(state_dict):
        kind = f"a dict with {', '.join(map(repr, state_dict))}" if isinstance(state_dict, dict) else type(state_dict)
        raise ValueError(f"an optimizer's state_dict has 'state' and 'param_groups'; this is {kind}")
    newest = max((group.get(FORMAT, 0) for group in state_dict["param_groups"]), default=0)
    if newest > CURRENT_FORMAT:
        raise ValueError(
            f"the checkpoint has format {newest}, and this release of fsam_ext reads formats up to {CURRENT_FORMAT}; "
            "install the release that wrote it"
        )


def in_our_names(state: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """The state of every parameter without what other implementations keep for one step only."""
    return {
        key: {
            OTHERS_STATE.get(name, name): value
            for name, value in entry.items()
            if OTHERS_STATE.get(name, name) is not None
        }
        for key, entry in state.items()
    }


def _is_unset(name: str, value: Any) -> bool:
    """Whether this is momentum that has seen no gradient: csrc/formulas.h, NOTE [an unset state is NaN]."""
    return name == "momentum_buffer" and isinstance(value, Tensor) and value.numel() > 0 and bool(value.isnan().all())


def to_torch(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict of :class:`fsam_ext.FriendlySAM` as the base optimizer alone would have written it.

    Averages and masters are left out; a plain optimizer of bfloat16 parameters goes on from the rounded weights. So is
    momentum that has seen no gradient yet, which a plain optimizer would not know as such.

    Raises:
        ValueError: this is no state_dict of an optimizer, or one of a later release.
    """
    check_form(state_dict)
    state = {
        key: {name: value for name, value in entry.items() if name not in OWN_STATE and not _is_unset(name, value)}
        for key, entry in in_our_names(state_dict["state"]).items()
    }
    return {
        "state": {key: entry for key, entry in state.items() if entry},
        "param_groups": [
            {name: value for name, value in group.items() if name not in OWN_OPTIONS}
            for group in state_dict["param_groups"]
        ],
    }


def translate(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A checkpoint with state in our names, and with the present options for those that it lacks.

    Raises:
        ValueError: it cannot be a checkpoint.
    """
    check_form(state_dict)
    saved_groups = state_dict["param_groups"]
    groups = [
        {
            **{name: value for name, value in mine.items() if name not in ("params", "param_names")},
            **{name: value for name, value in saved.items() if name not in (*LAYOUT, FORMAT)},
        }
        for mine, saved in zip(param_groups, saved_groups)
    ]
    state = in_our_names(state_dict["state"])
    return {**state_dict, "state": state, "param_groups": groups + saved_groups[len(groups) :]}


def entries(
    state_dict: dict[str, Any],
    param_groups: list[dict[str, Any]],
    base_state: Callable[[dict[str, Any]], tuple[str, ...]],
    describe: Describe,
) -> list[tuple[Tensor, str, Tensor]]:
    """(parameter, name, value) of every tensor in the state, by position as torch does it.

    Args:
        base_state: tells which state of the base optimizer belongs together in a group.

    Raises:
        ValueError: a part is missing, or is not of its parameter.
    """
    found = []
    for saved, group in zip(state_dict["param_groups"], param_groups):
        together = base_state(group)
        for key, param in zip(saved["params"], group["params"]):
            entry = {name: value for name, value in state_dict["state"].get(key, {}).items() if value is not None}
            missing = [name for name in together if name not in entry]
            if len(missing) == len(together):
                missing = []  # it has none of the base optimizer's state: that starts anew
            ema = entry.get("ema")
            if isinstance(ema, Tensor) and ema.dtype == torch.int8 and "ema_scale" not in entry:
                missing.append("ema_scale")
            if missing:
                raise ValueError(
                    f"state '{missing[0]}' of {describe(param)} is missing in the checkpoint, which has "
                    f"{', '.join(map(repr, entry))}; load one that is complete"
                )
            for name, value in entry.items():
                shape = tuple(value.shape) if isinstance(value, Tensor) else None
                if name in SHAPED and shape != tuple(param.shape):
                    is_what = f"is {type(value).__name__}" if shape is None else f"has shape {shape}"
                    raise ValueError(
                        f"state '{name}' of {describe(param)} {is_what} in the checkpoint; load one that was saved "
                        "with this model"
                    )
                if isinstance(value, Tensor):
                    found.append((param, name, value))
    return found


def in_words(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict whose options have words for dtypes, which torch.distributed.checkpoint takes for no option."""
    for group in state_dict["param_groups"]:
        group.update({name: str(value) for name, value in group.items() if isinstance(value, torch.dtype)})
    return state_dict


def copies(
    state_dict: dict[str, Any],
    param_groups: list[dict[str, Any]],
    base_state: Callable[[dict[str, Any]], tuple[str, ...]],
    describe: Describe,
) -> list[tuple[Tensor, str, Tensor]]:
    """:func:`entries`, each copied to where its parameter lies, in its own dtype: it may be another optimizer's."""
    found = []
    for param, name, value in entries(state_dict, param_groups, base_state, describe):
        if value.shape == param.shape and name != "step":
            copy = placed_like(param, value)
        else:
            copy = value.detach().to(device=value.device if name == "step" else param.device, copy=True)
        found.append((param, name, copy))
    return found


def put(found: list[tuple[Tensor, str, Tensor]], state: Any, param_groups: list[dict[str, Any]]) -> None:
    """Puts what :func:`copies` found into ``state``, F-SAM's own part in the form that each group keeps it in."""
    for param, name, value in found:
        state[param][name] = value
    for group in param_groups:
        for param in group["params"]:
            if param in state:
                adopt(state[param], converted(state[param], param, group))


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


def check_shapes(entry: dict[str, Any], param: Tensor, describe: Describe) -> None:
    """Raises RuntimeError where a parameter has grown or shrunk since it got its state."""
    for name in SHAPED:
        value = entry.get(name)
        if isinstance(value, Tensor) and value.shape != param.shape:
            raise RuntimeError(
                f"state '{name}' of {describe(param)} has shape {tuple(value.shape)}, the parameter now has "
                f"{tuple(param.shape)}; `del optimizer.state[parameter]` to let its state start anew"
            )


def converted(entry: dict[str, Any], param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """F-SAM's own part of one parameter's state, in the form that its group keeps it in; ``entry`` stays as it is."""
    own = {name: entry[name] for name in OWN_STATE if entry.get(name) is not None}
    if not has_masters(group, param.dtype):
        own.pop("master", None)
    if not uses_ema(group):
        own.pop("ema", None)
    ema, scale = own.get("ema"), own.pop("ema_scale", None)
    if ema is None:
        return own
    wanted = ema_dtype(group, param.dtype)
    if ema.dtype == torch.int8 and (wanted != torch.int8 or ema.stride() != param.stride()):
        ema = dequantize(ema, scale)
    if wanted == torch.int8 and ema.dtype != torch.int8:
        ema, scale = quantize(torch.empty_like(param, dtype=torch.float32).copy_(ema))
    own["ema"] = ema.to(wanted)
    if ema.dtype == torch.int8:
        own["ema_scale"] = scale
    return own


def adopt(entry: dict[str, Any], own: dict[str, Any]) -> None:
    """Puts F-SAM's own part into one parameter's state, in one go; what it lacks goes."""
    entry.update(own)
    for name in OWN_STATE:
        if name not in own:
            entry.pop(name, None)
