"""A small training run that can be done by one process or by several, and what it leaves behind to be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fsam_ext import FriendlySAM

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
BASES = {
    "sgd": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}),
    "adamw": (AdamW, {"lr": 1e-2}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3}),  # not fused
}
BATCH = 12  # rows of a whole batch; divided by 1, 2, 3 and 4 ranks


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Layers that no number of ranks divides: with 2 ranks and more, shards are uneven, and some are empty."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)


def wide_network() -> nn.Sequential:
    """For tensor parallelism, which wants two layers that belong together, and for layers that are left out of it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)
        ).double()


def batches(count: int, dtype: torch.dtype = torch.float64, first: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randn(BATCH, 7, generator=generator, dtype=torch.float64).to(dtype) for _ in range(first + count)]
    return [(rows[:, :6], rows[:, 6:]) for rows in drawn[first:]]


def shard(batch: tuple[Tensor, Tensor], mesh: DeviceMesh | None = None) -> tuple[Tensor, Tensor]:
    """This rank's rows of a batch; with a mesh, those of the rank's place on it."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if mesh is None else (mesh.get_local_rank(), mesh.size())
    return tuple(part.chunk(world)[rank] for part in batch)


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss = (model(batch[0]) - batch[1]).square().mean()
    loss.backward()
    return loss


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, sharded or not."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def vector(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([whole(tensor).flatten() for tensor in tensors])


def state_vector(optimizer: torch.optim.Optimizer, name: str) -> Tensor:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return vector(optimizer.state[param][name] for param in params)


def train(
    model: nn.Module,
    optimizer: FriendlySAM,
    data: Iterable[tuple[Tensor, Tensor]],
    part: Callable[[Any], Any] = shard,
    first_pass: Callable[[], Any] = nullcontext,
    before_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Trains; returns all weights after each step, one step a row."""
    history = []
    for step, batch in enumerate(data):
        before_step(step)
        with first_pass():
            backward(model, part(batch))
        if optimizer.ascends:
            optimizer.first_step(zero_grad=True)
            backward(model, part(batch))
        optimizer.step()
        optimizer.zero_grad()
        history.append(vector(model.parameters()))
    return torch.stack(history)


def train_alone(
    data: Iterable[tuple[Tensor, Tensor]], base: str = "sgd", model: nn.Module | None = None, **options: Any
) -> tuple[Tensor, FriendlySAM]:
    """The same run in one process, with whole batches."""
    model = model or network()
    optimizer = make(model, base, **options)
    return train(model, optimizer, data, part=lambda batch: batch), optimizer


def make(model: nn.Module, base: str = "sgd", **options: Any) -> FriendlySAM:
    cls, kwargs = BASES[base]
    return FriendlySAM(model.parameters(), cls, **{"rho": 0.2, **kwargs, **options})


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest element."""
    return float((a - b).abs().max() / b.abs().max())
