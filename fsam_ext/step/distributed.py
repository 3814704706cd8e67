"""What the ranks of a sharded training do together: the norm over all of them, FSDP's gathered copies, clipping."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..backends.ops import compute_dtype
from ..state.shards import Sharding, check_gradient, local, meshes_of, placed_gradient, sharding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# ---- The norm over all ranks -----------------------------------------------------------------------------------------

# NOTE [who takes part in the norm]
# Every rank takes part in one reduction for each mesh that any parameter of the optimizer lies on, whether or not one
# has a gradient. Gradients may exist on one rank and not on another; a rank that inferred from them what to do would
# leave the others waiting.
# Each element counts once: what a rank has is divided by the number of ranks that hold the same elements (exactly,
# where that is a power of two) and summed over the mesh. What one reduction has found goes into the next as if every
# rank of that mesh held a copy, from the smallest mesh to the largest. So all ranks of the largest end with the same
# bits, also where copies were not quite equal, and an inf on one of them is an inf on all.
# Plain tensors are such copies: under DDP, and next to DTensors, each rank has the same. Without any DTensor nothing is
# reduced.

_groups: WeakKeyDictionary[DeviceMesh, ProcessGroup] = WeakKeyDictionary()


def group_of(mesh: DeviceMesh) -> ProcessGroup:
    """The process group of all ranks of a mesh. Every rank of the mesh has to ask for it at the same time."""
    import torch.distributed as dist

    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    group = _groups.get(mesh)
    if group is None:
        # Local synchronisation: ranks of other meshes, which may be elsewhere in their step, need not come.
        group = dist.new_group(mesh.mesh.flatten().tolist(), use_local_synchronization=True)
        _groups[mesh] = group
    return group


def _by_mesh(sums: Iterable[tuple[Sharding | None, Tensor]]) -> dict[DeviceMesh | None, list[Tensor]]:
    """Local sums by mesh (None: plain tensors), each element of them counted once over the ranks."""
    parts: dict[DeviceMesh | None, list[Tensor]] = {}
    for where, value in sums:
        mesh, copies = where or (None, 1)
        parts.setdefault(mesh, []).append(value if copies == 1 else value / copies)
    return parts


def _smallest_first(meshes: dict[DeviceMesh, torch.device]) -> list[tuple[DeviceMesh, torch.device]]:
    return sorted(meshes.items(), key=lambda item: item[0].size())


def total(meshes: dict[DeviceMesh, torch.device], sums: Iterable[tuple[Sharding | None, Tensor]], size: int) -> Tensor:
    """Sums over all ranks: see NOTE [who takes part in the norm].

    Args:
        meshes: all meshes that parameters lie on, at least one, as :func:`meshes_of` finds them.
        sums: this rank's sums over some parameters, of ``size`` float64 elements each; overwritten.
        size: number of sums that are taken at once.
    """
    import torch.distributed as dist

    parts = _by_mesh(sums)
    found = parts.get(None, [])
    for mesh, device in _smallest_first(meshes):
        mine = parts.get(mesh, []) + [value.to(device) / mesh.size() for value in found]
        mine = mine or [torch.zeros(size, dtype=torch.float64, device=device)]
        value = mine[0] if len(mine) == 1 else torch.stack(mine).sum(0)
        dist.all_reduce(value, group=group_of(mesh))
        found = [value]
    return found[0]


# ---- Copies that FSDP has gathered -----------------------------------------------------------------------------------

# NOTE [gathered copies]
# FSDP2 computes with gathered copies of its parameters. Where one outlives a change of the shards, as with
# set_reshard_after_backward(False) or after a forward without a backward, the next forward would not see the change.
# So every write of the weights gives such copies up; the next forward gathers anew, which no other way would spare.


def _fsdp_param_groups() -> Iterator[tuple[Any, Any]]:
    """(module, FSDP parameter group) of every module of this process that ``fully_shard`` was applied to."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not hasattr(fsdp, "FSDPModule"):
        return
    from torch.distributed._composable_state import _module_state_mapping

    for module in list(_module_state_mapping):
        if isinstance(module, fsdp.FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # a list in newer releases of torch
            for group in [state._fsdp_param_group] if groups is None else groups:
                if group is not None:
                    yield module, group


class GatheredCopies:
    """The FSDP modules that compute with copies of some sharded parameters."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        wanted = set(map(id, params))
        self._groups = [
            (module, group)
            for module, group in _fsdp_param_groups()
            if any(id(one.sharded_param) in wanted for one in group.fsdp_params)
        ]

    def give_up(self) -> None:
        """Frees the copies, so that the next forward gathers the present weights: see NOTE [gathered copies]."""
        for module, group in self._groups:
            if not group.is_sharded:
                module.reshard()


# ---- Clipping --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for parameters on any mixture of device meshes, plain tensors included.

    The gradients are scaled in place by min(1, max_norm / (norm + 1e-6)), with the norm over all elements of all ranks,
    each counted once. One small collective for each mesh. Every rank has to call it, with the same parameters,
    whether or not they have gradients there.

    Args:
        parameters: parameters, or one.
        max_norm: largest norm.
        norm_type: order of the norm, positive; ``inf`` is the largest magnitude.
        error_if_nonfinite: raise where the norm is not finite, which waits for the device.
        foreach: as for torch's function.

    Returns:
        The norm before clipping: a plain 0-d tensor, the same on every rank. Where parameters are sharded, in float32
        (float64 where a parameter is).

    Raises:
        ValueError: ``norm_type`` is not positive.
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set, or a gradient cannot be used.
    """
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    meshes = meshes_of(params)
    if not meshes:
        return nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite, foreach)
    order = float(norm_type)
    if not order > 0:
        raise ValueError(f"norm_type must be a positive number or inf for sharded parameters, not {norm_type!r}")
    parts = _grads_by_sharding(params)
    grads = [grad for members in parts.values() for grad in members]
    # Of the parameters, not of the gradients, which one rank may have and another not.
    double = any(param.dtype == torch.float64 for param in params)
    norm = _total_norm(parts, meshes, order).to(torch.float64 if double else torch.float32)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"the norm of order {order} of the gradients is {norm.item()}, so they cannot be clipped; skip the step, "
            "or set error_if_nonfinite=False"
        )
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(grad)
    for device, members in by_device.items():
        if foreach is False:
            for grad in members:
                grad.mul_(scale.to(device))
        else:
            torch._foreach_mul_(members, scale.to(device))
    return norm


