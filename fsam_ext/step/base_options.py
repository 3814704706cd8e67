"""The base optimizer is made here; and its options and ours in one group, where both may have one of the same name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..state.keys import OWN_OPTIONS, our_group, their_group, with_prefix

# NOTE [options of one name]
# A group has the options of both. Where the base has one of a name of ours (Adadelta's rho), the name is ours, and the
# base's goes by PREFIX and the name: FriendlySAM(params, Adadelta, rho=0.05, base_rho=0.9). The base gets groups of its
# own then, in which each name is what it expects; otherwise it gets ours, and may write into them.


def theirs(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups as the base expects them: NOTE [options of one name]."""
    if not any(with_prefix(group) for group in groups):
        return groups
    return [their_group(group) for group in groups]


def take_back(base_groups: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Takes over what the base has written into groups of its own."""
    for theirs_now, group in zip(base_groups, groups):
        if theirs_now is not group:
            group.update({name: value for name, value in our_group(theirs_now).items() if name != "params"})


def listed(params: Any) -> list[dict[str, Any]]:
    """Groups that are nobody else's, of what an optimizer's constructor may be given.

    Raises:
        TypeError, ValueError: in torch's words.
    """
    if isinstance(params, Tensor):
        raise TypeError(f"params must be an iterable of parameters or of groups, not {type(params).__name__}")
    groups = list(params)
    if not groups:
        raise ValueError("optimizer got an empty parameter list")
    if not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    return [listed_group(group) for group in groups]


def listed_group(group: dict[str, Any]) -> dict[str, Any]:
    """A copy of a group whose parameters may be looked at more than once."""
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f"a param group must be a dict with 'params', not {group!r}")
    params = group["params"]
    return {**group, "params": params if isinstance(params, (Tensor, set)) else list(params)}


def made(base_optimizer: type[Optimizer], groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
    """The base optimizer of groups that are its own to keep.

    Raises:
        TypeError, ValueError: as its constructor does; where that raises anything else; and where its ``step`` needs a
            closure.
    """
    if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
        raise TypeError(
            f"base_optimizer must be a class of torch.optim, such as torch.optim.SGD, not {base_optimizer!r}"
        )
    _check_not_wrapper(base_optimizer, options)
    closure = inspect.signature(base_optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"base_optimizer {base_optimizer.__name__} evaluates the loss inside its step, which the two passes of "
            "F-SAM rule out; choose one whose step() needs no closure"
        )
    try:
        return base_optimizer(groups, **options)
    except (TypeError, ValueError):
        raise
    except Exception as error:
        raise TypeError(
            f"base_optimizer {base_optimizer.__name__} cannot be made from param groups: {type(error).__name__}: "
            f"{error}; choose an optimizer whose constructor takes parameters"
        ) from error


def _check_not_wrapper(base_optimizer: type[Optimizer], options: dict[str, Any]) -> None:
    """Raises TypeError for a class whose groups and state are those of an optimizer within it."""
    signature = inspect.signature(base_optimizer.__init__)
    needed = {name for name, parameter in signature.parameters.items() if parameter.default is inspect.Parameter.empty}
    needed -= options.keys()
    if isinstance(getattr(base_optimizer, "param_groups", None), property) or needed & {"optimizer", "base_optimizer"}:
        raise TypeError(
            f"base_optimizer {base_optimizer.__name__} is a wrapper around another optimizer, which has the groups and "
            "the state; give the optimizer that it would wrap"
        )
    if "model" in needed:
        raise TypeError(
            f"base_optimizer {base_optimizer.__name__} is made from a model; choose one that is made from parameters"
        )


def takes(base_optimizer: type[Optimizer], option: str) -> bool:
    """Whether a base optimizer's constructor has an option of that name."""
    kinds = base_optimizer.__mro__ if isinstance(base_optimizer, type) else ()
    return any(option in inspect.signature(kind.__init__).parameters for kind in kinds if kind is not object)


def with_base(groups: list[dict[str, Any]], base_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The base's groups, which may be more than were given, with the options of ours that ``groups`` have."""
    own = [{name: value for name, value in group.items() if name in OWN_OPTIONS} for group in groups]
    if len(base_groups) != len(groups):
        by_param = {id(param): mine for group, mine in zip(groups, own) for param in _tensors(group["params"])}
        own = [next((by_param[id(p)] for p in group["params"] if id(p) in by_param), {}) for group in base_groups]
    return [{**our_group(group), **mine} for group, mine in zip(base_groups, own)]


def _tensors(params: Any) -> list[Tensor]:
    params = [params] if isinstance(params, Tensor) else params
    return [param[1] if isinstance(param, tuple) else param for param in params]


def added(base: Optimizer, groups: list[dict[str, Any]], group: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups that the base makes of one that is to join ``groups``."""
    base.param_groups = [dict(one) for one in theirs(groups)]
    try:
        base.add_param_group(their_group(group))
        return with_base([group], base.param_groups[len(groups) :])
    finally:
        base.param_groups = base.param_groups[: len(groups)]
