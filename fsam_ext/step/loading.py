"""Optimizers' state_dicts, written and read with the base's own methods, before anything of the optimizer changes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..state import checkpoints, entries
from ..state.keys import OWN_STATE, SHAPED, our_group, with_prefix
from ..state.shards import Describe, placed_like
from .base_options import theirs
from .base_update import FusedBase, GenericBase, set_state
from .rho import rho_of

# NOTE [a base's own methods]
# What a base adds to its state_dict is in ours, and what it does to a checkpoint that it loads is done: its
# state_dict(), load_state_dict() and __setstate__() run, on the base optimizer and with its part of state and groups.
# Only the dtypes of state are those of the checkpoint again: torch rounds the float32 state of 16-bit parameters.


def packed(base: FusedBase | GenericBase, state: Any, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state_dict, hooks aside."""
    optimizer = base.optimizer
    has_own_form = type(optimizer).state_dict is not Optimizer.state_dict or any(map(with_prefix, groups))
    whole = isinstance(base, FusedBase) or not has_own_form
    if whole:
        optimizer.param_groups = groups
        set_state(optimizer, {**getattr(base, "made", {}), **state})
    else:
        base.prepare(state, groups)
    try:
        result = optimizer.state_dict()
    finally:
        set_state(optimizer, {})
    if not whole:
        result = {**result, "state": dict(result["state"])}
        result["param_groups"] = [
            {**our_group(saved), **{name: value for name, value in group.items() if name != "params"}}
            for saved, group in zip(result["param_groups"], groups)
        ]
        for saved, group in zip(result["param_groups"], groups):
            for key, param in zip(saved["params"], group["params"]):
                own = {name: value for name, value in state.get(param, {}).items() if name in OWN_STATE}
                if own:
                    result["state"][key] = {**result["state"].get(key, {}), **own}
    for group in result["param_groups"]:
        if callable(group["rho"]):  # code, which is no part of a checkpoint: what it gives now is
            rho = rho_of(group)
            group["rho"] = rho if isinstance(rho, Tensor) else float(rho)
    return checkpoints.in_words(result)


def read(
    base: FusedBase | GenericBase, state_dict: dict[str, Any], groups: list[dict[str, Any]], describe: Describe
) -> tuple[Any, list[dict[str, Any]]]:
    """(state, param groups) that a translated checkpoint brings: :func:`fsam_ext.state.checkpoints.translate`.

    Raises:
        ValueError: it does not fit; nothing has changed then, in the base optimizer neither.
    """
    by_key = {
        key: param
        for saved, group in zip(state_dict["param_groups"], groups)
        for key, param in zip(saved["params"], group["params"])
    }
    fused = isinstance(base, FusedBase)
    for key, entry in state_dict["state"].items():
        if key in by_key:
            _check(entry, by_key[key], fused, describe)
    for saved in state_dict["param_groups"] if fused else ():
        for key in saved["params"]:
            if key in state_dict["state"]:
                together = base.state_names(saved)
                entries.check_complete(state_dict["state"][key], by_key[key], together, describe)
    state, new_groups = _read_by_base(base, state_dict, groups)
    for group, saved in zip(new_groups, state_dict["param_groups"]):
        for key, param in zip(saved["params"], group["params"]):
            entry = state_dict["state"].get(key)
            if entry is None:
                continue
            mine = state[param]
            for name, value in entry.items():
                mine[name] = _as_saved(mine.get(name, value if name in OWN_STATE else None), value, name, param)
            entries.start_unset(mine, group)
            own = entries.converted(mine, param, group)
            entries.adopt(mine, own, group)
    return state, new_groups


def _check(entry: Any, param: Tensor, fused: bool, describe: Describe) -> None:
    """Raises :class:`Refused` for state of a parameter that could not be loaded."""
    if not isinstance(entry, dict):
        raise entries.Refused(f"the state of {describe(param)} is {type(entry).__name__} in the checkpoint, not a dict")
    try:
        entries.check_entry(entry, param, SHAPED + ("step",) if fused else OWN_STATE, describe)
        entries.check_values(entry, fused, param, describe)
    except entries.Refused as refusal:
        raise entries.Refused(f"{refusal} in the checkpoint; load one that was saved with this model") from None


def _as_saved(loaded: Any, saved: Any, name: str, param: Tensor) -> Any:
    """What a base has loaded, in the dtype of the checkpoint, and no part of it."""
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return {key: _as_saved(value, saved.get(key), key, param) for key, value in loaded.items()}
    if not isinstance(saved, Tensor) or not isinstance(loaded, Tensor) or loaded.shape != saved.shape:
        return loaded
    if name == "step" or saved.shape != param.shape:
        return saved.detach().to(device=loaded.device, copy=True)
    return placed_like(param, saved)


def _read_by_base(
    base: FusedBase | GenericBase, state_dict: dict[str, Any], groups: list[dict[str, Any]]
) -> tuple[Any, list[dict[str, Any]]]:
    """(state, groups) as the base's own load_state_dict leaves them: NOTE [a base's own methods]."""
    optimizer = base.optimizer
    before = dict(optimizer.__dict__)
    try:
        set_state(optimizer, {})
        optimizer.param_groups = [dict(group) for group in theirs(groups)]
        part = {key: entries.base_part(entry) for key, entry in state_dict["state"].items()}
        saved_groups = theirs(state_dict["param_groups"])
        optimizer.load_state_dict({**state_dict, "state": part, "param_groups": saved_groups})
        state = defaultdict(dict, optimizer.state)
        new_groups = optimizer.param_groups
        if saved_groups is not state_dict["param_groups"]:  # the base knows nothing of our options
            new_groups = [saved | our_group(group) for saved, group in zip(state_dict["param_groups"], new_groups)]
    except BaseException as error:
        optimizer.__dict__.clear()
        optimizer.__dict__.update(before)
        if isinstance(error, ValueError) or not isinstance(error, Exception):
            raise
        name = type(optimizer).__name__
        raise ValueError(
            f"{name} cannot load this checkpoint ({type(error).__name__}: {error}); nothing has changed"
        ) from error
    set_state(optimizer, {})
    return state, new_groups