def _grads_by_sharding(params: Iterable[Tensor]) -> dict[Sharding | None, list[Tensor]]:
    """What this rank holds of all gradients; one that lies otherwise than its parameter is moved for good."""
    parts: dict[Sharding | None, list[Tensor]] = {}
    for param in params:
        grad = param.grad
        if grad is None:
            continue
        check_gradient(param, grad, lambda p: f"a parameter of shape {tuple(p.shape)}")
        parts.setdefault(sharding(param), []).append(local(placed_gradient(param)))
    return parts


def _total_norm(
    parts: dict[Sharding | None, list[Tensor]], meshes: dict[DeviceMesh, torch.device], order: float
) -> Tensor:
    """The norm of gradients over all ranks, each element counted once, in float64."""
    norms: list[tuple[Sharding | None, Tensor]] = []
    for where, members in parts.items():
        by_device: dict[torch.device, list[Tensor]] = {}
        for grad in members:
            if grad.numel() > 0:  # nothing has no largest element
                norm = torch.linalg.vector_norm(grad, order, dtype=compute_dtype(grad.dtype))
                by_device.setdefault(grad.device, []).append(norm.double())
        norms.extend((where, torch.stack(values)) for values in by_device.values())
    if math.isinf(order):
        return _largest(meshes, norms)
    sums = [(where, values.pow(order).sum(0, keepdim=True)) for where, values in norms]
    return total(meshes, sums, 1)[0].pow(1 / order)


def _largest(meshes: dict[DeviceMesh, torch.device], norms: Iterable[tuple[Sharding | None, Tensor]]) -> Tensor:
    """The largest of numbers on all ranks. Gathered and not reduced: what a reduction makes of a NaN is not defined."""
    import torch.distributed as dist

    parts: dict[DeviceMesh | None, list[Tensor]] = {}
    for where, values in norms:
        parts.setdefault(where and where.mesh, []).append(values.max())
    found = parts.get(None, [])
    for mesh, device in _smallest_first(meshes):
        mine = parts.get(mesh, []) + [value.to(device) for value in found]
        mine = mine or [torch.zeros((), dtype=torch.float64, device=device)]
        largest = torch.stack(mine).max()
        everyone = [torch.empty_like(largest) for _ in range(mesh.size())]
        dist.all_gather(everyone, largest, group=group_of(mesh))
        found = [torch.stack(everyone).max()]
    return found[0]
