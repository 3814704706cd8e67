"""The radius of a step's perturbation, which may be a function of the step's number."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor

from ..state.keys import STEP


def is_length(value: Any) -> bool:
    """Whether this is a finite number of at least 0, or a floating-point tensor of one element, which is not read."""
    if type(value) is float:  # asked in every step
        return 0.0 <= value < math.inf
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.is_floating_point()
    try:
        return isinstance(value, Real) and math.isfinite(value) and value >= 0
    except OverflowError:
        return False


def rho_of(group: dict[str, Any]) -> float | Tensor:
    """The radius in the present step.

    Raises:
        ValueError: the function gave something else.
    """
    rho = group["rho"]
    if not callable(rho):
        return rho
    value = rho(group[STEP])
    if not is_length(value):
        raise ValueError(
            f"rho({group[STEP]}), of the function given as rho, must be a finite number of at least 0, or a "
            f"floating-point tensor of one element, not {value!r}"
        )
    return value
