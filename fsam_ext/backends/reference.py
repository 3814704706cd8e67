"""The oracle: the ops in plain PyTorch, a line of the paper a line of code, sharing nothing with what it judges.

It serves any device and dtype that PyTorch serves. Tests run it on float64 copies of a backend's inputs.
Sources: Li et al., CVPR 2024 (arXiv 2403.12350), its official code, and torch.optim's single-tensor loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..ops import CHUNK, EFFECT, FORWARD, QUANTIZED

_FORWARD_DTYPES = {number: dtype for dtype, number in FORWARD.items()}


def _compute(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _slices(params: Sequence[Tensor], offsets: Tensor, flat: Tensor | None) -> Iterator[Tensor | None]:
    """Each row's slice of a flat buffer, with the shape and strides of its parameter."""
    for param, offset in zip(params, offsets.tolist(), strict=True):
        yield (None if flat is None else flat.as_strided(param.shape, param.stride(), flat.storage_offset() + offset))


def _in_memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    """The elements of ``tensor`` in the order in which those of ``like`` lie in memory, in one dimension."""
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor).as_strided((like.numel(),), (1,))


def _known(state: Tensor) -> Tensor:
    """A state that has seen no gradient (NaN) counts as zero."""
    return torch.where(state.isnan(), 0.0, state)


def _unscaled(grad: Tensor, scale: Tensor | float) -> Tensor:
    """g / scale in the dtype of the arithmetic: two tensors without dimensions would promote each other."""
    g = _compute(grad)
    return (g / scale).to(g.dtype)


def _number(tensor: Tensor | None, otherwise: float) -> Tensor | float:
    return otherwise if tensor is None else tensor.reshape(-1)[0].double()


# ---- The average -----------------------------------------------------------------------------------------------------


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    """The values of int8 ``codes`` with one scale for each block of 128; NaN where a block is unset."""
    return codes.to(scales.dtype) * scales.repeat_interleave(QUANTIZED)[: codes.numel()]


