"""The two passes written by hand, the model and the data that every framework is compared on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fsam_ext import FriendlySAM

FEATURES, CLASSES, SIZE = 10, 3, 8

# A batch: inputs and targets. A loss: of a model and a batch.
Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]


def network(dropout: float = 0.0, batch_norm: bool = False) -> nn.Sequential:
    """The same weights whenever it is called."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        normalise = nn.BatchNorm1d(16) if batch_norm else nn.Identity()
        return nn.Sequential(nn.Linear(FEATURES, 16), normalise, nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, CLASSES))


def batches(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    """The same batches of SIZE rows whenever it is called."""
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(SIZE, FEATURES, generator=draw), torch.randint(CLASSES, (SIZE,), generator=draw))
        for _ in range(count)
    ]


def rows(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    """The same data row by row, for data loaders: ``DataLoader(rows(), batch_size=SIZE)`` gives ``batches()``."""
    return [(x, y) for inputs, targets in batches(count) for x, y in zip(inputs, targets)]


def warming(step: int) -> float:
    """A radius that grows over eleven steps: the longest run here has sixteen, and one that is resumed is within it."""
    return 0.02 + 0.2 * min(1.0, step / 11)


def perturbed_in_part(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups of which one takes no part in ascents: weights, and biases."""
    params = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [param for param in params if param.dim() > 1]},
        {"params": [param for param in params if param.dim() == 1], "perturb": False},
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def train(
    model: nn.Module,
    optimizer: FriendlySAM,
    data: Iterable[Batch],
    *,
    epochs: int = 1,
    accumulate: int = 1,
    divide: Callable[[Sequence[Batch]], float] | None = None,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    states: Iterable[Tensor] = (),
    loss: Loss = loss_of,
    rho: Callable[[int], float] | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Trains with first_step() and step(), and nothing of fsam_ext.SecondPass. The scheduler moves on with each step.

    Args:
        accumulate: micro-batches a step; the last step of an epoch may have fewer.
        divide: what each micro-batch's loss is divided by, of the step's micro-batches; ``accumulate`` if None.
        clip: the norm that the second gradient is clipped to.
        rho: the radius of each step, counted from 0; it is put into the groups by hand.
        states: of the CPU's random numbers (:class:`RandomStates`), one for each micro-batch.
        after_step: called after each step.

    Returns:
        The clean loss of each micro-batch, undivided.
    """
    clean: list[float] = []
    known, step_number = iter(states), 0
    data = list(data)
    for _ in range(epochs):
        for first in range(0, len(data), accumulate):
            window = data[first : first + accumulate]
            if rho is not None:
                for group in optimizer.param_groups:
                    group["rho"] = rho(step_number)
            step_number += 1
            divisor = accumulate if divide is None else divide(window)
            drawn = list(islice(known, len(window)))
            step = (model, optimizer, window, drawn, divisor, autocast, grad_scaler, loss)
            clean += one_step(*step, clip)
            if scheduler is not None:
                scheduler.step()
            after_step()
    return clean


def one_step(
    model: nn.Module,
    optimizer: FriendlySAM,
    window: Sequence[Batch],
    states: Sequence[Tensor],
    divisor: float,
    autocast: torch.dtype | None,
    grad_scaler: torch.amp.GradScaler | None,
    loss: Loss,
    clip: float | None,
) -> list[float]:
    def one_pass() -> list[float]:
        losses = []
        for number, batch in enumerate(window):
            if states:
                torch.set_rng_state(states[number])
            with torch.autocast("cpu", autocast) if autocast is not None else nullcontext():
                value = loss(model, batch)
            losses.append(value.item())
            value = value / divisor
            (value if grad_scaler is None else grad_scaler.scale(value)).backward()
        return losses

    optimizer.zero_grad()
    losses = one_pass()
    if optimizer.ascends:
        optimizer.first_step(zero_grad=True, grad_scaler=grad_scaler)
        statistics = [buffer.clone() for buffer in model.buffers()]
        one_pass()
        for buffer, value in zip(model.buffers(), statistics):
            buffer.copy_(value)
    if clip is not None:
        if grad_scaler is not None:
            grad_scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    if grad_scaler is None:
        optimizer.step()
    else:
        grad_scaler.step(optimizer)
        grad_scaler.update()
    return losses


def train_with_local_first_passes(
    model: nn.Module, optimizer: FriendlySAM, data: Sequence[Batch], accumulate: int, clip: float | None = None
) -> None:
    """Trains a DistributedDataParallel model whose ranks exchange gradients in the last second pass of a step only."""
    for first in range(0, len(data), accumulate):
        window = data[first : first + accumulate]
        with model.no_sync():
            for batch in window:
                (loss_of(model, batch) / accumulate).backward()
        optimizer.first_step(zero_grad=True)
        for number, batch in enumerate(window):
            with nullcontext() if number == len(window) - 1 else model.no_sync():
                (loss_of(model, batch) / accumulate).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.second_step(zero_grad=True)


class RandomStates(list):
    """Where the random numbers are at each clean forward pass of a module: what a framework drew in between is its own.

    Args:
        module: whose forward passes count, the model's own first layer say.
        perturbed: tells whether the weights are perturbed.
    """

    def __init__(self, module: nn.Module, perturbed: Callable[[], bool]) -> None:
        super().__init__()
        self._perturbed = perturbed
        module.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, inputs: Any) -> None:
        if module.training and not self._perturbed():
            self.append(torch.get_rng_state())


def difference(ours: nn.Module, theirs: nn.Module) -> float:
    """The largest difference between two models' parameters and buffers."""
    return distance(ours.state_dict(), theirs.state_dict())


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The same of their state_dicts."""
    assert a.keys() == b.keys()
    return torch.stack([(a[name].double() - b[name].double()).abs().max() for name in a]).max().item()
