"""The oracle: the ops in plain PyTorch, a line of the paper a line of code, sharing nothing with what it judges.

It serves any device and dtype that PyTorch serves. Tests run it on float64 copies of a backend's inputs.
Sources: Li et al., CVPR 2024 (arXiv 2403.12350), its official code, and torch.optim's single-tensor loops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def _compute(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _slices(params: Sequence[Tensor], offsets: Tensor, flat: Tensor | None) -> Iterator[Tensor | None]:
    """Each row's slice of a flat buffer, with the shape and strides of its parameter."""
    for param, offset in zip(params, offsets.tolist(), strict=True):
        yield (None if flat is None else flat.as_strided(param.shape, param.stride(), flat.storage_offset() + offset))


def _number(tensor: Tensor | None, otherwise: float) -> Tensor | float:
    return otherwise if tensor is None else tensor.reshape(-1)[0].double()


def _average(ema: Tensor, g: Tensor, lmbda: float) -> Tensor:
    """m = lmbda m + (1 - lmbda) g; an element without a past (NaN) becomes g."""
    return torch.where(ema.isnan(), g, lmbda * ema + (1 - lmbda) * g)


def _noise(g: Tensor, ema: Tensor | None, sigma: float, lmbda: float, ema_updated: bool) -> Tensor:
    """d = g - sigma m."""
    if ema is None:
        return g
    return g - sigma * (_average(ema, g, lmbda) if ema_updated else ema.nan_to_num(nan=0.0))


@torch.no_grad()
def noise_norm(params, grads, offsets, ema, grad_scale, sigma, lmbda, adaptive, ema_updated, partials, stats) -> None:
    """stats = [sum d^2, sum g^2, sum g m, sum m^2, non-finite g], adaptive: (|w| d)^2."""
    scale = _number(grad_scale, 1.0)
    total = torch.zeros_like(stats)
    for w, grad, m in zip(params, grads, _slices(params, offsets, ema), strict=True):
        g = _compute(grad) / scale
        d = _noise(g, m, sigma, lmbda, ema_updated)
        if adaptive:
            d = _compute(w).abs() * d
        known = torch.zeros_like(g) if m is None else m.nan_to_num(nan=0.0)
        rows = (d * d, g * g, g * known, known * known, ~g.isfinite())
        total += torch.stack([row.sum(dtype=torch.float64) for row in rows])
    stats.copy_(total)


@torch.no_grad()
def perturb(
    params,
    grads,
    offsets,
    ema,
    backup,
    stats,
    grad_scale,
    rho,
    rho_tensor,
    sigma,
    lmbda,
    eps,
    adaptive,
    ema_updated,
) -> None:
    """backup = w, w = w + rho d / (norm + eps), m = the updated average."""
    scale = _number(grad_scale, 1.0)
    finite = stats[0].isfinite()
    norm = stats[0].sqrt()
    length = torch.where(norm > 0, _number(rho_tensor, rho) / (norm + eps), 0.0)
    slices = zip(_slices(params, offsets, ema), _slices(params, offsets, backup), strict=True)
    for w, grad, (m, saved) in zip(params, grads, slices, strict=True):
        saved.copy_(w)
        g = _compute(grad) / scale
        step = _noise(g, m, sigma, lmbda, ema_updated) * length.to(g.dtype)
        if adaptive:
            step = _compute(w) ** 2 * step
        w.copy_(torch.where(finite, _compute(w) + step, _compute(w)))
        if m is not None:
            m.copy_(torch.where(finite, _average(m, g, lmbda), m))


@torch.no_grad()
def restore(params, offsets, backup) -> None:
    """w = backup."""
    for w, saved in zip(params, _slices(params, offsets, backup), strict=True):
        w.copy_(saved)


def _applies(stats: Tensor | None, found_inf: Tensor | None, device: torch.device) -> Tensor:
    applies = torch.ones((), dtype=torch.bool, device=device)
    if stats is not None:
        applies = applies & stats[0].isfinite()
    if found_inf is not None:
        applies = applies & (found_inf.reshape(-1)[0] == 0)
    return applies


@torch.no_grad()
def restore_sgd(
    params,
    grads,
    offsets,
    backup,
    momentum_buffer,
    stats,
    grad_scale,
    found_inf,
    lr,
    lr_tensor,
    momentum,
    dampening,
    weight_decay,
    nesterov,
    maximize,
) -> None:
    """w = SGD(backup, g), torch.optim.SGD."""
    scale, rate = _number(grad_scale, 1.0), _number(lr_tensor, lr)
    states = zip(_slices(params, offsets, backup), _slices(params, offsets, momentum_buffer), strict=True)
    for w, grad, (saved, buffer) in zip(params, grads, states, strict=True):
        applies = _applies(stats, found_inf, w.device)
        start = w.clone() if saved is None else saved
        value = _compute(start)
        g = _compute(grad) / scale
        g = -g if maximize else g
        g = g + weight_decay * value
        if buffer is not None:
            updated = torch.where(buffer.isnan(), g, momentum * buffer + (1 - dampening) * g)
            buffer.copy_(torch.where(applies, updated, buffer))
            g = g + momentum * updated if nesterov else updated
        w.copy_(torch.where(applies, (value - rate * g).to(w.dtype), start))


@torch.no_grad()
def restore_adam(
    params,
    grads,
    offsets,
    backup,
    exp_avg,
    exp_avg_sq,
    steps,
    stats,
    grad_scale,
    found_inf,
    lr,
    lr_tensor,
    beta1,
    beta2,
    eps,
    weight_decay,
    decoupled,
    maximize,
) -> None:
    """w = Adam(backup, g), torch.optim.Adam and AdamW."""
    scale, rate = _number(grad_scale, 1.0), _number(lr_tensor, lr)
    slices = [_slices(params, offsets, flat) for flat in (backup, exp_avg, exp_avg_sq)]
    for w, grad, saved, first, second, step in zip(params, grads, *slices, steps.double(), strict=True):
        applies = _applies(stats, found_inf, w.device)
        start = w.clone() if saved is None else saved
        value = _compute(start)
        g = _compute(grad) / scale
        g = -g if maximize else g
        if decoupled:
            value = value * (1 - rate * weight_decay)
        else:
            g = g + weight_decay * value
        mean = first + (1 - beta1) * (g - first)
        mean_sq = beta2 * second + (1 - beta2) * g * g
        step_size = (rate / (1 - beta1**step)).to(value.dtype)
        denominator = mean_sq.sqrt() / (1 - beta2**step).sqrt().to(value.dtype) + eps
        w.copy_(torch.where(applies, (value - step_size * mean / denominator).to(w.dtype), start))
        first.copy_(torch.where(applies, mean, first))
        second.copy_(torch.where(applies, mean_sq, second))
