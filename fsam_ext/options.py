"""The options of F-SAM: what a constructor's arguments become, and the sentences for those that cannot be used."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from numbers import Real
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .backends.ops import FORWARD
from .state.checkpoints import CURRENT_FORMAT
from .state.keys import FORMAT, LAYOUT, NAMES, OWN_OPTIONS, PREFIX, REUSE_SQ, STEP, our_group, uses_reuse
from .state.tensors import check_kept, check_parameter, name_of
from .step.base_options import takes
from .step.base_update import FusedBase, GenericBase, is_fused
from .step.rho import is_length

PERTURB_EPS = 1e-12
# What the constructor takes for itself.
OWN_ARGUMENTS = (*OWN_OPTIONS, "every", "start", "end", "rounding_seed", "ascent_sync", "backend", "capturable")


def for_base(
    base_optimizer: type[Optimizer], base_kwargs: dict[str, Any], own: dict[str, Any], capturable: bool
) -> dict[str, Any]:
    """The options that the base's constructor gets: NOTE [options of one name] in step/base_options.py.

    ``eps`` goes to ``own["perturb_eps"]`` where the base has none.

    Raises:
        ValueError: ``perturb_eps`` is given twice.
    """
    kwargs = {
        name.removeprefix(PREFIX) if name.removeprefix(PREFIX) in OWN_ARGUMENTS else name: value
        for name, value in base_kwargs.items()
    }
    if "eps" in kwargs and not takes(base_optimizer, "eps"):
        if own["perturb_eps"] != PERTURB_EPS:
            raise ValueError(
                f"eps is another name of perturb_eps for {base_optimizer.__name__}, and both were given; leave out eps"
            )
        own["perturb_eps"] = kwargs.pop("eps")
    if "capturable" not in kwargs and takes(base_optimizer, "capturable"):
        kwargs["capturable"] = capturable
    return kwargs


def defaults(base: Optimizer, own: dict[str, Any], layout: tuple[Any, ...]) -> dict[str, Any]:
    """The options that every group starts from: the base's, those of F-SAM, and the number of the step."""
    kept = dict(zip(LAYOUT, layout, strict=True))
    return {**our_group(base.defaults), **own, **kept, STEP: 0, FORMAT: CURRENT_FORMAT}


def is_finite(value: Any) -> bool:
    """Whether this is a number that a float holds."""
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:
        return False


def is_switch(value: Any) -> bool:
    """Whether this is True or False; 0 and 1 are: the official script says adaptive=0."""
    try:
        return value in (False, True)
    except (ValueError, RuntimeError):  # arrays and tensors of several elements
        return False


def check_options(group: dict[str, Any]) -> None:
    """Raises ValueError for an option of F-SAM that cannot be used."""

    def number(name: str, holds: Callable[[float], bool], wanted: str) -> None:
        value = group[name]
        if not is_finite(value) or not holds(value):
            raise ValueError(f"{name} must be {wanted}, not {value!r}")

    _check_rho(group["rho"])
    number("reuse", lambda v: v >= 0, "a finite number of at least 0 (0: nothing is reused)")
    number("sigma", lambda v: True, "a finite number (0 is SAM, 1 is the paper's choice)")
    number("lmbda", lambda v: 0 <= v < 1, "a number in [0, 1)")
    number("perturb_eps", lambda v: v >= 0, "a finite number of at least 0")
    for name in ("adaptive", "master_weights", "stochastic_rounding", "perturb"):
        if not is_switch(group[name]):
            raise ValueError(f"{name} must be True or False, not {group[name]!r}")
    if group["ema"] not in ("previous", "updated"):
        raise ValueError(f"ema must be 'previous' (the official code) or 'updated' (the paper), not {group['ema']!r}")
    if group["ema_dtype"] not in (None, torch.float32, torch.bfloat16, torch.int8):
        raise ValueError(
            "ema_dtype must be torch.float32, torch.bfloat16 or torch.int8, or None for the dtype of the arithmetic, "
            f"not {group['ema_dtype']!r}"
        )
    if group["reuse_dtype"] not in (None, torch.float32, torch.bfloat16):
        raise ValueError(
            "reuse_dtype must be torch.float32 or torch.bfloat16, or None for the dtype of the arithmetic, not "
            f"{group['reuse_dtype']!r}"
        )
    if group["reuse_dtype"] is not None and group["reuse"] == 0:
        raise ValueError(
            f"reuse_dtype={group['reuse_dtype']} is of what reuse keeps, and reuse is {group['reuse']!r}; give a "
            "reuse, such as 0.3, or leave reuse_dtype out"
        )
    for dtype, most in ((torch.bfloat16, 0.99), (torch.int8, 0.999)):
        if group["ema_dtype"] == dtype and group["lmbda"] > most:
            raise ValueError(
                f"ema_dtype={dtype} cannot follow an average with lmbda={group['lmbda']}: its updates are smaller than "
                f"what eight bits tell apart; use lmbda <= {most}, or ema_dtype=torch.float32"
            )
    if group["forward_dtype"] not in list(FORWARD):
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


def _check_rho(rho: Any) -> None:
    if callable(rho) or is_length(rho):
        return
    if isinstance(rho, Tensor):
        raise ValueError(
            f"rho must be a number or a floating-point tensor of one element, not one of shape {tuple(rho.shape)} and "
            f"{rho.dtype}"
        )
    raise ValueError(f"rho must be a finite number of at least 0, or a function of the step's number, not {rho!r}")


