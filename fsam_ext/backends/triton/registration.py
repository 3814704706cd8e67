"""The ops as `torch.ops.fsam_ext_triton.*`: their schemas, and the dispatch keys that they serve."""

from __future__ import annotations

import torch

from ... import ops
from . import passes
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
    "Tensor(e!)? effect) -> ()",
    "update_ema": "(Tensor[] params, Tensor[] grads, Tensor offsets, Tensor(a!) ema, Tensor(b!)? ema_scale, "
    "Tensor? stats, Tensor? grad_scale, Tensor? found_inf, float lmbda) -> ()",
    "restore": "(Tensor(a!)[] params, Tensor offsets, Tensor backup) -> ()",
    "restore_sgd": "(Tensor(a!)[] params, Tensor[] grads, Tensor offsets, Tensor(b!)? backup, Tensor(c!)? "
    "momentum_buffer, Tensor? stats, Tensor? grad_scale, Tensor? found_inf, float lr, Tensor? "
    "lr_tensor, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, "
    "Tensor? rounding) -> ()",
    "count_steps": "(Tensor(a!) steps, Tensor index, Tensor(b!) corrections, Tensor? stats, Tensor? found_inf, "
    "float lr, Tensor? lr_tensor, float beta1, float beta2) -> ()",
    "restore_adam": "(Tensor(a!)[] params, Tensor[] grads, Tensor offsets, Tensor(b!)? backup, Tensor(c!) exp_avg, "
    "Tensor(d!) exp_avg_sq, Tensor corrections, Tensor? stats, Tensor? grad_scale, Tensor? found_inf, "
    "float lr, Tensor? lr_tensor, float beta1, float beta2, float eps, float weight_decay, bool "
    "decoupled, bool maximize, Tensor? rounding) -> ()",
}

# `Library.define` and `impl`, not `custom_op`: docs/triton.md has what each costs the host. Sparse tensors come in too,
# to be refused with a sentence; ROCm's tensors have the keys of CUDA's.
_KEYS = ("CPU", "SparseCPU") if INTERPRETED else ("CUDA", "SparseCUDA", "XPU", "SparseXPU")
_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in _KEYS:
        _library.impl(_name, getattr(passes, _name), _key)
ops.register_fakes(NAMESPACE)
