"""One set of tensors for all ops, for tests that compare the bits of two runs."""

from __future__ import annotations

import itertools

import pytest
import torch

from fsam_ext.backends import ops

DTYPES = [
    pytest.param(dtype, id=str(dtype).removeprefix("torch."))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
]
# A warp's row and a block's, ends inside groups, pieces and chunks, more than one chunk.
SIZES = [1, 7, 8, 33, 512, 2047, 2048, 2049, 4096, 4097, 3 * 4096, 20001, 0]
# How averages are stored beside the type of the arithmetic.
PLAIN = [pytest.param(*dtype.values, None, id=dtype.id) for dtype in DTYPES]
STORED = [
    pytest.param(dtype, stored, id="-".join(str(part).removeprefix("torch.") for part in (dtype, stored)))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for stored in (torch.bfloat16, torch.int8)
]
# How what is kept of gradients is stored.
KEPT = [*PLAIN, *(pytest.param(*param.values, id=param.id) for param in STORED if param.values[1] == torch.bfloat16)]
KINDS = list(itertools.product(["none", "previous", "updated"], [False, True]))


class Problem:
    """Tensors for every op, of the given sizes; with ``shift``, parameters, gradients and state are misaligned.

    ``stored``: the dtype of a compressed average, bfloat16 or int8; ``kept``: that of what is kept, bfloat16.
    """

    def __init__(self, dtype, sizes, shift=0, seed=0, device="cpu", stored=None, kept=None):
        generator = torch.Generator().manual_seed(seed)
        state = ops.compute_dtype(dtype)

        def values(count, to=dtype):
            return torch.randn(count, generator=generator, dtype=torch.float64).to(to).to(device)

        self.rho = torch.tensor(0.05, dtype=torch.float64, device=device)
        self.lr = torch.tensor(0.1, device=device)
        self.grad_scale = torch.tensor(2.0, device=device)
        self.found_inf = torch.tensor(0.0, device=device)
        self.params = [values(size + shift)[shift:] for size in sizes]
        self.grads = [values(size + 2 * shift)[2 * shift :] for size in sizes]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // ops.QUANTIZED) * ops.QUANTIZED)
        self.offsets = torch.tensor(starts[:-1], dtype=torch.int64)
        total = starts[-1] + shift
        self.ema, self.ema_scale = values(total, stored or state)[shift:], None
        if stored == torch.int8:
            self.ema.copy_((values(total, state)[shift:] * 40).clamp(-127, 127))
            self.ema_scale = values(total // ops.QUANTIZED + 1, torch.float32).abs() * 0.01
            self.ema_scale[::5] = torch.nan  # no gradient seen yet
        else:
            self.ema[::5] = torch.nan
        self.backup = values(total)[shift:]
        self.first, self.second = values(total, state)[shift:], values(total, state)[shift:].square()
        self.partials = torch.full([5 * ops.count_chunks(sizes)], torch.nan, dtype=state, device=device)
        self.stats = torch.full([5], torch.nan, dtype=torch.float64, device=device)
        self.steps = torch.arange(float(len(sizes)), device=device)
        self.index = torch.arange(len(sizes), device=device)
        self.kept = values(total, kept or state)[shift:]
        self.sums, self.squares, self.one_sum = (
            torch.tensor(numbers, dtype=torch.float64, device=device) for numbers in ([-0.7, 1.3], [2.0, 3.0], [0.0])
        )
        self.corrections = torch.full([len(sizes), 2], torch.nan, dtype=state, device=device)

    def tensors(self):
        scales = [] if self.ema_scale is None else [self.ema_scale]
        flat = [self.ema, *scales, self.backup, self.first, self.second]
        small = [self.stats, self.steps, self.corrections, self.sums, self.one_sum]
        return [*self.params, *self.grads, *flat, self.kept, *small]

    def noise_norm(self, backend, kind="previous", adaptive=False):
        ema = None if kind == "none" else self.ema
        backend.noise_norm(
            self.params, self.grads, self.offsets, ema, self.ema_scale, self.grad_scale, 0.9, 0.6, adaptive,
            kind == "updated", self.partials, self.stats,
        )  # fmt: skip
        return self.stats

    def perturb(self, backend, kind="previous", adaptive=False, kept=None):
        ema = None if kind == "none" else self.ema
        backend.perturb(
            self.params, self.grads, self.offsets, ema, self.ema_scale, self.backup, self.stats, self.grad_scale,
            0.0, self.rho, 0.9, 0.6, 1e-12, adaptive, kind == "updated", True, 0, None, None, kept,
        )  # fmt: skip

    def perturb_keeping(self, backend):
        self.perturb(backend, kept=self.kept)

    def update_ema(self, backend, *sums):
        backend.update_ema(
            self.params, self.grads, self.offsets, self.ema, self.ema_scale, self.stats, self.grad_scale,
            self.found_inf, 0.6, None, *sums,
        )  # fmt: skip

    def update_ema_measuring(self, backend):
        self.update_ema(backend, self.partials, self.one_sum)

    def dots(self, backend):
        backend.dots(
            self.params, self.grads, self.offsets, self.kept, self.grad_scale, self.partials, self.sums
        )  # fmt: skip

    def project(self, backend):
        backend.project(
            self.params, self.grads, self.offsets, self.kept, self.sums, self.stats, self.grad_scale, self.found_inf,
            self.partials, self.one_sum,
        )  # fmt: skip

    @property
    def reused(self):
        """The last arguments of an update that reuses what is kept."""
        return (False, None, self.kept, self.squares, 0.3, 1e-12)

    def reusing_sgd(self, backend, momentum=0.9):
        self.sgd(backend, momentum, with_backup=False, more=self.reused)

    def reusing_adam(self, backend):
        self.adam(backend, with_backup=False, more=self.reused)

    def restore(self, backend):
        backend.restore(self.params, self.offsets, self.backup)

    def sgd(self, backend, momentum=0.9, nesterov=False, maximize=False, with_backup=True, more=()):
        backend.restore_sgd(
            self.params, self.grads, self.offsets, self.backup if with_backup else None,
            self.first if momentum else None, self.stats, self.grad_scale, self.found_inf,
            0.0, self.lr, momentum, 0.1, 0.01, nesterov, maximize, None,
            *more,
        )  # fmt: skip

    def count_steps(self, backend):
        backend.count_steps(
            self.steps, self.index, self.corrections, self.stats, self.found_inf, 0.0, self.lr, 0.9, 0.999
        )

    def adam(self, backend, decoupled=True, maximize=False, with_backup=True, more=()):
        self.count_steps(backend)
        backend.restore_adam(
            self.params, self.grads, self.offsets, self.backup if with_backup else None, self.first,
            self.second, self.corrections, self.stats, self.grad_scale, self.found_inf, 0.0,
            self.lr, 0.9, 0.999, 1e-8, 0.01, decoupled, maximize, None, *more,
        )  # fmt: skip

    def adam_of_hard_cases(self, backend):
        """The update of weights of 0 from moments of every size, which is what the division has to bring through."""
        state, count = self.first.dtype, self.first.numel()
        generator = torch.Generator().manual_seed(7)

        def sizes(low, high):
            exponents = torch.randint(low, high, (count,), generator=generator).double()
            return (torch.rand(count, generator=generator, dtype=torch.float64) + 1) * 2**exponents

        kind = torch.randint(0, 40, (count // 32 + 1,), generator=generator).repeat_interleave(32)[:count]
        rare = torch.rand(count, generator=generator) < 0.1
        first, second = sizes(-30, 3), sizes(-60, 3)
        for i, (hard_first, hard_second) in enumerate(
            [(0.0, 0.0), (-0.0, 0.0), (sizes(-149, 40), sizes(-149, 120)), (torch.inf, 1.0), (1.0, torch.inf),
             (torch.nan, 1.0), (1.0, torch.nan), (1.0, 0.0), (0.0, 1e-44), (-1e-44, 1.0), (1e-3, -1.0)]
        ):  # fmt: skip
            # Whole groups of a kind, and one element in ten of ordinary groups.
            chosen = (kind == 2 * i) | ((kind == 2 * i + 1) & rare)
            first = torch.where(chosen, hard_first, first)
            second = torch.where(chosen, hard_second, second)
        self.first.copy_((first * torch.where(rare, -1, 1)).to(state))
        self.second.copy_(second.to(state))
        self.corrections.copy_(torch.tensor([1.0, 0.7]))
        for param, grad in zip(self.params, self.grads, strict=True):
            param.zero_(), grad.zero_()
        # Both moments are kept as they are: beta1 = beta2 = 1.
        backend.restore_adam(
            self.params, self.grads, self.offsets, None, self.first, self.second, self.corrections, None, None, None,
            1.0, None, 1.0, 1.0, 1e-8, 0.0, True, False, None,
        )  # fmt: skip


def same_values_on_and_off_bounds(dtype, stored, device="cpu"):
    """Two problems of the same values, one of them misaligned."""
    aligned = Problem(dtype, SIZES, device=device, stored=stored)
    shifted = Problem(dtype, SIZES, shift=1, device=device, stored=stored)
    for name in ("params", "grads"):
        for to, source in zip(getattr(shifted, name), getattr(aligned, name), strict=True):
            to.copy_(source)
    shifted.ema.copy_(aligned.ema)
    if stored == torch.int8:
        shifted.ema_scale.copy_(aligned.ema_scale)
    assert shifted.params[5].data_ptr() % 16 and not aligned.params[5].data_ptr() % 16
    assert shifted.ema.data_ptr() % 16 and not aligned.ema.data_ptr() % 16
    return aligned, shifted


def bits(tensor):
    return tensor.reshape(-1).clone().view(torch.uint8)


def same_bits(a: Problem, b: Problem):
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a.tensors(), b.tensors(), strict=True))