def check_perturb(groups: list[dict[str, Any]]) -> None:
    """Raises ValueError where no group is perturbed."""
    if not any(group["perturb"] for group in groups):
        raise ValueError(
            "perturb is False in all groups, so nothing would be perturbed; leave it out of one of them, or use the "
            "base optimizer alone"
        )


def complete(optimizer: Any) -> None:
    """Gives the first group what all of them keep together.

    Raises:
        ValueError: options of the optimizer and of its groups do not go with each other.
    """
    groups = optimizer.param_groups
    check_perturb(groups)
    if optimizer.capturable and any(callable(group["rho"]) for group in groups):
        raise ValueError(
            "rho is a function of the step's number, which a CUDA graph would not call again; with capturable=True "
            "give a tensor on the device and write into it"
        )
    reuse = next((group["reuse"] for group in groups if uses_reuse(group)), None)
    if reuse is None:
        return
    if optimizer.schedule.every == 1:
        raise ValueError(
            f"reuse={reuse!r} is for the steps between two ascents, and with every=1 there are none; give every, such "
            "as 5"
        )
    if not optimizer.ascent_sync:
        raise ValueError(
            f"reuse={reuse!r} with ascent_sync=False would add another direction on each rank, whose weights would "
            "drift apart; leave one of them out"
        )
    groups[0].setdefault(REUSE_SQ, 0.0)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.is_floating_point()
    return is_finite(value)


def check_base_options(group: dict[str, Any], number: int) -> None:
    """Raises ValueError for an option of SGD, Adam or AdamW that pass C cannot take."""

    def refuse(name: str, wanted: str) -> None:
        raise ValueError(f"{name} of group {number} must be {wanted}, not {group[name]!r}")

    if not is_length(group["lr"]):
        refuse("lr", "a finite number of at least 0, or a floating-point tensor of one element")
    for name in ("weight_decay", "momentum", "dampening", "eps"):
        if name in group and (isinstance(group[name], Tensor) or not _is_number(group[name])):
            refuse(name, "a finite number")
    betas = group.get("betas", (0.0, 0.0))
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(map(_is_number, betas))
    if not pair or not all(0 <= float(beta) < 1 for beta in betas):
        refuse("betas", "two numbers in [0, 1)")
    for name in ("maximize", "nesterov", "decoupled_weight_decay"):
        if not is_switch(group.get(name, False)):
            refuse(name, "True or False")


def _has_usable_lr_and_rho(group: dict[str, Any]) -> bool:
    rho = group["rho"]
    return is_length(group.get("lr", 0)) and (is_length(rho) or callable(rho))


class Watched:
    """The options of groups, which a user may edit at any time: checked before a step writes anything.

    Those that are what they were the last time cost one comparison.
    """

    # lr and rho change in every step of a schedule: they are looked at by themselves.
    _OWN = itemgetter(*(name for name in NAMES if name != "rho"))
    _THEIRS = (
        *("weight_decay", "momentum", "dampening", "eps", "betas", "nesterov", "maximize"),
        *("decoupled_weight_decay", "amsgrad", "differentiable"),
    )

    def __init__(self) -> None:
        self._known: list[tuple[Any, ...]] = []

    def check(self, groups: list[dict[str, Any]], base: FusedBase | GenericBase) -> None:
        """Raises TypeError or ValueError for an option that cannot be used."""
        now = [(self._OWN(group), *map(group.get, self._THEIRS)) for group in groups]
        try:
            known = now == self._known and all(map(_has_usable_lr_and_rho, groups))
        except RuntimeError:  # tensors of several elements, which cannot be compared
            known = False
        if known:
            return
        self._known = []
        for number, group in enumerate(groups):
            check_options(group)
            check_fused(group, number, base)
        check_perturb(groups)
        self._known = now


def check_fused(group: dict[str, Any], number: int, base: FusedBase | GenericBase) -> None:
    """Raises ValueError for options of the base that pass C, which was chosen for it, cannot take."""
    if not isinstance(base, FusedBase):
        return
    for name in ("amsgrad", "differentiable"):
        if not is_switch(group.get(name, False)):
            raise ValueError(f"{name} of group {number} must be True or False, not {group[name]!r}")
    if not is_fused(type(base.optimizer), group):
        raise ValueError(
            f"group {number} asks {type(base.optimizer).__name__} for amsgrad or differentiable, which this optimizer "
            "was made without; give the option to the constructor"
        )
    check_base_options(group, number)


def check_group(param_groups: list[dict[str, Any]], number: int, base: FusedBase | GenericBase) -> None:
    """Raises TypeError or ValueError for a group that cannot be used."""
    group, describe = param_groups[number], partial(name_of, param_groups)
    check_options(group)
    for param in group["params"]:
        check_parameter(param, describe)
    check_fused(group, number, base)
    check_kept(group, isinstance(base, FusedBase), describe)


def check_loaded(groups: list[dict[str, Any]], own: dict[str, Any], base: FusedBase | GenericBase) -> None:
    """Raises ValueError for options of a checkpoint that cannot be taken; ``own``: those for what it lacks."""
    for number, group in enumerate(groups):
        try:
            check_options({**own, **group})
            check_fused(group, number, base)
        except ValueError as error:
            raise ValueError(f"the checkpoint cannot be taken: {error}") from None


def check_seed(seed: Any) -> None:
    """Raises ValueError for a seed that the kernels cannot take."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"rounding_seed must be an integer of 64 bits, not {seed!r}")
