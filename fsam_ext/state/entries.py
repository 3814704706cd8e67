"""The state of one parameter: what of it is checked, in which form each part is kept, how it is put in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import keys
from .keys import EMA, EMA_SCALE, MASTER
from .quantization import count_blocks, dequantize, quantize
from .shards import Describe, local


def base_part(entry: Any) -> Any:
    """The base optimizer's part of an entry; what is no dict is all the base's."""
    return {n: value for n, value in entry.items() if n not in keys.OWN_STATE} if isinstance(entry, dict) else entry


class Refused(ValueError):
    """State that cannot be taken over."""


def check_entry(entry: Any, param: Tensor, names: tuple[str, ...], describe: Describe) -> None:
    """Raises :class:`Refused` for state that could not be taken over.

    Args:
        names: the state that F-SAM's passes read, whose tensors have the parameter's shape, but for ``step``.
    """

    def refuse(name: str, what: str) -> None:
        raise Refused(f"state '{name}' of {describe(param)} {what}")

    for name in names:
        value = entry.get(name)
        if value is None or name == EMA_SCALE:
            continue
        if name == "step":
            if not _is_count(value):
                refuse(name, f"is {_what(value)}, not a number of steps")
        elif not isinstance(value, Tensor):
            refuse(name, f"is {type(value).__name__}")
        elif value.shape != param.shape:
            refuse(name, f"has shape {tuple(value.shape)}, the parameter {tuple(param.shape)}")
        elif value.layout != torch.strided or not (
            value.is_floating_point() or name == EMA and value.dtype == torch.int8
        ):
            refuse(name, f"is {_what(value)}, which is no dense tensor of numbers")
        if isinstance(value, Tensor) and value.is_meta:
            refuse(name, "is on the meta device and has no values")
    ema = entry.get(EMA)
    if isinstance(ema, Tensor) and ema.dtype == torch.int8:
        _check_scales(ema, entry.get(EMA_SCALE), refuse)


def check_values(entry: Any, fused: bool, param: Tensor, describe: Describe) -> None:
    """Raises :class:`Refused` for state without values, a bad scale or a count below 0; reads from the device."""
    for name, value in entry.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise Refused(f"state '{name}' of {describe(param)} is on the meta device and has no values")
    scale = entry.get(EMA_SCALE)
    if isinstance(scale, Tensor) and _has_bad(scale):
        raise Refused(f"state '{EMA_SCALE}' of {describe(param)} {BAD_SCALE}")
    step = entry.get("step") if fused else None
    if step is not None and not 0 <= float(step) < math.inf:
        raise Refused(f"state 'step' of {describe(param)} is {float(step)}, not a number of steps")


def _check_scales(ema: Tensor, scale: Any, refuse: Callable[[str, str], None]) -> None:
    """Has an int8 average refused whose scales are not its own."""
    if not isinstance(scale, Tensor) or scale.dtype != torch.float32 or scale.layout != torch.strided:
        refuse(EMA_SCALE, "is missing" if scale is None else f"is {_what(scale)}, not a float32 tensor")
    elif tuple(scale.shape) != (count_blocks(ema.numel()),) or getattr(scale, "fsam_shape", ema.shape) != ema.shape:
        refuse(
            EMA_SCALE,
            f"has the scales of an average of another shape than {tuple(ema.shape)}, each of which is of 128 of its "
            "elements in memory; put the average there in float32, to be quantised anew, or delete both",
        )
    elif not hasattr(scale, "fsam_shape") and _has_bad(scale):  # those of our kernels are not waited for
        refuse(EMA_SCALE, BAD_SCALE)


BAD_SCALE = "has a scale that is negative or infinite"


def _has_bad(scale: Tensor) -> bool:
    return not scale.is_meta and bool(((scale < 0) | scale.isinf()).any())


def _is_count(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.layout == torch.strided
    return isinstance(value, (int, float))


def _what(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"a {value.dtype} tensor of shape {tuple(value.shape)} and layout {value.layout}"


def check_complete(entry: dict[str, Any], param: Tensor, together: tuple[str, ...], describe: Describe) -> None:
    """Raises :class:`Refused` where a part of the base optimizer's state is missing, and not all of it."""
    missing = [name for name in together if entry.get(name) is None]
    if missing and len(missing) < len(together):  # without all of it, that starts anew
        raise Refused(
            f"state '{missing[0]}' of {describe(param)} is missing in the checkpoint, which has "
            f"{', '.join(map(repr, entry))}"
        )


