"""Checkpoints as each format wrote them: ``python -m tests.previous_formats tests/checkpoints/format1.pt``.

Run it before a change of the format (CURRENT_FORMAT in fsam_ext/state/checkpoints.py), so that its file stays as a
witness.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn

from fsam_ext import FriendlySAM

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
CASES = {
    "sgd": (SGD, torch.float64, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (AdamW, torch.float64, {"lr": 0.01}),
    "int8": (SGD, torch.float32, {"lr": 0.05, "momentum": 0.9, "ema_dtype": torch.int8}),
    "masters": (AdamW, torch.bfloat16, {"lr": 0.01, "master_weights": True, "ema_dtype": torch.bfloat16, "every": 2}),
}
BEFORE, AFTER = 5, 3


def draw(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that are the same bits on every machine, which those of randn are not."""
    return (torch.randint(-1000, 1000, shape, generator=generator).double() / 512).to(dtype)


def make(name: str) -> tuple[list[nn.Parameter], FriendlySAM]:
    base, dtype, options = CASES[name]
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(draw(shape, generator, dtype)) for shape in ((3, 5), (7,), ())]
    return params, FriendlySAM(params, base, rho=0.2, lmbda=0.9, **options)


def train(params: list[nn.Parameter], optimizer: FriendlySAM, first: int, count: int) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        halves = (optimizer.first_step, optimizer.second_step) if optimizer.ascends else (optimizer.step,)
        for half in halves:
            for p in params:
                p.grad = draw(p.shape, generator, p.dtype)
            half()


def write(path: str) -> None:
    cases: dict[str, Any] = {}
    for name in CASES:
        params, optimizer = make(name)
        train(params, optimizer, 0, BEFORE)
        saved = copy.deepcopy(optimizer.state_dict())
        weights = [p.detach().clone() for p in params]
        train(params, optimizer, BEFORE, AFTER)
        cases[name] = {"weights": weights, "optimizer": saved, "later": [p.detach().clone() for p in params]}
    torch.save(cases, path)


if __name__ == "__main__":
    write(sys.argv[1])
