"""What a provider is, and those of others: the official sequence, foreach, compiled, a package, SAM by hand.

A provider is made from parameters and then called twice a step: ``ascend()`` with the first gradients in ``.grad``,
``descend()`` with the second ones. Everything that it needs between calls is its own. No call waits for the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

RHO, SIGMA, LMBDA, EPS = 0.05, 1.0, 0.9, 1e-12


@dataclass(frozen=True)
class Base:
    """A base optimizer and its options."""

    name: str
    optimizer: type[torch.optim.Optimizer]
    options: tuple[tuple[str, float], ...]

    def make(self, params: Sequence[nn.Parameter], **more: Any) -> torch.optim.Optimizer:
        return self.optimizer(params, **dict(self.options), **more)

    def for_graphs(self, params: Sequence[nn.Parameter]) -> dict[str, bool]:
        """The option without which torch refuses to capture a step that counts, where it has one."""
        has_option = "capturable" in inspect.signature(self.optimizer).parameters
        return {"capturable": True} if has_option and params[0].is_cuda else {}


BASES = {
    "sgd": Base("sgd", torch.optim.SGD, (("lr", 1e-3), ("momentum", 0.9), ("weight_decay", 1e-4))),
    "adamw": Base("adamw", torch.optim.AdamW, (("lr", 1e-4), ("weight_decay", 1e-2))),
}


class Provider:
    """One implementation of F-SAM over some parameters.

    Attributes:
        name: who is measured; rows carry it.
        buffers: an upper bound of the tensors of the parameters' size that exist during a step, gradients included.
        full_only: too slow or too close to another one for the short run.
        capturable: a CUDA graph can hold its step.
        not_captured: why not.
        ascends: it has a first half.
        passes: forward-backwards of its training step.
        compiles: its first step compiles, which takes longer than that of all others together.
        is_fsam: it does the work of F-SAM, so that a ratio to it compares like with like.
        eager: its op calls pass through the dispatcher, where they can be counted.
        dtypes: those of the parameters that it is for; None: all.
    """

    name: ClassVar[str]
    backend = "torch"
    buffers = 7
    full_only = False
    capturable = False
    not_captured = "nobody made it fit for a CUDA graph"
    ascends = True
    passes = 2
    compiles = False
    is_fsam = True
    eager = True
    dtypes: ClassVar[tuple[torch.dtype, ...] | None] = None

    def __init__(self, params: list[nn.Parameter], base: Base) -> None:
        self.params = params

    @classmethod
    def bytes_per_parameter(cls, dtype: torch.dtype, base: str) -> float:
        """What F-SAM with this provider's state must move: :func:`bytes_per_parameter`."""
        return bytes_per_parameter(dtype, base)

    def ascend(self) -> None:
        raise NotImplementedError

    def descend(self) -> None:
        raise NotImplementedError

    def zero_grad(self) -> None:
        for param in self.params:
            param.grad = None


class Official(Provider):
    """The sequence of operations of the official implementation, one tensor after the other."""

    name = "official"
    not_captured = (
        "each step gives the weights another memory (p.data = saved), so a replay would begin from the weights of the "
        "step that was captured"
    )

    def __init__(self, params: list[nn.Parameter], base: Base) -> None:
        super().__init__(params, base)
        self.base = base.make(params)
        self.average: dict[nn.Parameter, Tensor] = {}
        self.saved: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def ascend(self) -> None:
        for p in self.params:
            gradient = p.grad.clone()
            if p in self.average:
                p.grad -= self.average[p] * SIGMA
                self.average[p] = self.average[p] * LMBDA + gradient * (1 - LMBDA)
            else:
                self.average[p] = gradient
        norm = torch.norm(torch.stack([(1.0 * p.grad).norm(p=2) for p in self.params]), p=2)
        scale = RHO / (norm + EPS)
        for p in self.params:
            self.saved[p] = p.data.clone()
            p.add_(1.0 * p.grad * scale.to(p))

    @torch.no_grad()
    def descend(self) -> None:
        for p in self.params:
            p.data = self.saved[p]
        self.base.step()


class SamByHand(Official):
    """Plain SAM as training scripts carry it along: the official sequence without an average."""

    name = "sam by hand"
    is_fsam = False
    buffers = 6

    @torch.no_grad()
    def ascend(self) -> None:
        norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in self.params]), p=2)
        scale = RHO / (norm + EPS)
        for p in self.params:
            self.saved[p] = p.data.clone()
            p.add_(p.grad * scale.to(p))


