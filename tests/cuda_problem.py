"""One set of tensors for all ops, for tests that compare the bits of two runs."""

from __future__ import annotations

import itertools

import pytest
import torch

from fsam_ext import ops

DTYPES = [
    pytest.param(dtype, id=str(dtype).removeprefix("torch."))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
]
# A warp's row and a block's, ends inside groups, pieces and chunks, more than one chunk.
SIZES = [1, 7, 8, 33, 512, 2047, 2048, 2049, 4096, 4097, 3 * 4096, 20001, 0]
KINDS = list(itertools.product(["none", "previous", "updated"], [False, True]))


class Problem:
    """Tensors for every op, of the given sizes; with ``shift``, parameters and gradients start off 16-byte bounds."""

    def __init__(self, dtype, sizes, shift=0, seed=0, device="cpu"):
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
            starts.append(starts[-1] + -(-size // 64) * 64)
        self.offsets = torch.tensor(starts[:-1], dtype=torch.int64)
        total = starts[-1] + shift
        self.ema = values(total, state)[shift:]
        self.ema[::5] = torch.nan  # no gradient seen yet
        self.backup = values(total)[shift:]
        self.first, self.second = values(total, state)[shift:], values(total, state)[shift:].square()
        self.partials = torch.full([5 * ops.count_chunks(sizes)], torch.nan, dtype=state, device=device)
        self.stats = torch.full([5], torch.nan, dtype=torch.float64, device=device)
        self.steps = torch.arange(float(len(sizes)), device=device)
        self.index = torch.arange(len(sizes), device=device)
        self.corrections = torch.full([len(sizes), 2], torch.nan, dtype=state, device=device)

    def tensors(self):
        flat = [self.ema, self.backup, self.first, self.second]
        return [*self.params, *self.grads, *flat, self.stats, self.steps, self.corrections]

    def noise_norm(self, backend, kind="previous", adaptive=False):
        ema = None if kind == "none" else self.ema
        backend.noise_norm(
            self.params, self.grads, self.offsets, ema, None, self.grad_scale, 0.9, 0.6, adaptive,
            kind == "updated", self.partials, self.stats,
        )  # fmt: skip
        return self.stats

    def perturb(self, backend, kind="previous", adaptive=False):
        ema = None if kind == "none" else self.ema
        backend.perturb(
            self.params, self.grads, self.offsets, ema, None, self.backup, self.stats, self.grad_scale,
            0.0, self.rho, 0.9, 0.6, 1e-12, adaptive, kind == "updated", True, 0, None,
        )  # fmt: skip

    def restore(self, backend):
        backend.restore(self.params, self.offsets, self.backup)

    def sgd(self, backend, momentum=0.9, nesterov=False, maximize=False, with_backup=True):
        backend.restore_sgd(
            self.params, self.grads, self.offsets, self.backup if with_backup else None,
            self.first if momentum else None, self.stats, self.grad_scale, self.found_inf,
            0.0, self.lr, momentum, 0.1, 0.01, nesterov, maximize, None,
        )  # fmt: skip

    def count_steps(self, backend):
        backend.count_steps(
            self.steps, self.index, self.corrections, self.stats, self.found_inf, 0.0, self.lr, 0.9, 0.999
        )

    def adam(self, backend, decoupled=True, maximize=False, with_backup=True):
        self.count_steps(backend)
        backend.restore_adam(
            self.params, self.grads, self.offsets, self.backup if with_backup else None, self.first,
            self.second, self.corrections, self.stats, self.grad_scale, self.found_inf, 0.0,
            self.lr, 0.9, 0.999, 1e-8, 0.01, decoupled, maximize, None,
        )  # fmt: skip


def bits(tensor):
    return tensor.reshape(-1).clone().view(torch.uint8)


def same_bits(a: Problem, b: Problem):
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a.tensors(), b.tensors(), strict=True))
