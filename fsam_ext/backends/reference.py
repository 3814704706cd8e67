"""The oracle: the ops in plain PyTorch, a line of the paper a line of code, sharing nothing with what it judges.

It serves any device and dtype that PyTorch serves. Tests run it on float64 copies of a backend's inputs.
Sources: Li et al., CVPR 2024 (arXiv 2403.12350), its official code, and torch.optim's single-tensor loops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .ops import CHUNK, EFFECT, FORWARD
from .reference_storage import (
    Average,
    Writes,
    compute,
    dequantized,
    in_memory_order,
    known,
    quantized,
    random_bits,
    stochastically_rounded,
)

__all__ = ["dequantized", "quantized", "random_bits", "stochastically_rounded"]

_FORWARD_DTYPES = {number: dtype for dtype, number in FORWARD.items()}


def _slices(params: Sequence[Tensor], offsets: Tensor, flat: Tensor | None) -> Iterator[Tensor | None]:
    """Each row's slice of a flat buffer, with the shape and strides of its parameter."""
    for param, offset in zip(params, offsets.tolist(), strict=True):
        yield (None if flat is None else flat.as_strided(param.shape, param.stride(), flat.storage_offset() + offset))


def _unscaled(grad: Tensor, scale: Tensor | float) -> Tensor:
    """g / scale in the dtype of the arithmetic: two tensors without dimensions would promote each other."""
    g = compute(grad)
    return (g / scale).to(g.dtype)


def _number(tensor: Tensor | None, otherwise: float) -> Tensor | float:
    return otherwise if tensor is None else tensor.reshape(-1)[0].double()


def _adopted(master: Tensor, w: Tensor) -> Tensor:
    """The masters; or the weights, where others wrote them since they were the masters' rounded copies."""
    copy = master.to(w.dtype)
    return torch.where((copy == w) | (copy.isnan() & w.isnan()), master, w.to(master.dtype))


# ---- The average -----------------------------------------------------------------------------------------------------


def _averages(
    params: Sequence[Tensor], offsets: Tensor, ema: Tensor | None, ema_scale: Tensor | None
) -> Iterator[Average | None]:
    for param, offset in zip(params, offsets.tolist(), strict=True):
        yield (None if ema is None else Average(param, offset, ema, ema_scale))


def _updated(ema: Tensor, g: Tensor, lmbda: float) -> Tensor:
    """m = lmbda m + (1 - lmbda) g; an element without a past (NaN) becomes g."""
    return torch.where(ema.isnan(), g, lmbda * ema + (1 - lmbda) * g)


def _noise(g: Tensor, ema: Tensor | None, sigma: float, lmbda: float, ema_updated: bool) -> Tensor:
    """d = g - sigma m."""
    if ema is None:
        return g
    return g - sigma * (_updated(ema, g, lmbda) if ema_updated else known(ema))


# ---- The ascent ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def noise_norm(
    params, grads, offsets, ema, ema_scale, grad_scale, sigma, lmbda, adaptive, ema_updated, partials, stats
) -> None:
    """stats = [sum d^2, sum g^2, sum g m, sum m^2, non-finite g], adaptive: (|w| d)^2."""
    scale = _number(grad_scale, 1.0)
    total = torch.zeros_like(stats)
    for w, grad, average in zip(params, grads, _averages(params, offsets, ema, ema_scale), strict=True):
        g = _unscaled(grad, scale)
        m = None if average is None else average.read()
        d = _noise(g, m, sigma, lmbda, ema_updated)
        if adaptive:
            d = compute(w).abs() * d
        past = torch.zeros_like(g) if m is None else known(m)
        rows = (d * d, g * g, g * past, past * past, ~g.isfinite())
        total += torch.stack([row.sum(dtype=torch.float64) for row in rows])
    stats.copy_(total)


def _seen(stored: Tensor, forward: int) -> Tensor:
    """The weights that a forward pass in another dtype sees."""
    dtype = _FORWARD_DTYPES[forward]
    return compute(stored if dtype is None else stored.to(dtype))