def quantized(values: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 codes and the scales of ``values``, one-dimensional; a NaN counts as zero.

    A scale is the largest magnitude of its block over 127, rounded up to 17 significant bits, so that no code is
    clipped and 127 times the scale is exact in float32; and 0 below 2^-100.
    """
    blocks = -(-values.numel() // QUANTIZED)
    padded = values.new_zeros(blocks * QUANTIZED)
    padded[: values.numel()] = _known(values)
    padded = padded.view(blocks, QUANTIZED)
    largest = padded.abs().amax(1)
    zero = largest < 2.0**-100
    # Tensors on both sides: PyTorch may multiply by the rounded inverse of a number.
    steps = torch.full_like(largest, 127.0)
    mantissa, exponent = torch.frexp(largest / steps)
    scales = torch.where(zero, 0.0, torch.ldexp((mantissa * 2**17).ceil(), exponent - 17))
    inverse = torch.where(zero, 0.0, 1 / scales)
    codes = (padded * inverse[:, None]).round().to(torch.int8)  # half to even
    return codes.flatten()[: values.numel()], scales


class _Average:
    """One row's part of the average, in whichever dtype stores it."""

    def __init__(self, like: Tensor, offset: int, ema: Tensor, ema_scale: Tensor | None) -> None:
        self.like = like
        self.stored = ema.reshape(-1)[offset : offset + like.numel()]
        self.scales = None
        if ema.dtype == torch.int8:
            first = offset // QUANTIZED
            self.scales = ema_scale.reshape(-1)[first : first - (-like.numel() // QUANTIZED)]

    def read(self) -> Tensor:
        """Its values, shaped like the parameter; NaN where no gradient has been seen."""
        values = _compute(self.stored) if self.scales is None else dequantized(self.stored, self.scales)
        return values.as_strided(self.like.shape, self.like.stride(), values.storage_offset())

    def write(self, values: Tensor, applies: Tensor) -> None:
        """Stores ``values`` where ``applies``."""
        values = _in_memory_order(values, self.like)
        if self.scales is not None:
            values, scales = quantized(values)
            self.scales.copy_(torch.where(applies, scales, self.scales))
        self.stored.copy_(torch.where(applies, values.to(self.stored.dtype), self.stored))


def _averages(
    params: Sequence[Tensor], offsets: Tensor, ema: Tensor | None, ema_scale: Tensor | None
) -> Iterator[_Average | None]:
    for param, offset in zip(params, offsets.tolist(), strict=True):
        yield (None if ema is None else _Average(param, offset, ema, ema_scale))


def _updated(ema: Tensor, g: Tensor, lmbda: float) -> Tensor:
    """m = lmbda m + (1 - lmbda) g; an element without a past (NaN) becomes g."""
    return torch.where(ema.isnan(), g, lmbda * ema + (1 - lmbda) * g)


def _noise(g: Tensor, ema: Tensor | None, sigma: float, lmbda: float, ema_updated: bool) -> Tensor:
    """d = g - sigma m."""
    if ema is None:
        return g
    return g - sigma * (_updated(ema, g, lmbda) if ema_updated else _known(ema))


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
            d = _compute(w).abs() * d
        known = torch.zeros_like(g) if m is None else _known(m)
        rows = (d * d, g * g, g * known, known * known, ~g.isfinite())
        total += torch.stack([row.sum(dtype=torch.float64) for row in rows])
    stats.copy_(total)


def _seen(stored: Tensor, forward: int) -> Tensor:
    """The weights that a forward pass in another dtype sees."""
    dtype = _FORWARD_DTYPES[forward]
    return _compute(stored if dtype is None else stored.to(dtype))


def _effect(effective: Tensor, intended: Tensor, like: Tensor) -> Tensor:
    """Sum e^2, sum e i and sum i^2 of each chunk of a row."""
    products = (effective * effective, effective * intended, intended * intended)
    chunks = -(-like.numel() // CHUNK)
    padded = torch.zeros(EFFECT, chunks * CHUNK, dtype=torch.float64, device=like.device)
    for row, product in zip(padded, products):
        row[: like.numel()] = _in_memory_order(product, like)
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
) -> None:
    """backup = w, w = w + rho d / (norm + eps), m = the updated average; masters in the place of w."""
    scale = _number(grad_scale, 1.0)
    finite = stats[0].isfinite()
    norm = stats[0].sqrt()
    length = torch.where(norm > 0, _number(rho_tensor, rho) / (norm + eps), 0.0)
    effects = []
    averages = _averages(params, offsets, ema, ema_scale)
    for w, grad, average, saved in zip(params, grads, averages, _slices(params, offsets, backup), strict=True):
        if saved.dtype == w.dtype:
            saved.copy_(w)
        start, before = _compute(saved), saved.to(w.dtype)
        g = _unscaled(grad, scale)
        m = None if average is None else average.read()
        intended = _noise(g, m, sigma, lmbda, ema_updated) * length.to(g.dtype)
        if adaptive:
            intended = start**2 * intended
        after = (start + intended).to(w.dtype)
        w.copy_(torch.where(finite, after, w))
        if m is not None and feeds:
            average.write(_updated(m, g, lmbda), finite)
        if effect is not None:
            effects.append(_effect(_seen(after, forward) - _seen(before, forward), intended, w))
    if effects:
        sums = torch.cat(effects)
        effect.view(-1)[: sums.numel()] = torch.where(finite, sums, 0.0)


def _applies(stats: Tensor | None, found_inf: Tensor | None, device: torch.device) -> Tensor:
    applies = torch.ones((), dtype=torch.bool, device=device)
    if stats is not None:
        applies = applies & stats[0].isfinite()
    if found_inf is not None:
        applies = applies & (found_inf.reshape(-1)[0] == 0)
    return applies


@torch.no_grad()
def update_ema(params, grads, offsets, ema, ema_scale, stats, grad_scale, found_inf, lmbda) -> None:
    """m = lmbda m + (1 - lmbda) g where g is finite."""
    scale = _number(grad_scale, 1.0)
    for grad, average in zip(grads, _averages(params, offsets, ema, ema_scale), strict=True):
        g, m = _unscaled(grad, scale), average.read()
        average.write(torch.where(g.isfinite(), _updated(m, g, lmbda), m), _applies(stats, found_inf, g.device))


# ---- The restore and the base updates --------------------------------------------------------------------------------


@torch.no_grad()
def restore(params, offsets, backup) -> None:
    """w = backup."""
    for w, saved in zip(params, _slices(params, offsets, backup), strict=True):
        w.copy_(saved)


def _signed(number: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return number - (number >> 63 << 64)


def _shifted(x: Tensor, by: int) -> Tensor:
    """An int64 shifted to the right as an unsigned one."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def random_bits(positions: Tensor, rounding: Tensor) -> Tensor:
    """32 random bits (in int64) for each of the ``positions``: the finalisers of SplitMix64 and of MurmurHash3.

    ``rounding`` is [seed, number of the step]. Integers wrap around.
    """
    mask = 0xFFFFFFFF
    x = rounding[0] + rounding[1] * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    key = (x ^ _shifted(x, 31)) + (positions >> 32) * 0x9E3779B9
    x = (positions ^ key) & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    return x ^ (x >> 16)


def stochastically_rounded(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """float32 numbers rounded to a 16-bit dtype: up with the probability of the part that is cut off.

    |x| in units in the last place, plus a random fraction below one, rounded down. Where float16 has no number above
    (65504 and more), and for inf and NaN: rounded to nearest.
    """
    info = torch.finfo(dtype)
    digits, lowest = round(-math.log2(info.eps)), round(math.log2(info.smallest_normal))
    cut = 23 - digits  # bits of a float32 beyond those of the dtype
    magnitude = x.double().abs()
    unit = torch.exp2((torch.frexp(magnitude).exponent - 1).clamp_min(lowest) - digits)
    fraction = (random & ((1 << cut) - 1)).double() * 2.0**-cut
    rounded = ((magnitude / unit).float() + fraction.float()).floor() * unit
    by_chance = x.isfinite()
    if dtype == torch.float16:
        by_chance = by_chance & (magnitude < info.max)
    return torch.where(by_chance, rounded.copysign(x), x.double()).to(dtype)


def _rounded(x: Tensor, w: Tensor, offset: int, masters: bool, rounding: Tensor | None) -> Tensor:
    """New weights in the dtype of ``w``; stochastically where there is no master to keep the rest."""
    if rounding is None or masters or w.dtype.itemsize != 2:
        return x.to(w.dtype)
    positions = torch.arange(offset, offset + w.numel(), device=w.device).as_strided(w.shape, w.stride())
    return stochastically_rounded(x, w.dtype, random_bits(positions, rounding))


def _write(w: Tensor, saved: Tensor | None, x: Tensor, applies: Tensor, offset: int, rounding: Tensor | None) -> None:
    """w = the new weights where the update ``applies``, else those that were saved; masters get theirs too."""
    masters = saved is not None and saved.dtype != w.dtype
    start = w if saved is None else saved.to(w.dtype)
    w.copy_(torch.where(applies, _rounded(x, w, offset, masters, rounding), start))
    if masters:
        saved.copy_(torch.where(applies, x, saved))


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
) -> None:
    """w = SGD(backup, g), torch.optim.SGD."""
    scale, rate = _number(grad_scale, 1.0), _number(lr_tensor, lr)
    states = (offsets.tolist(), _slices(params, offsets, backup), _slices(params, offsets, momentum_buffer))
    for w, grad, offset, saved, buffer in zip(params, grads, *states, strict=True):
        applies = _applies(stats, found_inf, w.device)
        value = _compute(w if saved is None else saved)
        g = _unscaled(grad, scale)
        g = -g if maximize else g
        g = g + weight_decay * value
        if buffer is not None:
            updated = torch.where(buffer.isnan(), g, momentum * buffer + (1 - dampening) * g)
            buffer.copy_(torch.where(applies, updated, buffer))
            g = g + momentum * updated if nesterov else updated
        _write(w, saved, value - rate * g, applies, offset, rounding)


@torch.no_grad()
def count_steps(steps, index, corrections, stats, found_inf, lr, lr_tensor, beta1, beta2) -> None:
    """t += 1; lr / (1 - beta1^t) and sqrt(1 - beta2^t), torch.optim.Adam."""
    counts = steps[index] + _applies(stats, found_inf, steps.device).to(steps.dtype)
    steps[index] = counts
    t = counts[: len(corrections)].double()
    corrections[:, 0] = _number(lr_tensor, lr) / (1 - beta1**t)
    corrections[:, 1] = (1 - beta2**t).sqrt()


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
) -> None:
    """w = Adam(backup, g), torch.optim.Adam and AdamW."""
    scale, rate = _number(grad_scale, 1.0), _number(lr_tensor, lr)
    states = [offsets.tolist(), *(_slices(params, offsets, flat) for flat in (backup, exp_avg, exp_avg_sq))]
    for w, grad, offset, saved, first, second, (step_size, root) in zip(
        params, grads, *states, corrections, strict=True
    ):
        applies = _applies(stats, found_inf, w.device)
        value = _compute(w if saved is None else saved)
        g = _unscaled(grad, scale)
        g = -g if maximize else g
        if decoupled:
            value = value * (1 - rate * weight_decay)
        else:
            g = g + weight_decay * value
        mean = first + (1 - beta1) * (g - first)
        mean_sq = beta2 * second + (1 - beta2) * g * g
        denominator = mean_sq.sqrt() / root + eps
        _write(w, saved, value - step_size * mean / denominator, applies, offset, rounding)
        first.copy_(torch.where(applies, mean, first))
        second.copy_(torch.where(applies, mean_sq, second))
