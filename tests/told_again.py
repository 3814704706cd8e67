"""A training run recorded pass by pass, and told again by plain code: what only the optimizer can have got wrong.

NOTE [a run is told again]
A forward pass rounds differently on each device, most of all under autocast, and a network amplifies that; two runs on
two devices cannot be compared weight by weight. What the optimizer did with the gradients that it had can. So a run
records, pass by pass, its unscaled gradients and its weights, and the plain code of tests/official.py tells it again
from the first weights and the gradients alone, in float64 on the CPU. Both agree up to the optimizer's own roundings in
float32, which `Teller` counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fsam_ext import FriendlySAM

from .conformance import ROUNDINGS, SUMMANDS, unit
from .official import OfficialFriendlySAM

RHO, LR, MOMENTUM = 0.1, 0.05, 0.9
UNIT = unit(torch.float32)
LONG = 1 / (1 - MOMENTUM)


@dataclass
class Step:
    """One step as it was: gradients unscaled, all in float64 on the CPU."""

    first: list[Tensor]
    perturbed: list[Tensor]
    second: list[Tensor]
    after: list[Tensor]


def numbers(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().to("cpu", torch.float64, copy=True) for tensor in tensors]


def gradients(params: list[nn.Parameter], scale: float) -> list[Tensor]:
    return [grad / scale for grad in numbers(param.grad for param in params)]


def finite(grads: list[Tensor]) -> bool:
    return all(bool(grad.isfinite().all()) for grad in grads)


def make(model: nn.Module, **options: Any) -> FriendlySAM:
    return FriendlySAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=MOMENTUM, **options)


def run(
    model: nn.Module,
    optimizer: FriendlySAM,
    data: Iterable[tuple[Tensor, Tensor]],
    precision: Any = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
    poison: Callable[[int], bool] = lambda step: False,
) -> list[Step]:
    """Trains as the documentation says, and records. ``poison`` tells in which steps the second pass meets an inf."""
    params, steps = list(model.parameters()), []

    def backward(x: Tensor, y: Tensor) -> tuple[list[Tensor], float]:
        optimizer.zero_grad()
        with precision():
            loss = nn.functional.cross_entropy(model(x).float(), y)
        scale = scaler.get_scale() if scaler else 1.0
        (scaler.scale(loss) if scaler else loss).backward()
        return gradients(params, scale)

    for index, (x, y) in enumerate(data):
        first = backward(x, y)
        optimizer.first_step(**({"grad_scaler": scaler} if scaler else {}))
        perturbed = numbers(params)
        second = backward(x * torch.inf if poison(index) else x, y)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.second_step()
        steps.append(Step(first, perturbed, second, numbers(params)))
    return steps


def assert_within(actual: list[Tensor], exact: list[Tensor], slack: list[Tensor], what: str) -> None:
    for i, (a, b, allowed) in enumerate(zip(actual, exact, slack, strict=True)):
        worst = ((a - b).abs() - allowed).max()
        assert worst <= 0, f"{what}, parameter {i}: {worst:.3g} more than roundings explain"


class Teller:
    """The same steps from the gradients alone, with what float32 may have lost of the weights until then.

    Each step rounds ROUNDINGS times, by at most UNIT of a weight or of its way. An error of the momentum goes on for
    1 / (1 - MOMENTUM) steps, and so does one of the average, whose decay is the same. The norm is a sum of SUMMANDS.
    """

    def __init__(self, start: list[Tensor]) -> None:
        self.params = [nn.Parameter(tensor.clone()) for tensor in start]
        options = {"rho": RHO, "lmbda": MOMENTUM, "lr": LR, "momentum": MOMENTUM}
        self.official = OfficialFriendlySAM(self.params, torch.optim.SGD, **options)
        self.lost = [torch.zeros_like(tensor) for tensor in start]
        self.seen = [torch.zeros_like(tensor) for tensor in start]  # the largest gradients so far

    def _give(self, grads: list[Tensor]) -> bool:
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad.clone()
        return finite(grads)

    def _slack_of_ascent(self, noise: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        norm = torch.cat([d.flatten() for d in noise]).norm()
        average = [LONG * ROUNDINGS * UNIT * seen for seen in self.seen]
        of_norm = SUMMANDS * UNIT + torch.cat([error.flatten() for error in average]).norm() / norm
        return [
            lost + ROUNDINGS * UNIT * w.abs() + RHO / norm * (error + of_norm * d.abs())
            for lost, w, error, d in zip(self.lost, weights, average, noise)
        ]

    def check(self, step: Step, what: str) -> None:
        before = numbers(self.params)
        if not self._give(step.first):
            assert_within(step.perturbed, before, self.lost, f"{what}, after an inf in the first pass")
            assert_within(step.after, before, self.lost, f"{what}, skipped")
            return
        averages = [self.official.momentum.get(param, 0.0) for param in self.params]
        self.seen = [torch.maximum(seen, grad.abs()) for seen, grad in zip(self.seen, step.first)]
        slack = self._slack_of_ascent([g - m for g, m in zip(step.first, averages)], before)
        self.official.first_step()
        assert_within(step.perturbed, numbers(self.params), slack, f"{what}, perturbed")
        if self._give(step.second):
            self.official.second_step()
        else:
            with torch.no_grad():
                for param, saved in self.official.saved.items():
                    param.copy_(saved)
        self.lost = [
            lost + ROUNDINGS * UNIT * (w.abs() + LONG * (param.detach() - w).abs())
            for lost, w, param in zip(self.lost, before, self.params)
        ]
        assert_within(step.after, numbers(self.params), self.lost, f"{what}, updated")


def assert_told_again(start: list[Tensor], steps: list[Step]) -> None:
    """NOTE [a run is told again]; the run has moved at all, and by more than is allowed."""
    teller = Teller(start)
    for index, step in enumerate(steps):
        teller.check(step, f"step {index}")
    moved = max((a - b).abs().max() for a, b in zip(steps[-1].after, start))
    assert moved > 100 * max(lost.max() for lost in teller.lost)