def _effect(effective: Tensor, intended: Tensor, like: Tensor) -> Tensor:
    """Sum e^2, sum e i and sum i^2 of each chunk of a row."""
    products = (effective * effective, effective * intended, intended * intended)
    chunks = -(-like.numel() // CHUNK)
    padded = torch.zeros(EFFECT, chunks * CHUNK, dtype=torch.float64, device=like.device)
    for row, product in zip(padded, products):
        row[: like.numel()] = in_memory_order(product, like)
    return padded.view(EFFECT, chunks, CHUNK).sum(2).T.flatten()


@torch.no_grad()
def perturb(
    params,
    grads,
    offsets,
    ema,
    ema_scale,
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
    feeds,
    forward,
    effect,
    journal=None,
    kept=None,
) -> None:
    """backup = w, w = w + rho d / (norm + eps), m = the updated average; masters in the place of w."""
    scale = _number(grad_scale, 1.0)
    finite = stats[0].isfinite()
    norm = stats[0].sqrt()
    length = torch.where(norm > 0, _number(rho_tensor, rho) / (norm + eps), 0.0)
    effects, writes = [], Writes()
    states = (_averages(params, offsets, ema, ema_scale), *(_slices(params, offsets, flat) for flat in (backup, kept)))
    for w, grad, average, saved, first in zip(params, grads, *states, strict=True):
        masters = saved.dtype != w.dtype
        source = _adopted(saved, w) if masters else w
        start, before = compute(source), source.to(w.dtype)
        g = _unscaled(grad, scale)
        m = None if average is None else average.read()
        intended = _noise(g, m, sigma, lmbda, ema_updated) * length.to(g.dtype)
        if adaptive:
            intended = start**2 * intended
        after = (start + intended).to(w.dtype)
        writes.add(saved, source.clone())
        writes.add(w, torch.where(finite, after, w))
        if m is not None and feeds:
            average.write(_updated(m, g, lmbda), finite, writes)
        if first is not None:
            writes.add(first, torch.where(finite, g.to(first.dtype), first))
        if effect is not None:
            effects.append(_effect(_seen(after, forward) - _seen(before, forward), intended, w))
    if effects:
        sums = torch.cat(effects)
        writes.add(effect.view(-1)[: sums.numel()], torch.where(finite, sums, 0.0).to(effect.dtype))
    writes.commit(journal)


def _applies(stats: Tensor | None, found_inf: Tensor | None, device: torch.device) -> Tensor:
    applies = torch.ones((), dtype=torch.bool, device=device)
    if stats is not None:
        applies = applies & stats[0].isfinite()
    if found_inf is not None:
        applies = applies & (found_inf.reshape(-1)[0] == 0)
    return applies


@torch.no_grad()
def update_ema(
    params,
    grads,
    offsets,
    ema,
    ema_scale,
    stats,
    grad_scale,
    found_inf,
    lmbda,
    journal=None,
    partials=None,
    grad_sq=None,
) -> None:
    """m = lmbda m + (1 - lmbda) g where g is finite; sum g^2."""
    scale, writes = _number(grad_scale, 1.0), Writes()
    for grad, average in zip(grads, _averages(params, offsets, ema, ema_scale), strict=True):
        g, m = _unscaled(grad, scale), average.read()
        fed = torch.where(g.isfinite(), _updated(m, g, lmbda), m)
        average.write(fed, _applies(stats, found_inf, g.device), writes)
    if grad_sq is not None:
        writes.add(grad_sq.view(-1)[0], _sum_sq([_unscaled(grad, scale) for grad in grads], grad_sq))
    writes.commit(journal)


# ---- Reuse of the second gradient ------------------------------------------------------------------------------------


def _sum_sq(values: Sequence[Tensor], like: Tensor) -> Tensor:
    return sum(((value * value).sum(dtype=torch.float64) for value in values), like.new_zeros(()))


@torch.no_grad()
def dots(params, grads, offsets, kept, grad_scale, partials, sums) -> None:
    """sums = [<g, k>, <k, k>]."""
    scale = _number(grad_scale, 1.0)
    total = torch.zeros_like(sums)
    for grad, k in zip(grads, map(compute, _slices(params, offsets, kept)), strict=True):
        total += torch.stack([(other * k).sum(dtype=torch.float64) for other in (_unscaled(grad, scale), k)])
    sums.copy_(total)


@torch.no_grad()
def project(params, grads, offsets, kept, sums, stats, grad_scale, found_inf, partials, kept_sq, journal=None) -> None:
    """k = g - (<g, k> / <k, k>) k; <k, k>."""
    scale, writes = _number(grad_scale, 1.0), Writes()
    ascended = _applies(stats, None, sums.device)
    exists = _applies(None, found_inf, sums.device) & sums.isfinite().all()
    part = torch.where(sums[1] > 0, sums[0] / sums[1], 0.0)
    stored = []
    for grad, k in zip(grads, _slices(params, offsets, kept), strict=True):
        g = _unscaled(grad, scale)
        stored.append((g - part.to(g.dtype) * compute(k)).to(k.dtype))
        writes.add(k, torch.where(ascended & exists, stored[-1], k))
    total = torch.where(exists, _sum_sq(list(map(compute, stored)), sums), 0.0)
    writes.add(kept_sq.view(-1)[0], torch.where(ascended, total, torch.nan))
    writes.commit(journal)


def _with_reused(g: Tensor, reused: Tensor | None, reuse_sq: Tensor | None, reuse: float, eps: float) -> Tensor:
    """g + reuse (|g| / (|v| + eps)) v."""
    if reused is None:
        return g
    length = reuse * reuse_sq[0].sqrt() / (reuse_sq[1].sqrt() + eps)
    length = torch.where(reuse_sq[:2].isfinite().all() & (reuse_sq[1] > 0), length, 0.0)
    return torch.where(length == 0, g, g + length.to(g.dtype) * compute(reused))


# ---- The restore and the base updates --------------------------------------------------------------------------------


@torch.no_grad()
def restore(params, offsets, backup) -> None:
    """w = backup."""
    for w, saved in zip(params, _slices(params, offsets, backup), strict=True):
        w.copy_(saved)


def _source(w: Tensor, saved: Tensor | None, adopts: bool) -> Tensor:
    """Where an update starts from: the weights as they are, their copy, or their masters."""
    if saved is None:
        return w
    return _adopted(saved, w) if adopts and saved.dtype != w.dtype else saved


def _rounded(x: Tensor, w: Tensor, offset: int, masters: bool, rounding: Tensor | None) -> Tensor:
    """New weights in the dtype of ``w``; stochastically where there is no master to keep the rest."""
    if rounding is None or masters or w.dtype.itemsize != 2:
        return x.to(w.dtype)
    positions = torch.arange(offset, offset + w.numel(), device=w.device).as_strided(w.shape, w.stride())
    return stochastically_rounded(x, w.dtype, random_bits(positions, rounding))


def _write(
    writes: Writes,
    w: Tensor,
    saved: Tensor | None,
    source: Tensor,
    adopts: bool,
    x: Tensor,
    applies: Tensor,
    offset: int,
    rounding: Tensor | None,
) -> None:
    """w = the new weights where the update ``applies``, else those of its ``source``; masters get theirs too."""
    masters = saved is not None and saved.dtype != w.dtype
    kept = w if masters and adopts else source.to(w.dtype)
    writes.add(w, torch.where(applies, _rounded(x, w, offset, masters, rounding), kept))
    if masters:
        writes.add(saved, torch.where(applies, x, source))


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
    rounding,
    adopts=False,
    journal=None,
    reused=None,
    reuse_sq=None,
    reuse=0.0,
    reuse_eps=0.0,
) -> None:
    """w = SGD(backup, g), torch.optim.SGD."""
    scale, rate, writes = _number(grad_scale, 1.0), _number(lr_tensor, lr), Writes()
    states = [offsets.tolist(), *(_slices(params, offsets, flat) for flat in (backup, momentum_buffer, reused))]
    for w, grad, offset, saved, buffer, v in zip(params, grads, *states, strict=True):
        applies = _applies(stats, found_inf, w.device)
        source = _source(w, saved, adopts)
        value = compute(source)
        g = _with_reused(_unscaled(grad, scale), v, reuse_sq, reuse, reuse_eps)
        g = -g if maximize else g
        g = g + weight_decay * value
        if buffer is not None:
            updated = torch.where(buffer.isnan(), g, momentum * buffer + (1 - dampening) * g)
            writes.add(buffer, torch.where(applies, updated, buffer))
            g = g + momentum * updated if nesterov else updated
        _write(writes, w, saved, source, adopts, value - rate * g, applies, offset, rounding)
    writes.commit(journal)


