"""What F-SAM sends beyond the base optimizer: five numbers for each mesh and ascent, whatever the model."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from fsam_ext import FriendlySAM, clip_grad_norm_

from ..conformance import identical
from .ranks import run
from .test_fsdp import sharded, tensor_parallel_model
from .training import SGD, backward, batches, make, network, shard, vector


class Sent(TorchDispatchMode):
    """Counts the bytes of every collective's tensors."""

    def __init__(self):
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self.bytes.append(sum(t.nbytes for t in tensors))
        return func(*args, **(kwargs or {}))


def model_of(kind):
    """(a model, what takes this rank's part of a batch)."""
    if kind == "ddp":
        return DistributedDataParallel(network()), shard
    if kind == "fsdp":
        return sharded(), shard
    if kind == "hsdp":
        return sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))), shard
    model, mesh = tensor_parallel_model(shards=kind == "fsdp_x_tp")
    return model, lambda batch: shard(batch, mesh)


def collectives(kind, base):
    model, part = model_of(kind)
    optimizer = make(model, base)
    counts = []
    for step, batch in enumerate(batches(3)):
        passes = ["first_step", "restore" if step == 1 else "second_step"]
        for name in passes:
            backward(model, part(batch))
            if step == 2:  # on one rank, gradients there and not there
                for i, p in enumerate(model.parameters()):
                    if (i + dist.get_rank()) % 3 == 0:
                        p.grad = None
            with CommDebugMode() as mode, Sent() as sent:
                getattr(optimizer, name)()
            counts.append((step, name, {str(op): n for op, n in mode.get_comm_counts().items()}, sent.bytes))
            optimizer.zero_grad()
    return counts


@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("kind, meshes", [("ddp", 0), ("fsdp", 1), ("hsdp", 1), ("fsdp_x_tp", 2)])
def test_one_all_reduce_for_each_mesh_and_ascent(kind, meshes, base):
    for counts in run(4, collectives, kind, base):
        for step, name, ops, sizes in counts:
            if name == "first_step" and meshes:
                assert ops == {"c10d.allreduce_": meshes}, step
                assert sizes == [5 * 8] * meshes
            else:
                assert not ops and not sizes, (step, name, ops)


def sent_with_reuse(kind):
    """What first_step and step send, step by step; in the last two gradients are there on some ranks only."""
    model, part = model_of(kind)
    optimizer = make(model, "adamw", every=2, reuse=0.4)
    sizes = []
    for step, batch in enumerate(batches(4)):
        for name in ["first_step", "step"] if optimizer.ascends else ["step"]:
            backward(model, part(batch))
            for i, p in enumerate(model.parameters()) if step > 1 else ():
                if (i + dist.get_rank()) % 3 == 0:
                    p.grad = None
            with Sent() as sent:
                getattr(optimizer, name)()
            sizes.append(sent.bytes)
            optimizer.zero_grad()
    return sizes


@pytest.mark.parametrize("kind, meshes", [("ddp", 0), ("fsdp", 1), ("fsdp_x_tp", 2)])
def test_what_reuse_sends_beside_that(kind, meshes):
    """Two products and one square in a step with an ascent, one square in a step between two."""
    for sizes in run(4, sent_with_reuse, kind):
        assert sizes == 2 * [[40] * meshes, [16] * meshes + [8] * meshes, [8] * meshes]


def sent_by(width, layers):
    """Bytes that each phase of a step sends."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = FriendlySAM(model.parameters(), SGD, lr=0.1, momentum=0.9)
    x = torch.randn(4, width)
    phases = {}
    for name in ("first_step", "second_step"):
        with Sent() as sent:
            model(x).square().sum().backward()
        phases["backward"] = sum(sent.bytes)
        with Sent() as sent:
            getattr(optimizer, name)(zero_grad=True)
        phases[name] = sent.bytes
    return phases, sum(p.numel() for p in model.parameters())


def test_communication_does_not_grow_with_the_model():
    """On 8 ranks: 200 times the parameters, the same 40 bytes."""
    small, large = (run(8, sent_by, *size) for size in ((8, 2), (64, 7)))
    for phases, _ in small:
        assert phases["first_step"] == [40] and phases["second_step"] == []
    for (phases, count), (_, few) in zip(large, small):
        assert phases["first_step"] == [40] and phases["second_step"] == []
        assert count > 200 * few and phases["backward"] > 4 * count  # the counter sees what does grow


def part_of_the_world():
    """Two stages of a pipeline, each on a 2 x 2 mesh of its own; the second one has other parameters."""
    cube = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("stage", "data", "tensor"))
    mesh = cube["data", "tensor"]
    stage = cube.get_local_rank("stage")
    generator = torch.Generator().manual_seed(7)
    values, grads = (torch.randn(5, 6, generator=generator, dtype=torch.float64) * (stage + 1) for _ in range(2))
    placements = [Shard(0), Shard(1)]
    param = nn.Parameter(distribute_tensor(values, mesh, placements, src_data_rank=None))
    optimizer = FriendlySAM([param], SGD, lr=0.1)
    norms = []
    for _ in range(2):
        param.grad = distribute_tensor(grads, mesh, placements, src_data_rank=None)
        with CommDebugMode() as mode:
            optimizer.first_step()
        norms.append(float(optimizer.stats()["grad_norm"]))
        assert mode.get_total_counts() == 1
        clipped = clip_grad_norm_([param], 1e9)
        optimizer.second_step()
    return norms, float(clipped), float(grads.norm())


def test_a_mesh_that_is_part_of_the_world():
    for norms, clipped, expected in run(8, part_of_the_world):
        assert norms + [clipped] == pytest.approx([expected] * 3, rel=1e-14)


def copies_that_differ():
    """A plain parameter and one on each axis, with gradients that differ in the last bits, as kernels may have it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    generator = torch.Generator().manual_seed(dist.get_rank())
    wobble = 1 + 1e-14 * torch.rand(4, 4, generator=generator, dtype=torch.float64)
    params = [
        nn.Parameter(torch.ones(4, 4, dtype=torch.float64)),
        *(nn.Parameter(distribute_tensor(torch.ones(4, 4).double(), mesh[name], [Shard(0)])) for name in "ab"),
        nn.Parameter(distribute_tensor(torch.ones(4, 4).double(), mesh, [Shard(0), Shard(1)])),
    ]
    optimizer = FriendlySAM(params, SGD, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
        local = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
        local.mul_(wobble[: local.shape[0], : local.shape[1]])
    optimizer.first_step()
    return torch.stack([v.double() for v in optimizer.stats().values()]), vector([params[3]])


def test_all_ranks_have_the_same_bits_though_copies_differ():
    results = run(4, copies_that_differ)
    for stats, weights in results:
        assert identical(stats, results[0][0]) and identical(weights, results[0][1])
        assert stats[1] == pytest.approx(8.0, rel=1e-13)  # sqrt of 64 elements
