"""The ops as `torch.ops.fsam_ext_triton.*`: their schemas, and the dispatch keys that they serve."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import ops
from . import passes
from .checks import refuse_sparse
from .launch import INTERPRETED

NAMESPACE = "fsam_ext_triton"

# csrc/schema.cpp, word for word (a test compares them): this backend has to work where no C++ was built.
SCHEMAS = {
    "noise_norm": "(Tensor[] params, Tensor[] grads, Tensor offsets, Tensor? ema, Tensor? ema_scale, Tensor? "
    "grad_scale, float sigma, float lmbda, bool adaptive, bool ema_updated, Tensor(a!) partials, "
    "Tensor(b!) stats) -> ()",
    "perturb": "(Tensor(a!)[] params, Tensor[] grads, Tensor offsets, Tensor(b!)? ema, Tensor(c!)? ema_scale, "
    "Tensor(d!) backup, Tensor stats, Tensor? grad_scale, float rho, Tensor? rho_tensor, float "
    "sigma, float lmbda, float eps, bool adaptive, bool ema_updated, bool feeds, int forward, "
    "Tensor(e!)? effect, Tensor(f!)? journal=None, Tensor(g!)? kept=None) -> ()",
    "update_ema": "(Tensor[] params, Tensor[] grads, Tensor offsets, Tensor(a!) ema, Tensor(b!)? ema_scale, "
    "Tensor? stats, Tensor? grad_scale, Tensor? found_inf, float lmbda, "
    "Tensor(c!)? journal=None, Tensor(d!)? partials=None, Tensor(e!)? grad_sq=None) -> ()",
    "dots": "(Tensor[] params, Tensor[] grads, Tensor offsets, Tensor kept, Tensor? grad_scale, "
    "Tensor(a!) partials, Tensor(b!) sums) -> ()",
    "project": "(Tensor[] params, Tensor[] grads, Tensor offsets, Tensor(a!) kept, Tensor sums, Tensor? stats, "
    "Tensor? grad_scale, Tensor? found_inf, Tensor(b!) partials, Tensor(c!) kept_sq, "
    "Tensor(d!)? journal=None) -> ()",
    "restore": "(Tensor(a!)[] params, Tensor offsets, Tensor backup) -> ()",
    "restore_sgd": "(Tensor(a!)[] params, Tensor[] grads, Tensor offsets, Tensor(b!)? backup, Tensor(c!)? "
    "momentum_buffer, Tensor? stats, Tensor? grad_scale, Tensor? found_inf, float lr, Tensor? "
    "lr_tensor, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, "
    "Tensor? rounding, bool adopts=False, Tensor(d!)? journal=None, Tensor? reused=None, "
    "Tensor? reuse_sq=None, float reuse=0.0, float reuse_eps=0.0) -> ()",
    "count_steps": "(Tensor(a!) steps, Tensor index, Tensor(b!) corrections, Tensor? stats, Tensor? found_inf, "
    "float lr, Tensor? lr_tensor, float beta1, float beta2, Tensor(c!)? journal=None) -> ()",
    "restore_adam": "(Tensor(a!)[] params, Tensor[] grads, Tensor offsets, Tensor(b!)? backup, Tensor(c!) exp_avg, "
    "Tensor(d!) exp_avg_sq, Tensor corrections, Tensor? stats, Tensor? grad_scale, Tensor? found_inf, "
    "float lr, Tensor? lr_tensor, float beta1, float beta2, float eps, float weight_decay, bool "
    "decoupled, bool maximize, Tensor? rounding, bool adopts=False, Tensor(e!)? journal=None, "
    "Tensor? reused=None, Tensor? reuse_sq=None, float reuse=0.0, float reuse_eps=0.0) -> ()",
}


# The dispatcher brings a call with a sparse tensor here, to be refused with a sentence; dense ones are not asked.
def _without_sparse(op: Callable) -> Callable:
    @functools.wraps(op)
    def run(*args: Any) -> None:
        for name, tensors in zip(("params", "grads"), args):
            if isinstance(tensors, list):
                refuse_sparse(tensors, name)
        op(*args)

    return run


# `Library.define` and `impl`, not `custom_op`: docs/triton.md has what each costs the host. ROCm has the keys of CUDA.
_KEYS = ("CPU",) if INTERPRETED else ("CUDA", "XPU")
_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in _KEYS:
        _op = getattr(passes, _name)
        _library.impl(_name, _op, _key)
        _library.impl(_name, _without_sparse(_op), f"Sparse{_key}")
ops.register_fakes(NAMESPACE)