@torch.no_grad()
def count_steps(steps, index, corrections, stats, found_inf, lr, lr_tensor, beta1, beta2, journal=None) -> None:
    """t += 1; lr / (1 - beta1^t) and sqrt(1 - beta2^t), torch.optim.Adam."""
    counts = steps.index_select(0, index) + _applies(stats, found_inf, steps.device).to(steps.dtype)
    t = counts[: len(corrections)].double()
    writes = Writes()
    writes.add(steps, steps.index_copy(0, index, counts))
    writes.add(corrections, torch.stack([_number(lr_tensor, lr) / (1 - beta1**t), (1 - beta2**t).sqrt()], 1))
    writes.commit(journal)


@torch.no_grad()
def restore_adam(
    params,
    grads,
    offsets,
    backup,
    exp_avg,
    exp_avg_sq,
    corrections,
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
    rounding,
    adopts=False,
    journal=None,
    reused=None,
    reuse_sq=None,
    reuse=0.0,
    reuse_eps=0.0,
) -> None:
    """w = Adam(backup, g), torch.optim.Adam and AdamW."""
    scale, rate, writes = _number(grad_scale, 1.0), _number(lr_tensor, lr), Writes()
    states = [offsets.tolist(), *(_slices(params, offsets, flat) for flat in (backup, exp_avg, exp_avg_sq, reused))]
    for w, grad, offset, saved, first, second, v, (step_size, root) in zip(
        params, grads, *states, corrections, strict=True
    ):
        applies = _applies(stats, found_inf, w.device)
        source = _source(w, saved, adopts)
        value = compute(source)
        g = _with_reused(_unscaled(grad, scale), v, reuse_sq, reuse, reuse_eps)
        g = -g if maximize else g
        if decoupled:
            value = value * (1 - rate * weight_decay)
        else:
            g = g + weight_decay * value
        mean = first + (1 - beta1) * (g - first)
        mean_sq = beta2 * second + (1 - beta2) * g * g
        denominator = mean_sq.sqrt() / root + eps
        x = value - step_size * mean / denominator
        _write(writes, w, saved, source, adopts, x, applies, offset, rounding)
        writes.add(first, torch.where(applies, mean, first))
        writes.add(second, torch.where(applies, mean_sq, second))
    writes.commit(journal)
