"""The nine ops that every backend implements: typed wrappers, their documentation, and their fake kernels.

``backend`` is what :func:`fsam_ext.backends.resolve` returns. ``params`` and ``grads`` are lists of tensors, one a row:
of one dtype (float64, float32, bfloat16, float16), on one device, dense in memory, gradients shaped like their
parameters. Optimizer state comes as flat buffers in which row ``i`` owns the elements ``offsets[i]`` to
``offsets[i] + params[i].numel()``, in the order in which the parameter's elements lie in memory. ``offsets`` is an
int64 tensor on the CPU. The state's dtype is float32, and float64 for float64 parameters.

``ema`` may also be bfloat16, or int8 with ``ema_scale``: float32, one for each 128 elements of the flat buffer; offsets
are multiples of 128 then (float64 parameters: neither). ``backup`` has the dtype of 16-bit parameters and is a copy
of them, or it is float32 and holds their master weights, of which the parameters are the rounded copies. A parameter
that is not the rounded copy of its master (NaN is that of NaN) was written by others since, and is adopted where it is
known not to be perturbed: its value becomes the master.

``kept`` and ``reused`` are one flat buffer, in the dtype of the state or in bfloat16 (float64 parameters: only the
former): csrc/formulas.h, NOTE [reuse of the second gradient].

``stats`` is a float64 tensor of five elements, ``partials`` scratch in the dtype of the state with five elements for
each chunk (:func:`count_chunks`). Small tensors live on the device of the parameters.

``journal`` (int64, on the CPU) gets one more once an op has written, within its own call, so that what an interrupt has
cut off is known: transaction.py.

Both lists may be empty where C++ holds the rows' parameters under ``offsets``: csrc/held.h, NOTE [held parameters].

All ops raise RuntimeError, before they write anything, for arguments that do not fit this description.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library

# The unit of the norm's partial sums; csrc/tensor_table.h has the same number and the reason for it.
CHUNK = 4096
STATISTICS = 5
# The unit of an int8 average's scales, and what pass B counts of a perturbation's effect in each chunk.
QUANTIZED = 128
EFFECT = 3
NAMES = (
    *("noise_norm", "perturb", "update_ema", "dots", "project"),
    *("restore", "restore_sgd", "count_steps", "restore_adam"),
)
# What the ops are told of the dtype that the forward pass sees weights in.
FORWARD = {None: 0, torch.bfloat16: 1, torch.float16: 2}


def count_chunks(numels: Iterable[int]) -> int:
    """Number of chunks that rows of these numbers of elements are cut into."""
    return sum(-(-numel // CHUNK) for numel in numels)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic and state for parameters of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def noise_norm(
    backend: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Tensor,
    ema: Tensor | None,
    ema_scale: Tensor | None,
    grad_scale: Tensor | None,
    sigma: float,
    lmbda: float,
    adaptive: bool,
    ema_updated: bool,
    partials: Tensor,
    stats: Tensor,
) -> None:
    """Pass A: writes ``stats`` = [sum |d|^2, sum |g|^2, sum g m, sum |m|^2, number of non-finite g] over all rows.

    d = g - sigma m (``ema_updated``: with the m that pass B will write), adaptive: |w| d. ``ema=None`` means d = g.
    Gradients are divided by ``grad_scale`` as they are read. The sums have the same bits for any number of threads.
    """
    backend.noise_norm(
        params,
        grads,
        offsets,
        ema,
        ema_scale,
        grad_scale,
        sigma,
        lmbda,
        adaptive,
        ema_updated,
        partials,
        stats,
    )


def perturb(
    backend: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Tensor,
    ema: Tensor | None,
    ema_scale: Tensor | None,
    backup: Tensor,
    stats: Tensor,
    grad_scale: Tensor | None,
    rho: float,
    rho_tensor: Tensor | None,
    sigma: float,
    lmbda: float,
    eps: float,
    adaptive: bool,
    ema_updated: bool,
    feeds: bool,
    forward: int,
    effect: Tensor | None,
    journal: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    """Pass B: backup = w; m = lmbda m + (1 - lmbda) g where ``feeds``; w = w + rho d / (sqrt(stats[0]) + eps).

    Adaptive: w = w + rho |w|^2 d / (...). Where ``stats[0]`` is not finite only the backup is written. Where it is zero
    the step length is zero. An element of m that is NaN has seen no gradient yet: it counts as 0 in d and becomes g.
    ``rho_tensor`` replaces ``rho`` where it is given. With masters the backup is not written; parameters are adopted
    first, wherever ``stats[0]`` is, and the masters stand in the place of w.

    ``effect`` (in the dtype of the state, 3 elements for each chunk) gets sum e^2, sum e i and sum i^2 of the intended
    perturbation i and of the one that rounding leaves of it: e = R(w after) - R(w before), with R the rounding to the
    dtype of the parameters and then to ``forward`` (a value of ``FORWARD``). Zeros where nothing was perturbed.

    ``kept`` gets g, unscaled, where ``stats[0]`` is finite.
    """
    backend.perturb(
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
        journal,
        kept,
    )


def update_ema(
    backend: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Tensor,
    ema: Tensor,
    ema_scale: Tensor | None,
    stats: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lmbda: float,
    journal: Tensor | None = None,
    partials: Tensor | None = None,
    grad_sq: Tensor | None = None,
) -> None:
    """The average without an ascent: m = lmbda m + (1 - lmbda) g, and m = g where m is NaN.

    Elements whose gradient is not finite keep their value; all do where ``stats[0]`` is not finite or ``found_inf`` is
    not zero. ``grad_sq`` (float64, one element) gets sum |g|^2 over all rows in the same pass, whatever they hold;
    ``partials`` has room for a value of each chunk then.
    """
    backend.update_ema(
        params, grads, offsets, ema, ema_scale, stats, grad_scale, found_inf, lmbda, journal, partials, grad_sq
    )


def dots(
    backend: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Tensor,
    kept: Tensor,
    grad_scale: Tensor | None,
    partials: Tensor,
    sums: Tensor,
) -> None:
    """Writes ``sums`` (float64) = [sum g k, sum k^2] over all rows, with k what ``kept`` holds and g unscaled.

    ``partials`` has room for two values of each chunk.
    """
    backend.dots(params, grads, offsets, kept, grad_scale, partials, sums)


def project(
    backend: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Tensor,
    kept: Tensor,
    sums: Tensor,
    stats: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    partials: Tensor,
    kept_sq: Tensor,
    journal: Tensor | None = None,
) -> None:
    """k = g - (sums[0] / sums[1]) k, the quotient 0 where ``sums[1]`` is, and ``kept_sq`` = sum k^2 of what is stored.

    ``sums`` are those of :func:`dots`, over all segments and ranks. Where ``stats[0]`` is not finite k stays as it is
    and ``kept_sq`` (float64, one element) is NaN. Else, where ``found_inf`` is not zero or a sum is not finite, there
    is no k: it may hold anything, and ``kept_sq`` is 0. ``partials`` has room for a value of each chunk.
    """
    backend.project(params, grads, offsets, kept, sums, stats, grad_scale, found_inf, partials, kept_sq, journal)


def restore(backend: Any, params: Sequence[Tensor], offsets: Tensor, backup: Tensor) -> None:
    """Pass C without a base: w = backup, bit for bit; or w = the rounded masters."""
    backend.restore(params, offsets, backup)


def restore_sgd(
    backend: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Tensor,
    backup: Tensor | None,
    momentum_buffer: Tensor | None,
    stats: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr: float,
    lr_tensor: Tensor | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    rounding: Tensor | None,
    adopts: bool = False,
    journal: Tensor | None = None,
    reused: Tensor | None = None,
    reuse_sq: Tensor | None = None,
    reuse: float = 0.0,
    reuse_eps: float = 0.0,
) -> None:
    """Pass C with ``torch.optim.SGD``: w = sgd(backup, g), or sgd(w, g) where there is no backup.

    Only restores where ``stats[0]`` is not finite or ``found_inf`` is not zero. An element of the momentum buffer that
    is NaN has seen no gradient yet and becomes g. ``lr_tensor`` replaces ``lr`` where it is given. With masters the
    update starts from them, and both they and w are written. ``adopts``: w is not perturbed, and masters adopt it
    first; where only the restore is left, w stays as it is. ``rounding`` (int64, [seed, number of the step]) has 16-bit
    parameters without masters rounded stochastically: csrc/storage.h, NOTE [stochastic rounding].

    With ``reused``, v, the update is of g + reuse (|g| / (|v| + reuse_eps)) v, with |g|^2 and |v|^2 in ``reuse_sq``
    (float64, two elements); of g alone where one of them is not finite or |v| is zero.
    """
    backend.restore_sgd(
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
        adopts,
        journal,
        reused,
        reuse_sq,
        reuse,
        reuse_eps,
    )


def count_steps(
    backend: Any,
    steps: Tensor,
    index: Tensor,
    corrections: Tensor,
    stats: Tensor | None,
    found_inf: Tensor | None,
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    journal: Tensor | None = None,
) -> None:
    """Before pass C with Adam: ``steps[index] += 1``, and the bias corrections of each row at its new count t.

    corrections[i] = [lr / (1 - beta1^t), sqrt(1 - beta2^t)], from powers in float64, for t = steps[index[i]].

    ``steps`` is float32; ``index`` int64, without repetition: the positions in ``steps`` of all parameters of the call,
    first of those that start a row, in the order of the rows. On the CPU a position outside ``steps`` is refused; on a
    GPU it is not looked at. ``corrections`` ([rows, 2]) is float32, or float64 for float64 parameters. Nothing is
    counted where ``stats[0]`` is not finite or ``found_inf`` is not zero. ``lr_tensor`` replaces ``lr``.
    """
    backend.count_steps(steps, index, corrections, stats, found_inf, lr, lr_tensor, beta1, beta2, journal)


def restore_adam(
    backend: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Tensor,
    backup: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    corrections: Tensor,
    stats: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    rounding: Tensor | None,
    adopts: bool = False,
    journal: Tensor | None = None,
    reused: Tensor | None = None,
    reuse_sq: Tensor | None = None,
    reuse: float = 0.0,
    reuse_eps: float = 0.0,
) -> None:
    """Pass C with ``torch.optim.Adam``, or ``AdamW`` where ``decoupled``; otherwise like :func:`restore_sgd`.

    ``corrections`` (in the dtype of the state, [rows, 2]) holds what :func:`count_steps` writes for each row.
    """
    backend.restore_adam(
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
        adopts,
        journal,
        reused,
        reuse_sq,
        reuse,
        reuse_eps,
    )


# A fake kernel tells torch.compile what an op returns without running it: all of ours only mutate.
def register_fakes(namespace: str) -> None:
    """Registers the fake kernels of the ops in ``namespace``."""
    for name in NAMES:
        torch.library.register_fake(f"{namespace}::{name}", lambda *args, **kwargs: None)


if _library.CPU_REASON is None:
    register_fakes("fsam_ext")
    torch.library.register_fake("fsam_ext::advise_huge_pages", lambda buffer: None)
