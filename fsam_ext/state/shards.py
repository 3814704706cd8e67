"""Sharded parameters: a DTensor is a shard, or a copy, on each rank of a mesh; here is what this rank holds.

Nothing here talks to other ranks but :func:`placed_like`, :func:`local_grads` and :func:`placed_gradient`, where what
they are given lies otherwise than its parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Tells a parameter's name; called only for a message.
Describe = Callable[[Tensor], str]

PLAIN = (nn.Parameter, Tensor)


class Sharding(NamedTuple):
    """How a parameter lies on its mesh, as far as a sum over all its elements is concerned.

    Attributes:
        mesh: the device mesh.
        copies: number of ranks of the mesh that hold each element.
    """

    mesh: DeviceMesh
    copies: int


def address(tensor: Tensor) -> int:
    """Where a tensor lies; 0 for one without memory of its own: a fake one, some subclasses."""
    if isinstance(tensor, FakeTensor):
        return 0
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor. Does not import them: nobody has one who has not, and it takes half a second."""
    if type(tensor) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory; a plain tensor itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def sharding(param: Tensor) -> Sharding | None:
    """How a DTensor lies on its mesh; None for a plain tensor."""
    if not is_dtensor(param):
        return None
    mesh = param.device_mesh
    copies = 1
    for dim, placement in enumerate(param.placements):
        if placement.is_replicate():
            copies *= mesh.size(dim)
    return Sharding(mesh, copies)


def like(param: Tensor, part: Tensor) -> Tensor:
    """What a rank holds of some state of ``param``, as a tensor of the whole: shares memory, does not communicate."""
    if not is_dtensor(param):
        return part
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    # Not DTensor.from_local: it would move the shards that FSDP offloads to the CPU to the device of the mesh.
    meta = TensorMeta(param.shape, param.stride(), part.dtype)
    return DTensor(part, DTensorSpec(param.device_mesh, param.placements, tensor_meta=meta), requires_grad=False)


def placed_like(param: Tensor, value: Tensor) -> Tensor:
    """A copy of ``value``, of the parameter's global shape, that lies where the parameter does.

    Communicates where ``value`` is a DTensor that lies otherwise; every rank has to take part then.
    """
    if is_dtensor(value) and not (is_dtensor(param) and value.device_mesh == param.device_mesh):
        value = value.full_tensor()
    if not is_dtensor(param):
        return value.detach().to(device=param.device, copy=True)
    if is_dtensor(value):
        part = value.redistribute(placements=param.placements)._local_tensor
    else:
        from torch.distributed.tensor import distribute_tensor

        # src_data_rank=None: every rank has the whole and takes its part.
        part = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)._local_tensor
    return like(param, part.detach().to(device=local(param).device, copy=True))


def local_grads(params: Sequence[Tensor], grads: Iterable[Tensor]) -> list[Tensor] | None:
    """What this rank holds of gradients, or None where one cannot be used and :func:`check_gradient` says why.

    A gradient that lies otherwise than its parameter, such as one of which every rank has an addend, is brought there,
    as torch's own optimizers do: that is communication of the gradient's size, which belongs to the backward pass, and
    every rank of the mesh has to have such a gradient.
    """
    parts = []
    for param, grad in zip(params, grads):
        if not is_dtensor(grad) or grad.device_mesh != param.device_mesh:
            return None
        if grad.placements != param.placements:
            grad = grad.redistribute(placements=param.placements)
        parts.append(grad._local_tensor)
    return parts


def placed_gradient(param: Tensor) -> Tensor:
    """The gradient of a parameter, which is moved for good where it lies otherwise."""
    grad = param.grad
    assert grad is not None
    if is_dtensor(grad) and grad.placements != param.placements:
        param.grad = grad = grad.redistribute(placements=param.placements)
    return grad


def check_parameter(param: Tensor, describe: Describe) -> None:
    """Raises ValueError or TypeError for a sharded parameter that cannot be used."""
    if getattr(param, "_fsdp_flattened", False):
        raise TypeError(
            f"{describe(param)} belongs to FullyShardedDataParallel, which hides where the elements lie; shard the "
            "model with torch.distributed.fsdp.fully_shard instead"
        )
    if not is_dtensor(param):
        return
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"{describe(param)} has placements {param.placements}; redistribute it to Shard or Replicate first, "
            "because the values of a Partial tensor are not known to any rank"
        )
    if param.device_mesh.get_coordinate() is None:
        raise ValueError(
            f"{describe(param)} lies on {param.device_mesh}, which this rank is not part of; give each rank's "
            "optimizer the parameters that the rank holds"
        )


def check_not_replaced(param: Tensor, describe: Describe) -> None:
    """Raises RuntimeError for a parameter that ``fully_shard`` has replaced in its module after it came here."""
    if hasattr(param, "_fsdp_orig_uid"):
        raise RuntimeError(
            f"{describe(param)} was replaced in the model by fully_shard, so this optimizer would train nothing; make "
            "the optimizer after fully_shard, or put the model's present parameters into param_groups"
        )


def check_gradient(param: Tensor, grad: Tensor, describe: Describe) -> None:
    """Raises RuntimeError for a gradient that cannot be brought to where its parameter lies."""
    if is_dtensor(grad) != is_dtensor(param):
        kinds = [f"DTensor on {t.device_mesh}" if is_dtensor(t) else "plain tensor" for t in (grad, param)]
        raise RuntimeError(
            f"the gradient of {describe(param)} is a {kinds[0]} and the parameter a {kinds[1]}; clear the gradients "
            "after sharding a model"
        )
    if is_dtensor(grad) and grad.device_mesh != param.device_mesh:
        raise RuntimeError(
            f"the gradient of {describe(param)} lies on {grad.device_mesh} and the parameter on {param.device_mesh}; "
            "clear the gradients after sharding a model"
        )


def meshes_of(params: Iterable[Tensor]) -> dict[DeviceMesh, torch.device]:
    """The meshes that parameters lie on, in the order of the parameters, and the device of the shards."""
    meshes: dict[DeviceMesh, torch.device] = {}
    for param in params:
        if is_dtensor(param):
            meshes.setdefault(param.device_mesh, param._local_tensor.device)
    return meshes