def foreach_ascent(
    params: list[Tensor],
    grads: list[Tensor],
    average: list[Tensor],
    saved: list[Tensor],
) -> None:
    """The ascent in horizontally fused operations.

    The weight of the average is a number: as a tensor, which lerp takes for each element but not for a list, it would
    be read back, and each step would wait for the device.
    """
    noise = torch._foreach_sub(grads, average, alpha=SIGMA)
    torch._foreach_lerp_(average, grads, 1 - LMBDA)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(noise)))
    torch._foreach_mul_(noise, RHO / (norm + EPS))
    torch._foreach_copy_(saved, params)
    torch._foreach_add_(params, noise)


class Foreach(Provider):
    """F-SAM in torch._foreach operations and the fused base optimizer: what one can write in a screenful."""

    name = "foreach"
    capturable = True

    def __init__(self, params: list[nn.Parameter], base: Base) -> None:
        super().__init__(params, base)
        self.base = base.make(params, fused=True, **base.for_graphs(params))
        self.average = [torch.zeros_like(p) for p in params]
        self.saved = [torch.empty_like(p) for p in params]
        self.first = True

    def _ascent(self, *args: Any) -> None:
        foreach_ascent(*args)

    @torch.no_grad()
    def ascend(self) -> None:
        grads = [p.grad for p in self.params]
        self._ascent(self.params, grads, self.average, self.saved)
        if self.first:  # the average begins as the first gradient
            torch._foreach_copy_(self.average, grads)
            self.first = False

    @torch.no_grad()
    def descend(self) -> None:
        torch._foreach_copy_(self.params, self.saved)
        self.base.step()


class Compiled(Foreach):
    """The same under torch.compile, the restore compiled together with the base update."""

    name = "compiled"
    eager = False
    compiles = True

    def __init__(self, params: list[nn.Parameter], base: Base) -> None:
        super().__init__(params, base)
        self.base = base.make(params, foreach=True, **base.for_graphs(params))
        self._ascent = torch.compile(foreach_ascent, fullgraph=True)
        self._descend = torch.compile(self._restore_and_step)

    def _restore_and_step(self) -> None:
        torch._foreach_copy_(self.params, self.saved)
        self.base.step()

    @torch.no_grad()
    def descend(self) -> None:
        self._descend()


class PytorchOptimizer(Provider):
    """``FriendlySAM`` of the package pytorch_optimizer, with its horizontally fused operations."""

    name = "pytorch_optimizer"
    capturable = True
    foreach: bool | None = True

    def __init__(self, params: list[nn.Parameter], base: Base) -> None:
        from pytorch_optimizer import FriendlySAM

        super().__init__(params, base)
        options = {"rho": RHO, "sigma": SIGMA, "lmbda": LMBDA, "perturb_eps": EPS, **dict(base.options)}
        options |= base.for_graphs(params)
        try:
            self.optimizer = FriendlySAM(params, base.optimizer, foreach=self.foreach, **options)
        except TypeError:  # a release that has no such option: it goes to the base optimizer, which may not know it
            self.optimizer = FriendlySAM(params, base.optimizer, **options)

    def ascend(self) -> None:
        self.optimizer.first_step()

    def descend(self) -> None:
        self.optimizer.second_step()


class BaseOnly(Provider):
    """The fused base optimizer alone. In training it makes two forward-backwards: what is left is a peer's own cost."""

    name = "base"
    is_fsam = False
    capturable = True
    ascends = False
    buffers = 3

    def __init__(self, params: list[nn.Parameter], base: Base) -> None:
        super().__init__(params, base)
        self.base = base.make(params, fused=True, **base.for_graphs(params))

    def ascend(self) -> None:
        pass

    def descend(self) -> None:
        self.base.step()


class Plain(BaseOnly):
    """Training without any SAM: one forward-backward and the fused base optimizer."""

    name = "plain"
    passes = 1


# ---- The bytes that a step must move -------------------------------------------------------------------------------


def bytes_per_parameter(
    dtype: torch.dtype, base: str, masters: bool = False, average: torch.dtype | None = None
) -> float:
    """What the three passes of F-SAM read and write for each parameter, each value once (docs/design.md).

    Pass A reads g and m; pass B reads g, m and w and writes m, w' and the backup; pass C reads the backup, g and the
    base optimizer's state and writes w and the state. Weights, gradients and the backup have the dtype of the
    parameters, the state is float32 (float64 for float64), and so is the average unless ``average`` is its dtype (int8
    has a float32 scale for each 128 elements). With ``masters`` there is no backup: pass B reads the master beside w,
    and pass C reads and writes it and writes w.
    """
    low = dtype.itemsize
    state = 8 if dtype == torch.float64 else 4
    ema = state if average is None else average.itemsize + (4 / 128 if average == torch.int8 else 0)
    noise_norm = low + ema
    perturb = (low + low + ema) + (low + ema) + (state if masters else low)
    moments = {"sgd": state, "adamw": 2 * state}[base]
    restore = (low + moments) + (low + moments) + (2 * state if masters else low)
    return noise_norm + perturb + restore
