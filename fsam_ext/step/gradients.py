"""Clears gradients; those that ``flatten_parameters`` laid out are zeroed in place, run by run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..state.flatten import REGISTRY, FlatParameters
from .layout import Layout


def clear_flattened(groups: list[dict[str, Any]], layout: Layout, set_to_none: bool) -> None:
    """Clears all gradients of ``groups``, where some parameters are flattened."""
    flattened: dict[FlatParameters, list[Tensor]] = {}
    for number, group in enumerate(groups):
        segments = layout.segments_of(number)
        if len(segments) == 1 and segments[0].zero_flat_grads(group["params"]):
            continue
        for param in group["params"]:
            flat = REGISTRY.get(param)
            if flat is not None and flat.grad is not None:
                flattened.setdefault(flat, []).append(param)
            elif param.grad is not None:
                param.grad = None if set_to_none else param.grad.detach().zero_()
    for flat, params in flattened.items():
        flat.zero_grad(params)
