"""The forms of checkpoints: of this package, of other SAM implementations, of a plain torch optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .keys import EMA, FORMAT, FORMER_NAMES, LAYOUT, NAMES, OWN_STATE, REUSE_SQ, STEP, our_group, their_group

# 0: before groups had this number; dtypes among the options. 1: the number, and dtypes of ours as words. 2: state of
# ours has names that no base has.
CURRENT_FORMAT = 2

# What github.com/nblt/F-SAM and github.com/davda54/sam keep for each parameter, and what we call it. The perturbed and
# the saved copies are of no use later.
OTHERS_STATE = {"momentum": EMA, "old_p": None, "first_grad": None, "e_w": None}


def is_optimizer_state(thing: Any) -> bool:
    """Whether something has the form of an optimizer's state_dict."""
    return (
        isinstance(thing, dict)
        and isinstance(thing.get("state"), dict)
        and isinstance(thing.get("param_groups"), list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in thing["param_groups"])
    )


def _what_is_wrong(thing: Any) -> str:
    """What keeps something from being an optimizer's state_dict."""
    if not isinstance(thing, dict):
        return f"this is {type(thing)}"
    if not {"state", "param_groups"} <= {*thing}:
        return f"this is a dict with {', '.join(map(repr, thing)) or 'nothing'}"
    if not isinstance(thing["state"], dict):
        return f"this 'state' is {type(thing['state'])}, not a dict"
    return "this 'param_groups' is not a list of dicts, each with a list of its 'params'"


def check_form(state_dict: Any) -> None:
    """Raises ValueError for what is no state_dict of an optimizer, is damaged, or was written by a later release."""
    if not is_optimizer_state(state_dict):
        raise ValueError(f"an optimizer's state_dict has 'state' and 'param_groups'; {_what_is_wrong(state_dict)}")
    for group in state_dict["param_groups"]:
        number, step, reuse_sq = group.get(FORMAT, 0), group.get(STEP, 0), group.get(REUSE_SQ, 0.0)
        if not isinstance(reuse_sq, (int, float)) or not reuse_sq >= 0:
            raise ValueError(f"{REUSE_SQ} of a checkpoint's groups is a number of at least 0, not {reuse_sq!r}")
        if type(number) is not int or type(step) is not int or step < 0:
            raise ValueError(
                f"{FORMAT} and {STEP} of a checkpoint's groups are whole numbers, not {number!r} and {step!r}"
            )
        if number > CURRENT_FORMAT:
            raise ValueError(
                f"the checkpoint has format {number}, and this release of fsam_ext reads formats up to "
                f"{CURRENT_FORMAT}; install the release that wrote it"
            )
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    if not all(isinstance(key, (int, str)) for key in keys) or len({*keys}) != len(keys):
        raise ValueError(
            "the checkpoint's groups do not number their parameters: 'params' has to hold distinct numbers"
        )


def origin(state_dict: dict[str, Any]) -> str:
    """Which kind of implementation an optimizer's state_dict is of: "fsam_ext", "sam" or "torch"."""
    options = {name for group in state_dict["param_groups"] for name in group}
    if options & {STEP, FORMAT} or options >= {"rho", "sigma", "lmbda", "perturb_eps"}:
        return "fsam_ext"
    # Both are options of every SAM implementation; a base may have one of them.
    return "sam" if options >= {"rho", "adaptive"} else "torch"


def in_our_names(state_dict: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    """The state of every parameter in the names of this release.

    What another implementation keeps for one step only is left out. What a base optimizer keeps has the base's names,
    whatever they are: so those of other implementations are looked for only where one wrote the checkpoint.
    """
    names: dict[str, str | None] = {}
    if origin(state_dict) == "sam":
        names = OTHERS_STATE
    elif (
        origin(state_dict) == "fsam_ext" and min((g.get(FORMAT, 0) for g in state_dict["param_groups"]), default=2) < 2
    ):
        names = FORMER_NAMES
    return {
        key: {names.get(name, name): value for name, value in entry.items() if names.get(name, name) is not None}
        if isinstance(entry, dict)
        else entry
        for key, entry in state_dict["state"].items()
    }


def groups_in_our_names(state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups, in which an option of a plain optimizer that has a name of ours (Adadelta's rho) is the base's."""
    groups = state_dict["param_groups"]
    return [our_group(group) for group in groups] if origin(state_dict) == "torch" else groups


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
        if isinstance(entry, dict)
        else entry
        for key, entry in in_our_names(state_dict).items()
    }
    return {
        **state_dict,
        "state": {key: entry for key, entry in state.items() if not isinstance(entry, dict) or entry},
        "param_groups": [their_group(group) for group in groups_in_our_names(state_dict)],
    }


def translate(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A checkpoint with state in our names, and with the present options for those that it lacks.

    Raises:
        ValueError: it cannot be a checkpoint of an optimizer with these groups.
    """
    check_form(state_dict)
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(param_groups):
        raise ValueError(
            f"the checkpoint has {len(saved_groups)} param groups, and the optimizer {len(param_groups)}: loaded state "
            "dict has a different number of parameter groups"
        )
    for number, (mine, saved) in enumerate(zip(param_groups, saved_groups)):
        if len(mine["params"]) != len(saved["params"]):
            raise ValueError(
                f"group {number} of the checkpoint has {len(saved['params'])} parameters, and the optimizer's "
                f"{len(mine['params'])}: a parameter group that doesn't match the size of optimizer's group"
            )
    groups = [
        {
            **{name: value for name, value in mine.items() if name not in ("params", "param_names")},
            **{name: value for name, value in saved.items() if name not in (*LAYOUT, FORMAT)},
            **({"rho": mine["rho"]} if callable(mine["rho"]) else {}),  # a function is code, which no checkpoint has
        }
        for mine, saved in zip(param_groups, groups_in_our_names(state_dict))
    ]
    return {**state_dict, "state": in_our_names(state_dict), "param_groups": groups}


def in_words(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict with words for dtypes among our options: torch.distributed.checkpoint takes dtypes for no option.

    The norm of what is reused becomes a number: reading it waits for the device.
    """
    for group in state_dict["param_groups"]:
        group.update({name: str(group[name]) for name in NAMES if isinstance(group.get(name), torch.dtype)})
        if isinstance(group.get(REUSE_SQ), Tensor) and not isinstance(group[REUSE_SQ], FakeTensor):
            group[REUSE_SQ] = float(group[REUSE_SQ])
    return state_dict
