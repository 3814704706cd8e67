"""The official F-SAM algorithm in plain PyTorch, an op a line: what FriendlySAM has to equal.

Written from the description of github.com/nblt/F-SAM, with the paper's form of the average as an option; and, for the
steps between two ascents, from LookSAM (Liu et al., CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class OfficialFriendlySAM:
    """`groups`: dicts with "params" and any of rho, sigma, lmbda, adaptive."""

    def __init__(
        self,
        groups: Iterable[Tensor] | list[dict],
        base: type[torch.optim.Optimizer],
        rho: float = 0.05,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        adaptive: bool = False,
        ema: str = "previous",
        **base_kwargs,
    ) -> None:
        groups = list(groups)
        groups = groups if isinstance(groups[0], dict) else [{"params": groups}]
        ours = {"rho": rho, "sigma": sigma, "lmbda": lmbda, "adaptive": adaptive}
        self.groups = [{**ours, **group, "params": list(group["params"])} for group in groups]
        plain = [{k: v for k, v in group.items() if k not in ours} for group in self.groups]
        self.base = base(plain, **base_kwargs)
        self.ema = ema
        self.every, self.reuse, self.number = 1, 0.0, 0
        self.direction: dict[Tensor, Tensor] = {}
        self.momentum: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        noise = {}
        for group in self.groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                previous, lmbda = self.momentum.get(p), group["lmbda"]
                if self.ema == "updated":
                    previous = torch.zeros_like(p) if previous is None else previous
                    self.momentum[p] = lmbda * previous + (1 - lmbda) * p.grad
                    noise[p] = p.grad - group["sigma"] * self.momentum[p]
                elif previous is None:
                    self.momentum[p] = p.grad.clone()
                    noise[p] = p.grad.clone()
                else:
                    noise[p] = p.grad - group["sigma"] * previous
                    self.momentum[p] = lmbda * previous + (1 - lmbda) * p.grad
        members = [(group, p) for group in self.groups for p in group["params"] if p in noise]
        norms = [((p.abs() if group["adaptive"] else 1.0) * noise[p]).norm() for group, p in members]
        norm = torch.stack(norms).norm()
        self.saved = {p: p.detach().clone() for _, p in members}
        for group, p in members:
            scale = group["rho"] / (norm + 1e-12)
            p.add_((p.pow(2) if group["adaptive"] else 1.0) * noise[p] * scale)

    @torch.no_grad()
    def second_step(self) -> None:
        for p, saved in self.saved.items():
            p.copy_(saved)
        self.base.step()

    @torch.no_grad()
    def looking_step(self, backward) -> None:
        """A step of LookSAM, with ``every`` and ``reuse``; ``backward`` makes gradients anew."""
        params = [p for group in self.groups for p in group["params"]]
        backward()
        first = {p: p.grad.clone() for p in params}
        if self.number % self.every == 0:
            self.first_step()
            backward()
            part = sum((p.grad * first[p]).sum() for p in params) / sum((g * g).sum() for g in first.values())
            self.direction = {p: p.grad - part * first[p] for p in params}
        else:
            weights = {p: p.detach().clone() for p in params}
            self.first_step()  # for the average
            self.saved = weights
            norms = [torch.stack([t.norm() for t in ts.values()]).norm() for ts in (first, self.direction)]
            for p in params:
                p.grad = first[p] + self.reuse * norms[0] / (norms[1] + 1e-12) * self.direction[p]
        self.second_step()
        self.number += 1
