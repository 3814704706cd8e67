"""Sharpness of a minimum: the largest eigenvalue of the loss's Hessian, by power iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def top_hessian_eigenvalue(
    loss: Callable[[], Tensor],
    params: Sequence[Tensor],
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    seed: int = 0,
    after_iteration: Callable[[], None] = lambda: None,
) -> float:
    """The largest (most positive) eigenvalue of the Hessian of ``loss()`` in ``params``.

    Each iteration costs one Hessian-vector product, the derivative of gradient . v. It stops when
    the eigenvalue's estimate moves by less than ``tolerance`` of itself, or after
    ``max_iterations``. Power iteration finds the eigenvalue of largest *magnitude*; where that is
    negative, a second one on H shifted by it finds the top of the spectrum. Returns nan where the
    loss or a product is not finite. Gradients in ``p.grad`` are left alone.
    """
    gradients = torch.autograd.grad(loss(), params, create_graph=True)

    def hessian_times(vector: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(gradients, params, vector, retain_graph=True))

    def power_iteration(shift: float) -> float:
        """Of H - shift * I; the result has the shift added back."""
        random = torch.Generator().manual_seed(seed)
        vector = [torch.randn(p.shape, generator=random, dtype=p.dtype).to(p) for p in params]
        vector = _normalised(vector)
        estimate = float("nan")
        for _ in range(max_iterations):
            product = hessian_times(vector)
            if shift:
                torch._foreach_add_(product, vector, alpha=-shift)
            before, estimate = estimate, float(_dot(vector, product))
            after_iteration()
            if not abs(estimate - before) > tolerance * abs(estimate) and before == before:
                break
            if estimate != estimate:
                break
            vector = _normalised(product)
        return estimate + shift

    dominant = power_iteration(0.0)
    return power_iteration(dominant) if dominant < 0 else dominant


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def _normalised(vector: Sequence[Tensor]) -> list[Tensor]:
    norm = _dot(vector, vector).sqrt().clamp_min(torch.finfo(vector[0].dtype).tiny)
    return [v / norm for v in vector]