def start_unset(entry: dict[str, Any], group: dict[str, Any]) -> None:
    """What a checkpoint marks as unset, as its group starts it: csrc/formulas.h, NOTE [an unset state is NaN].

    An average of "updated" starts at zero. Masters are made from the weights, which may not be loaded yet:
    fsam_ext/checkpoint.py marks those that a checkpoint lacks.
    """
    master, name = entry.get(MASTER), EMA if entry.get(EMA_SCALE) is None else EMA_SCALE
    if isinstance(master, Tensor) and local(master).numel() > 0 and bool(local(master).isnan().all()):
        del entry[MASTER]
    if group["ema"] == "updated" and isinstance(entry.get(name), Tensor):
        part = local(entry[name])
        part.copy_(torch.where(part.isnan(), 0.0, part))


def converted(entry: dict[str, Any], param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """F-SAM's own part of one parameter's state, in the form that its group keeps it in; ``entry`` stays as it is.

    An average is kept while sigma is 0: it goes on where it stopped when sigma is not 0 any more.
    """
    own = {name: entry[name] for name in keys.OWN_STATE if entry.get(name) is not None}
    if not keys.has_masters(group, param.dtype):
        own.pop(MASTER, None)
    if not keys.uses_reuse(group):
        own.pop(keys.REUSE, None)
    ema, scale = own.get(EMA), own.pop(EMA_SCALE, None)
    if ema is None:
        return own
    wanted = keys.ema_dtype(group, param.dtype)
    if ema.dtype == torch.int8 and (wanted != torch.int8 or ema.stride() != param.stride()):
        ema = dequantize(ema, scale)
    if wanted == torch.int8 and ema.dtype != torch.int8:
        ema, scale = quantize(torch.empty_like(param, dtype=torch.float32).copy_(ema))
    own[EMA] = ema.to(wanted)
    if ema.dtype == torch.int8:
        own[EMA_SCALE] = scale
    return own


def adopt(entry: dict[str, Any], new: dict[str, Any], group: dict[str, Any]) -> None:
    """Puts state into one parameter's entry, in one go; what its group keeps in another form goes."""
    entry.update(new)
    for name in (MASTER, keys.REUSE):
        if name not in new:
            entry.pop(name, None)
    if EMA_SCALE not in new and keys.uses_ema(group):
        entry.pop(EMA_SCALE, None)


# NOTE [where state is at home]
# A tensor of its parameter's shape is at home where the parameter is. Others (step counts, the tables of 8-bit moments)
# are where their base put them, and one that is moved says where that was. Passes of ours take state from anywhere; a
# base that is not fused needs it at home.


def moved(value: Any, param: Any, device: torch.device | str | None) -> Any:
    """A part of a parameter's state on another device; None: NOTE [where state is at home]."""
    if not isinstance(value, Tensor):
        return value
    home = getattr(value, "fsam_home", value.device)
    if device is None:
        device = param.device if isinstance(param, Tensor) and value.shape == param.shape else home
    there = value.to(device)
    if there.device != home:
        there.fsam_home = home
    return there


def at_home(entry: Any, param: Any) -> Any:
    """An entry whose tensors are back where they were moved from."""
    if not isinstance(entry, dict):
        return entry
    return {n: moved(value, param, None) if hasattr(value, "fsam_home") else value for n, value in entry.items()}


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
